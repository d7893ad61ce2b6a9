"""bench/run_gpu.sh, as far as it runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time

import pytest

from bench.gpu import rows
from bench.gpu.__main__ import Driver
from tests import ROOT

SCRIPT = ROOT / "bench/run_gpu.sh"


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["bash", SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=3600)


@pytest.mark.slow
@pytest.mark.skipif(
    not list(ROOT.glob("blockhess_ext/_C*.so")), reason="needs a build in place: python setup.py build_ext --inplace"
)
def test_dry_run(tmp_path):
    done = script(str(tmp_path), "--dry-run", "--reuse-build", BLOCKHESS_COMMIT="abc")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing here is proven on hardware" in done.stdout and "all steps passed" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["logs.tar.gz", "results.json", "results.md"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["size"] == "tiny" and results["environment"]["device"] == "cpu"
    assert results["environment"]["commit"] == "abc" and set(results["rows"]) == set(rows.ROWS)
    assert not any("failure" in row for row in results["rows"].values())
    table = (tmp_path / "results.md").read_text()
    assert "| met |" not in table and table.count("unproven on hardware") == sum(len(t) for _, t in rows.ROWS.values())
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert {"logs/build.log", "logs/tests.log", "logs/nano.log"} <= set(archive.getnames())


def test_a_failed_build_is_reported(tmp_path):
    broken = tmp_path / "modules"
    broken.mkdir()
    (broken / "setuptools.py").write_text("raise ImportError('no setuptools')")
    done = script(str(tmp_path / "out"), "--dry-run", PYTHONPATH=str(broken))
    assert done.returncode == 1 and "STEPS FAILED: build, tests" in done.stdout, done.stdout + done.stderr
    steps = json.loads((tmp_path / "out/results.json").read_text())["steps"]
    assert steps["build"]["outcome"] == "FAILED (1), see build.log" and steps["ceilings"]["outcome"] == "ok"
    with tarfile.open(tmp_path / "out/logs.tar.gz") as archive:
        assert b"no setuptools" in archive.extractfile("logs/build.log").read()


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["out", "--reuse-build"], ["out", "--wrong"]])
def test_invalid_arguments(arguments):
    done = script(*arguments)
    assert done.returncode == 2 and "bench/run_gpu.sh OUT_DIR" in done.stderr


def test_steps_end_at_their_limit_and_later_ones_run(tmp_path):
    driver = Driver(tmp_path, True, "tiny", time.monotonic() + 60, {"WORD": "said"}, tmp_path / "logs")
    assert not driver.run("slow", 0.2, ["bash", "-c", "sleep 60 & wait"])
    assert not driver.run("absent", 5, ["no-such-program"])
    assert driver.run("fine", 5, ["bash", "-c", "echo $WORD"])
    outcomes = [step["outcome"] for step in json.loads((tmp_path / "results.json").read_text())["steps"].values()]
    assert outcomes[0].startswith("FAILED (exceeded") and outcomes[1].startswith("FAILED (cannot be started")
    assert outcomes[2] == "ok" and (tmp_path / "logs/fine.log").read_text() == "said\n"
    driver.deadline = time.monotonic()
    assert not driver.run("late", 60, ["sleep", "60"])
    late = json.loads((tmp_path / "results.json").read_text())["steps"]["late"]
    assert late["outcome"].startswith("FAILED (no time left") and late["seconds"] < 1


UNFINISHED = """
import sys, time
from pathlib import Path
from bench.gpu import __main__ as gpu
out = Path(sys.argv[1])
gpu.SAVED_EVERY = 0.1
driver = gpu.Driver(out, True, "tiny", time.monotonic() + 900, {}, out / "logs")
(out / "logs/nano.json").write_text('{"rows": {"a row": {}}}')
driver.run("endless", 900, ["bash", "-c", "echo begun; exec sleep 90"])  # longer than the test waits
"""


def test_a_run_that_is_killed_in_a_step_has_saved_rows_and_logs(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    with subprocess.Popen([sys.executable, "-c", UNFINISHED, str(tmp_path)], env=env) as process:
        end, saved = time.monotonic() + 45, b""
        while not saved and time.monotonic() < end:
            time.sleep(0.1)
            if (tmp_path / "logs.tar.gz").exists():
                with tarfile.open(tmp_path / "logs.tar.gz") as archive:
                    saved = archive.extractfile("logs/endless.log").read()
        process.kill()
    assert saved == b"begun\n"
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == {"a row": {}}
