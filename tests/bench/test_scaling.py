"""bench/ops/scaling.py: curves are measured and plotted."""

from __future__ import annotations

import pytest
import torch

from bench.harness.timing import Times
from bench.ops import scaling
from tests.bench.cases import TINY


def test_curves_are_measured_and_plotted(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scaling, "measure", lambda *_, **__: Times([1e-3]))  # after the check of every step
    threads = torch.get_num_threads()
    found = scaling.scaling(TINY).curves
    assert torch.get_num_threads() == threads and next(zip(*found["threads, 1e7 elements"])) == (1, 2)
    assert found["elements"][0] == [10, 1e9 * 1e-3 / 10]
    scaling.plot({"1 thread": found}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
