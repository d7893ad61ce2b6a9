"""The progress bar: silent where it is quick, one moving line on terminals and in notebooks, whole lines in logs."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from blockhess.run.progress import progress_bar

tqdm: Any = pytest.importorskip("tqdm")


class Stream(io.StringIO):
    """A stderr of some kind."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class NotebookStream(Stream):
    """What a kernel puts in place of stderr is told by its module."""

    __module__ = "ipykernel.iostream"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that tqdm sees."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


def told(stream: Stream, clock: list[float], seconds_each: float, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)
    with progress_bar(40, "HVP") as on_hvp:
        for _ in range(30):
            clock[0] += seconds_each
            on_hvp()
    return stream.getvalue()


def test_a_job_of_seconds_is_silent(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Stream(True), Stream(False), NotebookStream(False)):
        assert told(stream, clock, 0.05, monkeypatch).strip() == ""


@pytest.mark.parametrize("stream", [Stream(True), NotebookStream(False)], ids=["terminal", "notebook"])
def test_a_terminal_and_a_notebook_get_one_moving_line(
    stream: Stream, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = told(stream, clock, 1.0, monkeypatch)
    assert text.count("\n") == 1 and text.endswith("\n")
    assert text.count("\r") > 20 and "10/40 [00:10<00:30" in text  # done, and what is left
    assert "30/30" in text.splitlines()[-1]  # fewer were needed than there could be


def test_a_log_gets_a_line_now_and_then(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    text = told(Stream(False), clock, 1.0, monkeypatch)
    lines = text.splitlines()
    assert "\r" not in text and text.isascii() and 2 <= len(lines) <= 5
    assert all("HVP/s" in line or "s/HVP" in line for line in lines)
    assert "30/30" in lines[-1]
