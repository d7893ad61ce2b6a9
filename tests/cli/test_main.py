"""The command line: exit codes, one line for every failure, nothing heavy imported for --help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import blockhess
from blockhess.cli.main import main
from tests.helpers.spectra_cases import make_spectra


@pytest.fixture
def result_file(tmp_path: Path) -> Path:
    nodes = [[[1.0, 5.0, 5.0], [-2.0, 3.0, 9.0]]]
    weights = [[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]]
    names = ["first.weight", "second.weight"]
    return make_spectra(nodes, weights, dims=[2, 3], steps=[[2, 3]], names=names).save(tmp_path / "result.npz")


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


def test_module_exits_with_the_code() -> None:
    command = [sys.executable, "-m", "blockhess.cli.main", "show", "missing.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "blockhess: load: no such file: missing.npz\n"


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
    assert told["blocks"][0]["trace_error"] is None  # unknown with one probe


JOB = """
import torch

def make():
    data = torch.ones(4, 3), torch.zeros(4, 1)
    return {"model": torch.nn.Linear(3, 1), "data": data, "loss_fn": torch.nn.MSELoss(), "num_probes": 1}
"""


def test_plan_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.py").write_text(JOB)
    assert main(["plan", f"{tmp_path / 'job.py'}:make", "--json", "--engine", "autograd"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["engine"], told["hvps"], told["exact"]) == ("autograd", 3 + 1, [False, False])
    assert told["passes"] == [{"first_probe": 0, "num_probes": 1, "blocks": [0, 1]}]


def test_show_of_one_block_has_no_js0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_spectra([[[1.0, 2.0]]], [[[0.5, 0.5]]], names=["full"]).save(tmp_path / "full.npz")
    assert main(["show", str(path)]) == 0
    assert "JS0" not in capsys.readouterr().out


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


def test_unknown_sort(result_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "sort must be one of order, name" in failure(capsys, "show", str(result_file), "--sort", "colour")


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
