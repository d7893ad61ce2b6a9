"""bench/run_gpu.sh, as far as it runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests import ROOT

SCRIPT = ROOT / "bench/run_gpu.sh"


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.skipif(
    not list(ROOT.glob("blockhess_ext/_C*.so")), reason="needs a build in place: python setup.py build_ext --inplace"
)
def test_dry_run(tmp_path):
    done = script(str(tmp_path), "--dry-run", "--reuse-build")
    summary = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing here is proven on hardware" in summary and "all steps passed" in summary
    assert "needs a GPU: " in (tmp_path / "tests_skip.log").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["size"] == "tiny" and results["environment"]["device"] == "cpu"
    assert len(results["rows"]) == 7 and not any("failure" in row for row in results["rows"].values())
    table = (tmp_path / "results.md").read_text()
    assert "| met |" not in table and table.count("unproven on hardware") == 13


def test_a_failed_step_is_reported(tmp_path):
    done = script(str(tmp_path), "--dry-run", PYTHON="false")
    assert done.returncode == 1
    assert "build                  FAILED: exit code 1, see build.log" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["out", "--reuse-build"], ["out", "--wrong"]])
def test_invalid_arguments(arguments):
    done = script(*arguments)
    assert done.returncode == 2 and "bench/run_gpu.sh OUT_DIR" in done.stderr
