"""Every command: what it prints and writes; runs that are resumed; commands of other packages."""

from __future__ import annotations

import json
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
from tests.cli.test_main import failure
from tests.helpers.spectra_cases import make_spectra

JOB = """
import torch

def make():
    torch.manual_seed(0)
    data = torch.randn(4, 3), torch.randn(4, 1)
    model, loss_fn = torch.nn.Linear(3, 1), torch.nn.MSELoss()
    return {"model": model, "data": data, "loss_fn": loss_fn, "num_probes": 1, "num_steps": 2, "engine": "autograd"}

def longer():
    return make() | {"num_steps": 3}
"""


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("job.py").write_text(JOB)
    return tmp_path / "run"


def test_paths_are_escaped_in_all_texts(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = out.with_name("a\x1b[31m\nb")
    file = str(out / "spectra.npz")

    def told(*command: str) -> str:
        main(command)
        return "".join(capsys.readouterr())

    texts = [told("run", "job.py:make", "--out", str(out)), told("run", "job.py:longer", "--out", str(out), "--resume")]
    texts += [told("run", "job.py:make", "--out", str(out)), told("report", file), told("merge", file, "--out", file)]
    os.remove(file)
    for part in (out / "parts").iterdir():
        part.write_text("damaged")
    with pytest.warns(UserWarning, match=r"a\\x1b\[31m\\nb/parts/00000"):
        texts.append(told("status", str(out)))
    for text in texts:
        assert "\x1b" not in text and "\\x1b[31m" in text


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


def test_plan_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.py").write_text(JOB)
    assert main(["plan", f"{tmp_path / 'job.py'}:longer", "--json", "--engine", "autograd"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["engine"], told["hvps"], told["exact"]) == ("autograd", 3 + 1, [False, False])
    assert told["passes"] == [{"first_probe": 0, "num_probes": 1, "blocks": [0, 1]}]


# ---- show


@pytest.fixture
def result_file(tmp_path: Path) -> Path:
    nodes = [[[1.0, 5.0, 5.0], [-2.0, 3.0, 9.0]]]
    weights = [[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]]
    names = ["first.weight", "second.weight"]
    return make_spectra(nodes, weights, dims=[2, 3], steps=[[2, 3]], names=names).save(tmp_path / "result.npz")


def test_show_prints_table_and_js0(result_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(result_file)]) == 0
    text = capsys.readouterr().out
    assert "first.weight" in text and "second.weight" in text
    assert "All blocks: JS0 = " in text and "sigma" in text


@pytest.mark.parametrize("sort, first", [("order", "first"), ("dim", "second"), ("lambda_max", "second")])
def test_show_sorts(sort: str, first: str, result_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(result_file), "--sort", sort]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(".")[0] for line in lines if line.startswith(("first.", "second."))]
    assert rows[0] == first


def test_show_draws(result_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "spectra.png"
    assert main(["show", str(result_file), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out


def test_show_as_json(result_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(result_file), "--json", "--sort", "lambda_max"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    spectra = blockhess.load(result_file)
    assert told["summary"] == repr(spectra) and told["js0"]["value"] == float(spectra.js0())
    assert told["js0"]["sigma"] == spectra.js0().sigma and told["js0_weights_only"] is None
    assert [b["block"] for b in told["blocks"]] == ["second.weight", "first.weight"]
    assert told["blocks"][0]["lambda_max"] == 9.0
    assert told["blocks"][0]["trace_upper"] is None  # unknown with one probe


def test_show_of_one_block_has_no_js0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_spectra([[[1.0, 2.0]]], [[[0.5, 0.5]]], names=["full"]).save(tmp_path / "full.npz")
    assert main(["show", str(path)]) == 0
    assert "JS0" not in capsys.readouterr().out


def test_unknown_sort(result_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "sort must be one of order, name" in failure(capsys, "show", str(result_file), "--sort", "color")


def test_wrong_picture_format(result_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ".png" in failure(capsys, "show", str(result_file), "--plot", str(tmp_path / "picture.doc"))


@pytest.mark.parametrize("content", [b"", b"no zip file", None])
def test_corrupt_file(
    content: bytes | None, result_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "corrupt.npz"
    whole = result_file.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert str(path) in failure(capsys, "show", str(path))


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
