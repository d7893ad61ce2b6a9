"""The demo: what it writes and prints, and that its words follow from the numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import blockhess
from blockhess.analysis.selection import weights_only
from blockhess.cli import demo
from blockhess.cli.main import main

STEMS = ("gpt", "resnet")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    assert main(["demo", "--quick", "--out", str(folder)]) == 0
    return folder


def test_quick_writes_everything_it_names(quick: Path) -> None:
    expected = {f"{stem}.npz" for stem in STEMS} | {"comparison.txt", "comparison.png"}
    assert {path.name for path in quick.iterdir()} == expected


def test_every_parameter_is_a_block(quick: Path) -> None:
    for stem, subject in zip(STEMS, demo.subjects(demo.QUICK, seed=0)):
        spectra = blockhess.load(quick / f"{stem}.npz")
        assert spectra.names == tuple(name for name, _ in subject.model.named_parameters())
        assert spectra.provenance["batchnorm"] == ("none" if stem == "gpt" else subject.batchnorm)


def test_weights_only_leaves_out_norms_and_biases(quick: Path) -> None:
    spectra = blockhess.load(quick / "resnet.npz")
    names = weights_only(spectra)
    assert names == ("conv1.weight", "layers.0.conv1.weight", "layers.0.conv2.weight", "fc.weight")
    low, high = spectra.eigenvalue_range()
    sizes = [max(-float(low[i]), float(high[i])) for i in spectra.rows(names)]
    spread = spectra.curvature_spread()
    assert spread is not None and spread.weights and spread.blocks == names
    assert (spread.smallest, spread.largest) == (min(sizes), max(sizes))


def test_output_is_one_screen(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = demo.run(tmp_path, quick=True)
    printed = capsys.readouterr().out
    text = (quick / "comparison.txt").read_text()
    assert text in printed and len(printed.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 120
    for name in ("GPT", "ResNet"):
        js0, spread = found[name]["js0"], found[name]["curvature_spread"]
        for value in (js0["value"], *js0["interval"][:2], spread["value"]):
            assert f"{value:.2f}" in text
    assert "1 probe" not in text and len(found["reading"]) == 3


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
    assert not (tmp_path / "resnet.npz").exists()


@pytest.mark.parametrize(
    "gpt, resnet, winner",
    [
        ((0.5, 0.6, 0.95), (0.3, 0.4, 0.95), "GPT"),
        ((0.3, 0.4, 0.95), (0.5, 0.6, 0.95), "ResNet"),
        ((0.3, 0.5, 0.95), (0.4, 0.6, 0.95), ""),
        (None, (0.4, 0.6, 0.95), ""),
    ],
)
def test_order_follows_the_intervals(gpt: demo.Interval, resnet: demo.Interval, winner: str) -> None:
    assert demo.order(gpt, resnet) == winner


def test_reading_follows_the_order() -> None:
    assert "which is the paper's reason" in demo.reading("GPT", "GPT")[0]
    assert "against the paper's reading" in demo.reading("ResNet", "GPT")[0]
    assert "not apart" in demo.reading("", "")[0]
    assert "The whole spectra of the ResNet's blocks" in demo.reading("GPT", "ResNet")[1]
    assert "does not order" in demo.reading("", "")[1]


def test_one_probe_has_no_interval(tmp_path: Path) -> None:
    found = demo.run(tmp_path, quick=True, num_probes=1)
    assert found["GPT"]["curvature_spread"]["interval"] is None and "not apart" in found["reading"][0]
