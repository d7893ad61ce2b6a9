"""`blockhess paper`: every experiment in its quick size, what it writes, and that verdicts follow from numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

import blockhess
from blockhess.cli import commands
from blockhess.cli.demo import one_thread
from blockhess.cli.main import main
from blockhess_paper.commands import EXPERIMENTS
from blockhess_paper.commands import app as paper_app
from blockhess_paper.results import NOT_REPRODUCED, PARTLY, REPRODUCED, Claim, Result
from blockhess_paper.theory.block_spectra import GPT_BLOCKS, RESNET_BLOCKS, gpt_spectra, resnet_spectra
from blockhess_paper.theory.figure8 import _compare

DRAWN = {"fig2", "fig5", "fig6", "fig7", "fig8", "table2", "table3", "prop2"}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper") / "new" / "folder"
    with one_thread():
        assert main(["paper", "all-theory", "--quick", "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_all_theory_writes_every_experiment(everything: Path) -> None:
    names = {path.name for path in everything.iterdir()}
    assert {f"{name}.json" for name in EXPERIMENTS} <= names
    assert {f"{name}.png" for name in DRAWN} == {name for name in names if name.endswith(".png")}
    for name in DRAWN:
        assert (everything / f"{name}.png").stat().st_size > 5_000


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_hold_claims_and_settings(everything: Path, name: str) -> None:
    content = json.loads((everything / f"{name}.json").read_text())
    assert content["name"] == name and content["quick"] is True and content["seconds"] >= 0
    assert content["claims"] and content["settings"] and content["torch"]
    for claim in content["claims"]:
        assert claim["verdict"] in (REPRODUCED, PARTLY, NOT_REPRODUCED)
        assert any(character.isdigit() for character in claim["measured"])
    assert "(reproduced" not in content["text"]


@pytest.mark.slow
def test_arrays_can_be_read(everything: Path) -> None:
    with np.load(everything / "fig8.npz") as arrays:
        assert arrays["case3 GD"].shape == (61, 3)
        assert not np.isnan(arrays["case1 Adam, beta2 = 1"]).any()


def test_one_experiment_prints_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "fig6", "--quick", "--out", str(tmp_path), "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert "REPRODUCED: Section 3.2" in text and str(tmp_path / "fig6.png") in text
    assert json.loads((tmp_path / "fig6.json").read_text())["settings"]["seed"] == 3


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from blockhess.cli.main import main; main(['paper', '--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert all(name in done.stdout for name in (*EXPERIMENTS, "all-theory", "spectra"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paper", "fig5", "--data", "nowhere"], "cannot read"),
        (["paper", "prop2", "--seed", "-1"], "--seed"),
        (["paper", "fig99"], "fig99"),
        (["paper", "prop2", "--out", "/dev/null/x"], "output folder"),
    ],
)
def test_bad_requests(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# These read files, or compute with quadratics of some dozen dimensions in float64.
WITHOUT_DEVICE = {
    *("status", "merge", "show", "report"),
    *("prop1", "theorems", "section33", "prop2", "table2", "fig6", "fig7", "fig8"),
}
COMMANDS = {
    (*before, name): {option for parameter in command.params for option in parameter.opts}
    for before, group in (((), commands.app), (("paper",), paper_app))
    for name, command in typer.main.get_command(group).commands.items()
    if name != "paper"
}


def test_every_command_that_computes_takes_a_device() -> None:
    assert len(COMMANDS) > 25
    assert {words[-1] for words, options in COMMANDS.items() if "--device" not in options} == WITHOUT_DEVICE


@pytest.mark.parametrize(
    "name",
    [words[-1] for words, options in COMMANDS.items() if words[0] == "paper" and {"--out", "--device"} <= options],
)
def test_experiments_compute_on_the_device(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Tensors of the device "meta" have no values, so what ignored the option would succeed.
    command = ["paper", name, "--quick", "--out", str(tmp_path)]
    assert main([*command, "--device", "meta"]) == 2
    assert "meta" in capsys.readouterr().err
    assert main([*command, "--device", "gpu9"]) == 2
    assert "device must be one of this machine's, got 'gpu9'" in capsys.readouterr().err


def test_figure_8_verdicts_follow_from_the_medians() -> None:
    def final(gd: float, adam: float) -> dict[str, list[float]]:
        medians = {"GD": gd, "blockwise GD": -9.0, "Adam, beta2 = 0.999": adam, "Adam, beta2 = 1": adam + 0.1}
        return {name: [value - 1, value, value + 1] for name, value in medians.items()}

    words = [_compare(number, final(-2.0, adam), 1.0).verdict for number in (3, 4) for adam in (-10.0, -3.0, -2.0)]
    assert words == [REPRODUCED, PARTLY, NOT_REPRODUCED, NOT_REPRODUCED, PARTLY, REPRODUCED]


def test_numbers_that_json_lacks_are_written_as_words(tmp_path: Path) -> None:
    result = Result("x", "title", {}, (Claim("a", "b", PARTLY),), numbers={"a": [float("nan"), 1 / 3]})
    assert json.loads(result.write(tmp_path)[0].read_text())["numbers"] == {"a": ["nan", 0.333333]}


def test_shipped_spectra() -> None:
    gpt, resnet = gpt_spectra(), resnet_spectra()
    assert (gpt.names, resnet.names) == (GPT_BLOCKS, RESNET_BLOCKS)
    assert gpt.dims == (76 * 384, 384 * 384, 384 * 384, 4 * 384 * 384)
    assert resnet.dims == (64 * 49, *(64 * 64 * 9,) * 3)
    assert resnet.provenance["batchnorm"] == "eval" and gpt.provenance["num_steps"] == 80


def test_the_spectra_can_be_measured_again(tmp_path: Path) -> None:
    assert main(["paper", "spectra", "--quick", "--out", str(tmp_path)]) == 0
    found = sorted(tmp_path.iterdir())
    assert [path.name for path in found] == ["paper_gpt_nano.npz", "paper_resnet18.npz"]
    assert blockhess.load(found[0]).names == GPT_BLOCKS
