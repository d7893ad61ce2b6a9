"""Claims of the paper with verdicts, and the Result of an experiment: numbers, arrays, a figure, and their files."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from blockhess.report.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPRODUCED, PARTLY, NOT_REPRODUCED = "reproduced", "partly", "not reproduced"

TEXT_WIDTH = 110

# Colors of the optimizers, distinguishable for color-blind readers and in gray print.
GD_COLOR, ADAM_COLOR, ADAM_ONE_COLOR = "#08519c", "#d95f02", "#1b9e77"


@dataclass(frozen=True)
class Claim:
    """A statement of the paper with what was measured here and a verdict.

    Attributes:
        paper: the statement and its place in the paper.
        measured: the numbers behind the verdict.
        verdict: REPRODUCED, PARTLY or NOT_REPRODUCED.
    """

    paper: str
    measured: str
    verdict: str

    def __str__(self) -> str:
        lines = (f"{self.verdict.upper()}: {self.paper}", f"  here: {self.measured}")
        return "\n".join(textwrap.fill(line, TEXT_WIDTH, subsequent_indent="  ") for line in lines)


@dataclass(frozen=True)
class Result:
    """The result of an experiment.

    Attributes:
        name: name of the command and of the files.
        title: one line.
        settings: how it was run, JSON values.
        claims: in the order of the paper.
        text: tables, printed before the claims.
        numbers: the numbers behind the claims, JSON values.
        arrays: larger data, for the .npz file.
        figure: None where the experiment has none.
    """

    name: str
    title: str
    settings: Mapping[str, Any]
    claims: tuple[Claim, ...]
    text: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    figure: Figure | None = None

    def __str__(self) -> str:
        return "\n\n".join(filter(None, [self.title, self.text.rstrip(), *map(str, self.claims)]))

    def write(self, folder: Path, **provenance: Any) -> list[Path]:
        """Write NAME.json, NAME.npz if there are arrays and NAME.png if there is a figure.

        Args:
            folder: an existing folder.
            provenance: further entries of the JSON, such as the seconds it took.

        Returns:
            The files.
        """
        content = {
            "name": self.name,
            "title": self.title,
            "settings": self.settings,
            "claims": [asdict(claim) for claim in self.claims],
            "text": self.text,
            "numbers": self.numbers,
            **provenance,
        }
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
        written = [path]
        if self.arrays:
            written.append(folder / f"{self.name}.npz")
            arrays: dict[str, Any] = {name: value.numpy() for name, value in self.arrays.items()}
            np.savez_compressed(written[-1], **arrays)
        if self.figure is not None:
            written.append(folder / f"{self.name}.png")
            save_figure(self.figure, written[-1])
        return written


def _finite(value: Any) -> Any:
    """Return a JSON value with floats rounded to 6 digits and non-finite ones as text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def quantiles(values: Tensor, shares: tuple[float, ...] = (0.1, 0.5, 0.9)) -> list[float]:
    """Return quantiles of all entries, each an entry itself; infinite entries are allowed.

    Example:
        >>> quantiles(torch.tensor([1.0, 2.0, 3.0]), (0.5,))
        [2.0]
    """
    ordered = values.flatten().double().sort().values
    index = (torch.tensor(shares, dtype=torch.float64) * (len(ordered) - 1)).round().long()
    chosen: list[float] = ordered[index].tolist()
    return chosen


def verdict(all_hold: bool, some_hold: bool = False) -> str:
    """Return REPRODUCED if a claim holds in full, PARTLY if in part, else NOT_REPRODUCED."""
    return REPRODUCED if all_hold else PARTLY if some_hold else NOT_REPRODUCED


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """Return an empty figure of width x height inches, without pyplot and without a display.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('paper: pictures need matplotlib; type: pip install "blockhess[cli]"') from None
    return Figure(figsize=(width, height), layout="constrained", dpi=dpi)
