"""What is fuzzed: for every kind of file how to damage it, and what must hold where it is accepted all the same."""

from __future__ import annotations

import random
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any


class Finding(AssertionError):
    """A reader broke a promise."""


class Target(ABC):
    """What is fuzzed.

    Args:
        folder: for the files, empty.
    """

    name: str

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def run(self, seed: int, index: int) -> bool:
        """Whether the input of that seed and index is accepted.

        Raises:
            Finding: a promise is broken.
        """


class Reader(Target):
    """A reader of damaged files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / f"{self.name}.file"

    @abstractmethod
    def make(self, rng: random.Random) -> tuple[bytes, Any]:
        """A damaged file, and what it must hold where it is accepted; None where that is not known."""

    @abstractmethod
    def read(self) -> Any:
        """The content of the file at path."""

    @abstractmethod
    def check(self, content: Any, expected: Any) -> None:
        """Raise Finding where the content breaks a promise, or is not what was expected."""

    def run(self, seed: int, index: int) -> bool:
        """Whether the reader accepts the damaged file of that seed and index.

        Raises:
            Finding: it did so wrongly, or refused it by anything but one clear ValueError.
        """
        data, expected = self.make(random.Random(f"{self.name} {seed} {index}"))
        self.path.write_bytes(data)
        try:
            content = self.read()
        except ValueError as error:
            require(type(error) is ValueError, f"refused by {type(error).__name__}")
            text = str(error)
            require(str(self.path) in text, f"the file is not named: {text!r}")
            require(text.isprintable() and len(text) < 1000, f"not one line of print: {text[:200]!r}")
            return False
        self.check(content, expected)
        return True


def require(rule: bool, text: str) -> None:
    if not rule:
        raise Finding(text)


def printable(text: str) -> bool:
    """Whether a terminal shows the text and does nothing else."""
    return re.sub(r"\n", "", text).isprintable()
