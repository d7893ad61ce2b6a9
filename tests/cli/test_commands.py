"""Runs that are resumed, and commands of other packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

import blockhess
from blockhess.cli import commands
from blockhess.cli.job_file import load
from blockhess.cli.main import main
from tests import ROOT

JOB = """
from blockhess.cli.demo import QUICK, subjects

def make():
    return subjects(QUICK, seed=0)[0].arguments(num_probes=1, num_steps=2) | {"engine": "autograd"}

def longer():
    return make() | {"num_steps": 3}
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("job.py").write_text(JOB)
    return tmp_path / "run"


def test_run_and_resume(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "job.py:make", "--out", str(out)]) == 0
    assert str(out / "spectra.npz") in capsys.readouterr().out
    assert main(["run", "job.py:make", "--out", str(out)]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main(["run", "job.py:make", "--out", str(out), "--resume"]) == 0
    expected = blockhess.spectrum(**load("job.py:make"), progress=False)
    assert torch.equal(blockhess.load(out / "spectra.npz").quadrature.nodes, expected.quadrature.nodes)
    assert main(["run", "job.py:longer", "--out", str(out), "--resume"]) == 2
    assert re.search(r"^num_steps +3 +2$", capsys.readouterr().err, re.MULTILINE)


# ---- commands of other packages

PACKAGES = {
    "broken": "import no_such_dependency\n",
    "invalid": "def (:\n",
    "function": "def app(): pass\n",
    "lacking": "",
    "good": "import typer\napp = typer.Typer()\n\n@app.command()\ndef hello():\n    print('good day')\n",
}


def installed(folder: Path, *names: str) -> dict[str, str]:
    """Install packages with one entry point each, and return an environment in which they are found."""
    for name in names:
        (folder / f"{name}.py").write_text(PACKAGES[name])
        metadata = folder / f"{name}-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[blockhess.commands]\n{name} = {name}:app\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}


def blockhess_command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blockhess.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_broken_commands_of_other_packages_are_skipped(tmp_path: Path) -> None:
    environment = installed(tmp_path, *PACKAGES)
    done = blockhess_command(environment, "--help")
    assert done.returncode == 0 and "doctor" in done.stdout and "good" in done.stdout
    lines = sorted(line for line in done.stderr.splitlines())
    assert [re.findall(r"^blockhess: skipped the commands '(\w+)': cannot load '\1:app'", line) for line in lines] == [
        ["broken"], ["function"], ["invalid"], ["lacking"]
    ]  # fmt: skip
    assert "ModuleNotFoundError: No module named 'no_such_dependency'" in lines[0]
    assert "must be a typer.Typer, got function" in lines[1]
    assert blockhess_command(environment, "good", "hello").stdout == "good day\n"
    done = blockhess_command(environment | {"BLOCKHESS_TRACEBACK": "1"}, "--help")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_paper_is_found_in_the_source_tree(tmp_path: Path) -> None:
    """With the metadata that a build leaves beside the package, where nothing is installed."""
    (tmp_path / "blockhess.egg-info").mkdir()
    (tmp_path / "blockhess.egg-info/PKG-INFO").write_text("Metadata-Version: 2.1\nName: blockhess\nVersion: 0.1.0\n")
    (declared,) = re.findall(r'^(paper = )"(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    (tmp_path / "blockhess.egg-info/entry_points.txt").write_text(f"[blockhess.commands]\n{''.join(declared)}\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = blockhess_command(environment, "paper", "--help")
    assert done.returncode == 0 and "fig3" in done.stdout and done.stderr == ""


def test_names_and_errors_are_printed_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Entry:
        name, value = "x\x1b[2J", "a:b"

        def load(self) -> None:
            raise RuntimeError("two\nlines")

    monkeypatch.setattr(commands, "entry_points", lambda group: [Entry()])
    commands.add_entry_points(typer.Typer())
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "\x1b" not in told and "RuntimeError: two lines" in told
