"""The command line: exit codes, one line for every failure, nothing heavy imported for --help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import blockhess
from blockhess.cli.main import main
from tests.helpers.spectra_cases import random_spectra


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail, and return the one line that says why."""
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith("blockhess: ") and told.err.count("\n") == 1
    assert "Traceback" not in told.err
    return told.err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["demo", "--help"], ["show", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert told.out.startswith("Usage: blockhess") and told.err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"blockhess {blockhess.__version__}\n"


def test_help_does_not_import_torch() -> None:
    code = "import sys; from blockhess.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_module_exits_with_the_code() -> None:
    command = [sys.executable, "-m", "blockhess.cli.main", "show", "missing.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "blockhess: load: no such file: missing.npz\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["demo", "--probes", "0"], "num_probes must be at least 1, got 0"),
        (["demo", "--steps", "-3"], "num_steps must be at least 1, got -3"),
        (["demo", "--seed", "-1"], "seed must be at least 0, got -1"),
        (["demo", "--seed", str(10**25)], f"seed must be below 2^63, got {10**25}"),
        (["demo", "--probes", "many"], "--probes"),
        (["demo", "--fast"], "--fast"),
        (["show"], "file"),
        (["paint"], "paint"),
    ],
)
def test_wrong_options(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_is_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def computed(*_: object, **__: object) -> None:
        raise AssertionError("spectrum was called")

    monkeypatch.setattr(blockhess, "spectrum", computed, raising=False)
    (tmp_path / "file").touch()
    assert "output folder" in failure(capsys, "demo", "--quick", "--out", str(tmp_path / "file" / "folder"))


def test_missing_typer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    assert 'pip install "blockhess[cli]"' in failure(capsys, "--help")


def test_missing_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "blockhess[cli]"' in failure(capsys, "demo", "--out", str(tmp_path))


@pytest.mark.parametrize("where", ["blockhess.cli.demo.run", "blockhess.cli.commands.app"])
def test_interrupt(where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    assert main(["demo"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_quiet(closed: str, tmp_path: Path) -> None:
    file = random_spectra().save(tmp_path / "a.npz")
    command = f"{sys.executable} -m blockhess.cli.main show {file} {closed}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_exited_is_no_error(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "blockhess.cli.main", "--version"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("command", ["show", "status"])
def test_paths_are_printed_with_escapes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "\\x1b[2J" in failure(capsys, command, "missing\x1b[2J")
