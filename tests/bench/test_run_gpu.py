"""bench/run_gpu.sh and bench/ops/gpu.py, as far as they can be run without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

SCRIPT = ROOT / "bench/run_gpu.sh"
built = pytest.mark.skipif(
    not list(ROOT.glob("blockhess_ext/_C*.so")), reason="needs a build in place: python setup.py build_ext --inplace"
)


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=240)


def bench(program: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs a few lines of Python that may import the benchmarks."""
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "python"))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


@built
def test_the_dry_run_passes_and_claims_nothing(tmp_path):
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


def test_a_step_that_fails_is_told(tmp_path):
    done = script(str(tmp_path), "--dry-run", PYTHON="false")
    assert done.returncode == 1
    assert "build                  FAILED: exit code 1, see build.log" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["out", "--reuse-build"], ["out", "--wrong"]])
def test_wrong_arguments_are_refused(arguments):
    done = script(*arguments)
    assert done.returncode == 2 and "bench/run_gpu.sh OUT_DIR" in done.stderr


@built
def test_a_wrong_result_is_not_timed(tmp_path):
    program = """
import sys
from bench import gpu
from blockhess_ext import ops
right = ops.gaussian_density
ops.gaussian_density = lambda *arguments: right(*arguments) * (1 + 1e-9)
sys.argv = ["gpu.py", "--cpu", "--out", "."]
sys.exit(gpu.main())
"""
    done = bench(program, tmp_path)
    assert done.returncode == 1, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    failures = [row["failure"] for row in rows.values() if "failure" in row]
    assert len(failures) == 1 and "gaussian_density differs by 1e-09" in failures[0]
    assert "times" not in next(row for row in rows.values() if "failure" in row)


@built
def test_a_table_of_full_results_says_what_was_met():
    program = """
from bench import gpu
rows = {name: {"measured": {t.quantity: t.value for t in targets}, "times": {}, "error": 0.0}
        for name, (_, targets) in gpu.ROWS.items()}
results = {"size": "full", "environment": {"device": "a GPU"}, "copy_bandwidth": 3e12, "rows": rows}
print(gpu.report(results))
first = next(iter(rows.values()))
first["measured"]["share of copy bandwidth"] = 0.89
print(gpu.table(results).splitlines()[2])
"""
    done = bench(program)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.endswith("| met |") for line in lines) == 13
    assert lines[-1].endswith("| 89.0 % | missed |")


@built
def test_the_table_in_the_results_is_the_script_s():
    committed = (ROOT / "bench/results/targets.md").read_text()
    done = bench("import sys; from bench import gpu; sys.argv = ['gpu.py', '--unproven']; gpu.main()")
    assert committed == done.stdout
