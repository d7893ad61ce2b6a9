"""What every command does alike: JSON, completion, exit codes as documented, and poor terminals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import blockhess
from blockhess.cli import commands
from blockhess.cli.job_file import load
from blockhess.cli.main import main
from blockhess.hvp import CHOICES
from blockhess.report import text
from blockhess.run.storage import directory
from blockhess_paper import commands as paper
from blockhess_paper.datasets.image_files import image_folder
from blockhess_paper.datasets.text_files import BytePairs
from blockhess_paper.networks import networks
from tests import ROOT
from tests.helpers.spectra_cases import make_spectra


def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands, with the words that call them."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield words, command
        return
    for name, each in inner.items():
        yield from leaves(each, (*words, name))


COMMANDS = dict(leaves(typer.main.get_command(commands.app)))

JOB = """
import torch

def good():
    torch.manual_seed(0)
    data = torch.randn(4, 3), torch.randn(4, 1)
    return {"model": torch.nn.Linear(3, 1), "data": data, "loss_fn": torch.nn.MSELoss(), "num_probes": 1, "seed": 0}

def other_sizes():
    return good() | {"data": (torch.randn(4, 5), torch.randn(4, 1))}

def unknown():
    return {}["model"]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with jobs, and a result whose blocks have names beyond ASCII."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    names = ["первый.weight", "second.weight"]
    nodes, weights = [[[1.0, 5.0], [-2.0, 3.0]]], [[[0.5, 0.5], [0.2, 0.8]]]
    make_spectra(nodes, weights, dims=[2, 2], names=names).save("result.npz")
    return tmp_path


# ---- JSON


def test_every_command_takes_json() -> None:
    assert len(COMMANDS) > 20
    for words, command in COMMANDS.items():
        assert any("--json" in parameter.opts for parameter in command.params), words


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_of_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version", "--json"], ["--json", "--version"]):
        assert main(arguments) == 0
        assert json.loads(capsys.readouterr().out) == {"version": blockhess.__version__}
    assert main(["--json", "show", "x"]) == 2
    assert capsys.readouterr().err == "blockhess: --json must follow the command, as in: blockhess doctor --json\n"


def test_json_of_a_run_and_of_what_is_made_of_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = as_json(capsys, "run", "job.py:good")
    assert told["written"] == "run/spectra.npz" and [b["block"] for b in told["blocks"]] == ["weight", "bias"]
    told = as_json(capsys, "status", "run", "--save", "so_far.npz")
    assert told["finished"] and told["prepared"] and told["hvps"] == told["most"] > 0 and told["seconds_left"] == 0
    blockhess.spectrum(**load("job.py:good") | {"first_probe": 1}).save("later.npz")
    told = as_json(capsys, "merge", "run", "later.npz", "--out", "joined.npz")
    assert told["written"] == "joined.npz" and "2 gaussian probes" in told["summary"]
    told = as_json(capsys, "report", "run", "joined.npz", "--out", "page.html")
    assert told["written"] == "page.html" and len(told["results"]) == 2 and (here / "page.html").exists()


