"""The short version of `python -m tests.crash`, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockhess.run.storage import directory, parts
from blockhess.run.storage.checkpoint import Checkpoints
from tests import ROOT
from tests.crash.scenarios import SCENARIOS, run, same_bits


@pytest.mark.parametrize(
    ("kills", "faults", "scenarios"),
    [(4, 3, ["several passes"]), pytest.param(20, 10, list(SCENARIOS), marks=pytest.mark.slow)],
)
def test_killed_runs_are_resumed_to_the_same_bits(kills: int, faults: int, scenarios: list[str]) -> None:
    command = [sys.executable, "-m", "tests.crash", "--kills", str(kills), "--faults", str(faults), "--seed", "1"]
    command += ["--scenarios", *scenarios]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["kills"] >= kills  # the last run may be killed more than once


class Stop(Exception):
    """Ends a run in the middle of a pass."""


@pytest.mark.parametrize("name", ["several passes", "Gauss-Newton, partial, float64, vectors kept"])
def test_a_state_that_is_off_by_one_bit_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop_later(self: Checkpoints, *arguments: object) -> None:
        after_step(self, *arguments)
        if self.count == 4:
            raise Stop

    after_step = Checkpoints.after_step
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Checkpoints, "after_step", stop_later)
        run(name, tmp_path)

    def off(path: Path, run_id: str) -> tuple[object, ...]:
        unit, state, *rest = parts.read_state(path, run_id)
        v = state.tensors["v"]
        v.view(-1)[0] *= 1 + 2 * (1.2e-7 if v.itemsize == 4 else 2.3e-16)
        return unit, state, *rest

    with monkeypatch.context() as patch:
        patch.setattr(directory, "read_state", off)
        assert not same_bits(run(name, tmp_path), run(name, None))
