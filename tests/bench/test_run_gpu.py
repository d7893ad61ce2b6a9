"""bench/run_gpu.sh, as far as it runs without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench.gpu import __main__ as gpu
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
        assert {"logs/build.log", "logs/tests.log", "logs/rows.log", "logs/nano.json"} <= set(archive.getnames())
        said = {
            name: archive.extractfile(f"logs/{name}.log").read().decode() for name in ("memcheck", "racecheck", "ncu")
        }
    assert "--tool memcheck --error-exitcode 86" in said["memcheck"] and "all ops on cpu equal" in said["racecheck"]
    assert "--launch-count 4" in said["ncu"] and "bench.gpu.profile_case" in said["ncu"]


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


@pytest.mark.parametrize("tool", ["compute-sanitizer", "ncu"])
def test_stubs_know_the_options_of_the_tools(tool):
    options = {"compute-sanitizer": ["--tool", "memcheck"], "ncu": ["--section", "Occupancy"]}[tool]
    done = subprocess.run([gpu.STUBS / tool, *options, "echo", "--run"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("\n--run\n")
    wrong = subprocess.run([gpu.STUBS / tool, "--sections", "Occupancy", "echo"], capture_output=True, text=True)
    assert wrong.returncode == 64 and "unknown option --sections" in wrong.stderr


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["out", "--reuse-build"], ["out", "--wrong"]])
def test_invalid_arguments(arguments):
    done = script(*arguments)
    assert done.returncode == 2 and "bench/run_gpu.sh OUT_DIR" in done.stderr


def test_steps_end_at_their_limit_and_later_ones_run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS", {"slow": (2, 0), "later": (30, 0)})
    driver = Driver(tmp_path, True, "tiny", 0.1, {"WORD": "said"}, logs=tmp_path / "logs")
    begin = driver.until
    driver.allow("slow")
    assert not driver.run("slow", ["bash", "-c", "sleep 60 & echo $! && wait"])
    driver.allow("later")
    assert driver.until == pytest.approx(begin + 3.2)  # what an early step took is not taken from a later one
    assert not driver.run("absent", ["no-such-program"])
    assert driver.run("fine", ["bash", "-c", "echo $WORD"])
    outcomes = [step["outcome"] for step in json.loads((tmp_path / "results.json").read_text())["steps"].values()]
    assert outcomes[0].startswith("FAILED (exceeded") and outcomes[1].startswith("FAILED (127)")
    assert outcomes[2] == "ok" and (tmp_path / "logs/fine.log").read_text() == "said\n"
    assert not runs(int((tmp_path / "logs/slow.log").read_text()))


def test_limits_sum_to_the_time_of_a_run():
    assert [sum(column) for column in zip(*gpu.SECONDS.values())] == [550, 180]


def runs(process: int) -> bool:
    """Return whether a process runs, after at most 10 s in which it may end."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except FileNotFoundError:
            return False
        time.sleep(0.05)
    return True


UNFINISHED = """
import sys, time
from pathlib import Path
from bench.gpu import __main__ as gpu
out = Path(sys.argv[1])
gpu.SAVED_EVERY = 0.1
driver = gpu.Driver(out, True, "tiny", 1, {}, time.monotonic() + 900, out / "logs")
(out / "logs/nano.json").write_text('{"rows": {"a row": {}}}')
driver.run("endless", ["bash", "-c", "sleep 90 & echo $!; wait"])  # longer than the test waits
"""


def test_a_run_that_is_killed_in_a_step_has_saved_rows_and_logs(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    with subprocess.Popen([sys.executable, "-c", UNFINISHED, str(tmp_path)], env=env) as process:
        end, saved = time.monotonic() + 45, b""
        while not saved.endswith(b"\n") and time.monotonic() < end:
            time.sleep(0.1)
            if (tmp_path / "logs.tar.gz").exists():
                with tarfile.open(tmp_path / "logs.tar.gz") as archive:
                    saved = archive.extractfile("logs/endless.log").read()
        process.kill()
    assert not runs(int(saved))
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == {"a row": {}}