def test_json_of_the_paper(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [told] = as_json(capsys, "paper", "prop2", "--quick", "--out", "paper")
    assert told == json.loads((here / "paper/prop2.json").read_text()) and told["claims"]


def test_json_of_the_demo(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(out: Path, **options: Any) -> dict[str, Any]:
        print("text for people")
        return {"out": str(out), **options}

    monkeypatch.setattr("blockhess.cli.demo.run", run)
    told = as_json(capsys, "demo", "--quick", "--tol", "0.05", "--tol-sigma", "0.1")
    assert (told["quick"], told["tol"], told["tol_sigma"], told["num_probes"]) == (True, 0.05, 0.1, None)


# ---- completion


def completed(line: str, prelude: str = "") -> list[str]:
    """What the shell is offered for the last word of a line."""
    code = f"{prelude}; from blockhess.cli.main import main; main()"
    asked = {"_BLOCKHESS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_completion_of_commands_and_values_needs_no_torch() -> None:
    without = "import sys; sys.modules['torch'] = None"
    assert completed("blockhess s", without) == ["status", "show"]
    assert set(completed("blockhess paper fig1", without)) == {"fig1", "fig10", "fig11"}
    assert completed("blockhess show --sort l", without) == ["lambda_min", "lambda_max"]
    assert completed("blockhess plan --engine ", without) == list(commands.ENGINES)
    assert completed("blockhess paper table1 --model gpt2", without) == ["gpt2-nano", "gpt2"]


def test_values_that_are_offered_are_those_that_there_are() -> None:
    assert set(commands.ENGINES) == set(CHOICES)
    assert tuple(text.SORT_KEYS) == commands.SORT_KEYS
    assert tuple(networks.NETWORKS) == paper.NETWORKS and paper.SCALES == networks.SCALES


def test_bash_takes_the_script() -> None:
    code = "from blockhess.cli.main import main; main(['--show-completion'])"
    shell = f'eval "$({sys.executable} -c "{code}")"; complete -p blockhess'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("_blockhess_completion blockhess\n")


# ---- exit codes and failures


@pytest.mark.parametrize(
    ("arguments", "helps"),
    [("show --sorrt dim", "show"), ("paper fig1 --foo", "paper fig1"), ("status", "status"), ("paint", "")],
)
def test_wrong_options_name_the_help_of_their_command(
    arguments: str, helps: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.split()) == 2
    assert capsys.readouterr().err.endswith(f"; see: {' '.join(['blockhess', *helps.split()])} --help\n")


def test_exit_codes_are_documented() -> None:
    page = (ROOT / "docs/reference/commands.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", page, flags=re.MULTILINE)
    assert {int(code): text.replace("`", "") for code, text in rows} == commands.EXIT_CODES


def test_a_model_that_fails_is_told_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["run", "job.py:other_sizes"], ["plan", "job.py:other_sizes"]):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("blockhess: spectrum: loss_fn(model(inputs), targets) must run on the data, got ")
        assert "the model (Linear) for batch 0: mat1 and mat2 shapes cannot be multiplied (4x5 and 3x1)" in told
        assert told.count("\n") == 1
    monkeypatch.setenv("BLOCKHESS_TRACEBACK", "1")
    with pytest.raises(ValueError, match="mat1 and mat2"):
        main(["run", "job.py:other_sizes"])


def test_other_errors_keep_their_traceback(here: Path) -> None:
    command = [sys.executable, "-m", "blockhess.cli.main", "run", "job.py:unknown"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and 'return {}["model"]' in done.stderr


@pytest.mark.parametrize(
    ("missing", "arguments", "advice"),
    [
        ("matplotlib", ["show", "result.npz", "--plot", "a.png"], 'pip install "blockhess[plot]"'),
        ("matplotlib", ["paper", "fig6", "--quick"], 'pip install "blockhess[cli]"'),
        ("transformers", ["paper", "table1", "--quick", "--model", "hf:gpt2"], "pip install transformers"),
        ("timm", ["paper", "table1", "--quick", "--model", "timm:vit_base_patch16_224"], "pip install timm"),
        ("torchvision", ["paper", "table1", "--quick", "--model", "torchvision:vgg16"], "pip install torchvision"),
    ],
)
def test_what_is_missing_is_told_with_what_to_type(
    missing: str,
    arguments: list[str],
    advice: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.setitem(sys.modules, module, None)  # loaded by another test
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.endswith(f"type: {advice}\n") and told.count("\n") == 1


def test_readers_of_files_tell_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing, read in (("PIL", lambda: image_folder(".", 1)), ("tokenizers", lambda: BytePairs(["a"], 256))):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(ImportError, match=r'pip install "blockhess\[data\]"'):
            read()


# ---- runs that are not finished


def test_a_run_that_is_being_prepared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with directory.opened("run"):
        assert main(["status", "run"]) == 0
        told = capsys.readouterr().out
        assert f"running (process {os.getpid()}" in told and "preparing model" in told
        record = as_json(capsys, "status", "run")
        assert record["prepared"] is False and record["age"] is None and record["seconds_left"] is None
    assert main(["status", "run"]) == 2  # nobody works there any more
    assert main(["status", "nowhere"]) == 2


@pytest.mark.parametrize("command", ["show", "report", "status"])
def test_a_folder_without_a_run(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "folder").mkdir()
    for _ in range(2):
        assert main([command, "folder"]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"blockhess: {command}: ") and "folder" in told and told.count("\n") == 1
        assert ("blockhess run JOB --out folder" if command == "status" else f"{command} folder/NAME.npz") in told
        (here / "folder/notes.txt").touch()


def test_show_and_report_of_a_run_that_is_not_finished(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "job.py:good"]) == 0
    whole = blockhess.load("run/spectra.npz")
    os.remove("run/spectra.npz")  # as if it had been killed before the last file
    capsys.readouterr()
    assert main(["show", "run"]) == 0 and main(["report", "run"]) == 0
    assert "of an unfinished run, what it has so far" in capsys.readouterr().out
    assert "of an unfinished run, what it has so far" in (here / "run.html").read_text()
    assert "unfinished" not in repr(whole)


# ---- terminals that show little


def shown_in(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "blockhess.cli.main", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True)


@pytest.mark.slow
def test_names_beyond_the_terminals_characters(here: Path) -> None:
    done = shown_in({"PYTHONIOENCODING": "ascii"}, "show", "result.npz")
    assert (done.returncode, done.stderr) == (0, b"") and rb"\u043f\u0435\u0440\u0432\u044b\u0439.weight" in done.stdout
    done = shown_in({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "show", "первый.npz")
    assert done.returncode == 2 and done.stderr.isascii() and done.stderr.count(b"\n") == 1


def test_help_and_texts_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    for words in [(), ("paper",), *COMMANDS]:
        assert main([*words, "--help"]) == 0
        told = capsys.readouterr().out
        assert told.isascii() and "\x1b" not in told, words


@pytest.mark.slow
def test_pictures_need_no_display(here: Path) -> None:
    nowhere = {"MPLBACKEND": "tkagg", "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    done = shown_in(nowhere, "show", "result.npz", "--plot", "picture.png")
    assert (done.returncode, done.stderr) == (0, b"") and (here / "picture.png").stat().st_size > 5_000
