"""The demo: what it writes and prints, and that its words follow from the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import blockhess
from blockhess.analysis.axes import Axis
from blockhess.analysis.selection import weights_only
from blockhess.cli import demo
from blockhess.cli.demo import Comparison, curvature_verdict, js0_verdict, probe_noise
from blockhess.cli.main import main
from tests.helpers.spectra_cases import make_spectra

STEMS = ("gpt", "resnet_eval", "resnet_batch")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert main(["demo", "--quick", "--out", str(folder)]) == 0
    return folder


def test_quick_writes_everything_it_names(quick: Path) -> None:
    expected = {f"{stem}{end}" for stem in STEMS for end in (".npz", ".txt", "_spectra.png", "_heatmap.png")}
    assert {path.name for path in quick.iterdir()} == expected | {"comparison.txt", "comparison.json"}


def test_every_parameter_is_a_block(quick: Path) -> None:
    for stem, subject in zip(STEMS, demo.subjects(demo.QUICK, seed=0)):
        spectra = blockhess.load(quick / f"{stem}.npz")
        assert spectra.names == tuple(name for name, _ in subject.model.named_parameters())
        assert spectra.provenance["batchnorm"] == ("none" if stem == "gpt" else subject.batchnorm)


def test_weights_only_leaves_out_norms_and_biases(quick: Path) -> None:
    spectra = blockhess.load(quick / "resnet_eval.npz")
    names = weights_only(spectra)
    assert names == ("conv1.weight", "layers.0.conv1.weight", "layers.0.conv2.weight", "fc.weight")
    low, high = spectra.eigenvalue_range()
    sizes = [max(-float(low[i]), float(high[i])) for i in spectra.rows(names)]
    spread = spectra.curvature_spread()
    assert spread is not None and spread.weights and spread.blocks == names
    assert (spread.smallest, spread.largest) == (min(sizes), max(sizes))


def test_texts_hold_tables_and_provenance(quick: Path) -> None:
    for stem in STEMS:
        text = (quick / f"{stem}.txt").read_text()
        for word in ("lambda_min", "trace", "negative", "All blocks: JS0", "Weights only", "sigma", "BatchNorm"):
            assert word in text, word
    numbers = json.loads((quick / "comparison.json").read_text())
    assert [row["batchnorm"] for row in numbers["js0"]] == ["eval"] * 6 + ["batch"] * 6
    assert set(numbers["largest_eigenvalue"]) == set(STEMS)
    text = (quick / "comparison.txt").read_text()
    assert all(f"{row['gpt']:.3f}" in text for row in numbers["js0"])
    assert "more heterogeneous" in text and "The paper's reading" in text and "Before you quote" in text


def test_show_reads_the_demos_results(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(quick / "gpt.npz"), "--sort", "lambda_max"]) == 0
    assert "tok.weight" in capsys.readouterr().out


def test_same_seed_same_models_and_data() -> None:
    torch.manual_seed(1)
    first = demo.subjects(demo.QUICK, seed=3)
    torch.manual_seed(2)
    for one, two in zip(first, demo.subjects(demo.QUICK, seed=3)):
        for a, b in zip(one.model.parameters(), two.model.parameters()):
            assert torch.equal(a, b)
    assert torch.equal(first[0].data[0][0], demo.subjects(demo.QUICK, seed=3)[0].data[0][0])
    assert not torch.equal(first[0].data[0][0], demo.subjects(demo.QUICK, seed=4)[0].data[0][0])


def test_results_before_a_failure_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spectrum = blockhess.spectrum

    def fails_on_the_resnet(model: Any, *arguments: Any, **options: Any) -> blockhess.Spectra:
        if type(model).__name__ == "ResNet":
            raise ValueError("spectrum: broken")
        return spectrum(model, *arguments, **options)

    monkeypatch.setattr(blockhess, "spectrum", fails_on_the_resnet, raising=False)
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert blockhess.load(tmp_path / "gpt.npz").provenance["model"] == "GPT"
    assert not (tmp_path / "resnet_eval.npz").exists()


def test_probe_noise_is_the_distance_of_a_block_to_itself() -> None:
    blocks = ("block0", "block1")
    same = make_spectra([[[0.0], [5.0]]] * 4, [[[1.0], [1.0]]] * 4)
    assert probe_noise(same, 0.1, blocks, Axis()) == 0
    # One of two blocks lies elsewhere for the second half of the probes.
    differ = make_spectra([[[0.0], [5.0]]] * 2 + [[[0.0], [-5.0]]] * 2, [[[1.0], [1.0]]] * 4)
    assert probe_noise(differ, 0.1, blocks, Axis()) == pytest.approx(0.5, abs=1e-9)
    assert math.isnan(probe_noise(make_spectra([[[0.0], [5.0]]], [[[1.0], [1.0]]]), 0.1, blocks, Axis()))


def row(gpt: float, resnet: float, noise: float = 0.1, batchnorm: str = "eval") -> Comparison:
    return Comparison("1%", "all", batchnorm, gpt, noise, resnet, noise)


@pytest.mark.parametrize(
    "comparison, winner",
    [
        (row(0.5, 0.3), "GPT"),
        (row(0.3, 0.5), "ResNet"),
        (row(0.5, 0.45), "unclear"),
        (row(0.45, 0.5), "unclear"),
        (row(0.9, 0.1, noise=math.nan), "unclear"),
        # Noise only raises a JS0: the ResNet's, however large, cannot make the GPT's too small.
        (Comparison("1%", "all", "eval", 0.5, 0.01, 0.45, 0.4), "GPT"),
    ],
)
def test_winner(comparison: Comparison, winner: str) -> None:
    assert comparison.winner == winner


def test_verdict_follows_the_rows() -> None:
    gpt, resnet, unclear = row(0.5, 0.1), row(0.1, 0.5, batchnorm="batch"), row(0.5, 0.5)
    assert "agrees with the paper's reading" in js0_verdict([gpt, unclear])
    assert "(1 of 2 rows)" in js0_verdict([gpt, unclear])
    assert "opposite of what the paper's reading expects" in js0_verdict([resnet, unclear])
    assert "The rows disagree" in js0_verdict([gpt, resnet])
    assert "No row is clear" in js0_verdict([unclear, unclear])
    assert "GPT in 1, ResNet in 0, unclear in 1" in js0_verdict([gpt, unclear, resnet])


def test_curvature_verdict_follows_the_factors() -> None:
    assert "as the paper's reading has it" in curvature_verdict((1e-4, 1.0), [(0.1, 1.0), (0.01, 1.0)])
    assert "too close" in curvature_verdict((1e-4, 1.0), [(0.1, 1.0), (1e-3, 1.0)])
    assert "against the paper" in curvature_verdict((0.5, 1.0), [(0.01, 1.0), (1e-3, 1.0)])
    assert "10,000 in the GPT, 10 and 100 in the ResNet" in curvature_verdict((1e-4, 1.0), [(0.1, 1), (0.01, 1)])
    assert "inf in the GPT" in curvature_verdict((0.0, 1.0), [(0.1, 1.0)])
