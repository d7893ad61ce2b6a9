"""Figures 1, 10 and 11 at the paper's size, on tiny networks and tiny folders: the whole path, interrupted and not."""

from __future__ import annotations

import json
import os
import re
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import blockhess
from blockhess.cli.demo import one_thread
from blockhess.cli.main import main
from blockhess.hvp.operator import BlockOperator
from blockhess.models import GPTConfig, ResNetConfig
from blockhess.run.storage import checkpoint
from blockhess.run.storage.signals import Interrupted
from blockhess_paper import experiments
from blockhess_paper.models import CONFIGS, BERTConfig, VGGConfig, ViTConfig
from blockhess_paper.networks import initial_spectra, networks, sources
from blockhess_paper.networks.initial_spectra import Effort, measure_once
from blockhess_paper.networks.networks import NETWORKS, Network, Selection
from blockhess_paper.results import NOT_REPRODUCED, PARTLY, REPRODUCED
from blockhess_paper.training import SavedState, calibrate, figure1, recipes, train
from blockhess_paper.training.recipes import GRID, RECIPES, Recipe, trainees
from blockhess_paper.training.training_runs import load_or_train
from tests.paper.test_datasets import corpus, image

SIZES = {
    "resnet18": ResNetConfig(2, (1, 1), num_classes=3),
    "vgg16": VGGConfig(2, (1, 1), hidden=4, pooled=2, num_classes=3),
    "vit-base": ViTConfig(32, 16, depth=1, num_heads=2, width=8, num_classes=3),
    "bert": BERTConfig(300, context=16, num_layers=1, num_heads=2, width=8),
    "gpt2-nano": GPTConfig(76, context=8, num_layers=1, num_heads=2, width=8, fused_qkv=True),
    "gpt2": GPTConfig(40, context=8, num_layers=1, num_heads=2, width=8),
}
CNN = Recipe(4, 2, {"SGD": (0.01,), "AdamW": (1e-3,)}, "thirds", epochs=2)
TRANSFORMER = Recipe(4, 3, {"SGD": (1e-3, 1e-2), "AdamW": (1e-3,)}, "cosine", 4, warmup=1, clip=1.0, beta2=0.95)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The paper's networks, batches and recipes, narrowed; nothing else is changed."""
    for name, config in SIZES.items():
        monkeypatch.setitem(CONFIGS, name, (CONFIGS[name][0], config))
        monkeypatch.setitem(RECIPES, name, TRANSFORMER if NETWORKS[name][2] else CNN)
    monkeypatch.setattr(sources, "IMAGE_SIDE", 32)
    monkeypatch.setattr(networks, "IMAGES", 4)
    monkeypatch.setattr(networks, "IMAGES_AT_ONCE", 3)
    monkeypatch.setattr(networks, "TOKENS", {"bert": 64, "gpt2-nano": 24, "gpt2": 24})
    monkeypatch.setattr(networks, "TOKENS_AT_ONCE", 16)
    monkeypatch.setitem(initial_spectra.EFFORTS, "paper", Effort(2, 4))
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the layout of the paper's data."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "imagenet").mkdir()
    for number in range(9):
        shade = (25 * number, 255 - 25 * number, 40)
        image(folder / "imagenet" / f"class{number % 3}" / f"{number}.png", (40, 36), shade)
    (folder / "cornell").mkdir()
    corpus(folder / "cornell")
    (folder / "openwebtext").mkdir()
    (np.arange(500) % 40).astype(np.uint16).tofile(folder / "openwebtext" / "train.bin")
    return folder


def content(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


EXPECTED = {
    "fig1": {"vgg16", "resnet18", "gpt2", "gpt2-nano", "vit-base"},
    "fig10": {"resnet18", "vgg16"},
    "fig11": {"vit-base", "bert", "gpt2-nano", "gpt2"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_whole_path_runs_and_is_not_run_twice(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(figure1, "SHARES", (0.0, 1.0))  # pictures of many panels take long
    arguments = ["paper", name, "--scale", "paper", "--data", str(data), "--out", str(tmp_path)]
    assert main(arguments) == 0
    found = content(tmp_path, name)
    assert found["claims"] and all(c["verdict"] in (REPRODUCED, PARTLY, NOT_REPRODUCED) for c in found["claims"])
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    assert set(found["settings"]["recipes"]) == EXPECTED[name]
    # Two epochs of the nine images in batches of four, or the recipe's own steps.
    assert set(found["settings"]["num_steps"].values() if name == "fig1" else [found["settings"]["num_steps"]]) == {4}
    if name != "fig1":
        assert set(found["numbers"]["rates"]) == EXPECTED[name]
        with np.load(tmp_path / f"{name}.npz") as arrays:
            assert all(np.isfinite(arrays[key]).all() and arrays[key].shape == (1, 4) for key in arrays)
    assert not [*tmp_path.rglob("*.state*")] and not [p for p in tmp_path.rglob("run.json")]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("done before")

    for owner, work in ((figure1, "train"), (recipes.Stream, "__getitem__"), (blockhess, "spectrum")):
        monkeypatch.setattr(owner, work, refuse)
    monkeypatch.setattr(figure1, "_draw", lambda *_: None)
    assert main(arguments) == 0
    assert content(tmp_path, name)["numbers"] == found["numbers"]


class Stop(Exception):
    """Ends a run, as a crash would."""


@pytest.mark.parametrize(("name", "optimizer"), [("resnet18", "SGD"), ("vit-base", "AdamW"), ("gpt2", "AdamW")])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    name: str, optimizer: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))
    made = trainees([name], Selection(scale="paper", data=data), quick=False)[name]
    whole = load_or_train(tmp_path / "whole", name, optimizer, 0.01, 0, made.settings(0), made)

    drawn: list[int] = []
    draw = recipes.Stream.__getitem__
    monkeypatch.setattr(recipes.Stream, "__getitem__", lambda self, step: drawn.append(step) or draw(self, step))
    after_step, saves = SavedState.after_step, Counter[str]()

    def stopped(self: SavedState, *state: Any) -> None:
        after_step(self, *state)
        saves["made"] += 1
        if saves["made"] == 2:
            raise Stop

    monkeypatch.setattr(SavedState, "after_step", stopped)
    with pytest.raises(Stop):
        load_or_train(tmp_path / "halves", name, optimizer, 0.01, 0, made.settings(0), made)
    assert drawn[-2:] == [0, 1]
    del drawn[:]
    again = load_or_train(tmp_path / "halves", name, optimizer, 0.01, 0, made.settings(0), made)
    assert drawn == [2, 3]
    assert again == whole and len(whole.losses) == 4 and len(set(whole.losses)) > 1


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2, bias=False)


def regression(sizes: tuple[int, ...] = (6,)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, generator=generator), torch.randn(n, 2, generator=generator)) for n in sizes]


def test_a_signal_saves_the_state_and_a_state_of_another_training_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", float("inf"))  # the signal alone saves, however slow the machine

    def run(name: str, hook: Any = None, rate: float = 0.1) -> tuple[Any, list[int]]:
        seen: list[int] = []
        hooks = {step: lambda _, step=step: seen.append(step) or (hook and hook(step)) for step in range(7)}
        state = SavedState(tmp_path / "state", {"name": name})
        return train(
            linear(), regression(), nn.MSELoss(), optimizer="AdamW", rate=rate, num_steps=6, at_steps=hooks, state=state
        ), seen

    whole, _ = run("other")
    with pytest.raises(Interrupted) as caught:
        run("a", lambda step: step == 3 and os.kill(os.getpid(), signal.SIGTERM))
    assert caught.value.signal == signal.SIGTERM
    resumed, seen = run("a")
    assert seen == [4, 5, 6] and resumed == whole
    with pytest.raises(Interrupted):
        run("a", lambda step: step == 6 and os.kill(os.getpid(), signal.SIGTERM))
    fresh, seen = run("b")
    assert seen == [0, 1, 2, 3, 4, 5, 6] and fresh == whole


def test_a_damaged_state_is_none(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"noise")
    model = linear()
    assert SavedState(tmp_path / "state", {}).load(model, torch.optim.SGD(model.parameters(), lr=0.1)) is None


def test_parts_of_a_batch_have_its_gradient() -> None:
    """Also where the parts are of unlike size, and the loss weights its batches by itself."""

    def path(at_once: int | None, loss: Any = None) -> torch.Tensor:
        model = linear()
        options = {"optimizer": "SGD", "rate": 0.3, "num_steps": 3, "schedule": "constant", "at_once": at_once}
        train(model, regression((5,)), loss or nn.MSELoss(), **options)
        return model.weight.detach()

    for at_once in (1, 2, 3, 5):
        torch.testing.assert_close(path(at_once), path(None), rtol=1e-5, atol=1e-6)

    def unweighted(model: nn.Module, batch: Any) -> Any:
        return nn.functional.mse_loss(model(batch[0]), batch[1]), 1.0

    assert not torch.allclose(path(3, unweighted), path(None), rtol=1e-4)
    torch.testing.assert_close(
        path(2, nn.MSELoss(reduction="sum")), path(None, nn.MSELoss(reduction="sum")), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0"):
        path(0)


def test_losses_of_parts_are_that_of_the_batch() -> None:
    options: dict[str, Any] = {"optimizer": "SGD", "rate": 0.1, "num_steps": 2}
    whole = train(linear(), regression((5,)), nn.MSELoss(), **options)
    parts = train(linear(), regression((5,)), nn.MSELoss(), at_once=2, **options)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5) and parts.initial == pytest.approx(whole.initial)


def test_an_interrupted_spectrum_goes_on_within_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2))
    net = Network("x", model, regression((6, 3)), nn.MSELoss(), "random")
    effort = Effort(2, 6)
    products, limit = Counter[str](), 9
    call = BlockOperator.__call__

    def counted(self: BlockOperator, *arguments: Any, **options: Any) -> Any:
        before = self.hvps
        result = call(self, *arguments, **options)
        products["made"] += self.hvps - before
        if products["made"] > limit:
            raise Stop
        return result

    with monkeypatch.context() as patch:
        patch.setattr(BlockOperator, "__call__", counted)
        limit = 10**9
        whole = measure_once(tmp_path / "whole.npz", net, "none", effort, 0)
        total = products.pop("made")
        limit = total // 2
        with pytest.raises(Stop):
            measure_once(tmp_path / "halves.npz", net, "none", effort, 0)
        first, limit = products.pop("made"), 10**9
        assert not (tmp_path / "halves.npz").exists() and len([*tmp_path.glob("halves-*/run.json")]) == 1
        again = measure_once(tmp_path / "halves.npz", net, "none", effort, 0)
        second = products.pop("made")
    # Only the step in which it was stopped is made twice.
    step = max(total // 6, 1)
    assert second < total and total <= first + second <= total + 2 * step
    assert torch.equal(again.quadrature.nodes, whole.quadrature.nodes)
    assert torch.equal(again.quadrature.weights, whole.quadrature.weights)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["halves.npz", "whole.npz"]


def test_a_spectrum_begun_otherwise_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Network("x", linear(), regression((6,)), nn.MSELoss(), "random")

    def stopped(*_: Any, **__: Any) -> Any:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(BlockOperator, "__call__", stopped)
        with pytest.raises(Stop):
            measure_once(tmp_path / "x.npz", net, "none", Effort(2, 3), 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(ValueError, match=r"threads[\s\S]*or remove .*x-[0-9a-f]{8}"):
            measure_once(tmp_path / "x.npz", net, "none", Effort(2, 3), 0)
    finally:
        torch.set_num_threads(threads)
    # Another seed is another measurement.
    assert measure_once(tmp_path / "x.npz", net, "none", Effort(2, 3), 1).quadrature.seed == 1


def test_a_diverging_rate_is_recorded(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = Recipe(4, 4, {"SGD": (1e30,), "AdamW": (1e30,)}, "constant", epochs=4)
    monkeypatch.setitem(RECIPES, "vgg16", huge)
    arguments = ["--scale", "paper", "--data", str(data), "--out", str(tmp_path)]
    assert main(["paper", "fig10", *arguments]) == 0
    found = content(tmp_path, "fig10")
    assert "VGG16: gap none: AdamW gained nothing" in found["claims"][0]["measured"]
    assert found["claims"][0]["verdict"] != REPRODUCED and found["numbers"]["gaps"]["vgg16"] == []
    assert "SGD 1e+30, AdamW 1e+30" in found["text"] and not re.search(r"\bnan\b", json.dumps(found), re.I)

    monkeypatch.setattr(figure1, "SHARES", (0.0, 1.0))
    assert main(["paper", "fig1", "--model", "vgg16", "--model", "gpt2-nano", *arguments]) == 0
    found = content(tmp_path, "fig1")
    assert found["numbers"]["diverged"] == {"vgg16": found["numbers"]["diverged"]["vgg16"]}
    assert (
        "of 8 steps" in found["text"] and found["claims"] == [] and not re.search(r"\bnan\b", json.dumps(found), re.I)
    )
    monkeypatch.setattr(figure1, "train", None)  # remembered: not trained again
    assert main(["paper", "fig1", "--model", "vgg16", *arguments]) == 0


def test_a_training_that_ends_above_its_start_is_not_measured(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss is finite."""
    monkeypatch.setitem(RECIPES, "resnet18", Recipe(4, 4, {"SGD": (30.0,), "AdamW": (30.0,)}, "constant", epochs=4))
    monkeypatch.setattr(figure1, "measure_once", None)
    arguments = ["--scale", "paper", "--data", str(data), "--out", str(tmp_path)]
    for work in (train, None):  # remembered: not trained again
        monkeypatch.setattr(figure1, "train", work)
        assert main(["paper", "fig1", "--model", "resnet18", *arguments]) == 0
        found = content(tmp_path, "fig1")
        assert found["numbers"]["diverged"] == {"resnet18": "diverged after 8 of 8 steps"}
        assert "not finite, or the last losses are above those at the start" in found["text"]


def test_a_training_whose_end_is_unknown_is_gone_on_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints alone do not tell whether it diverged."""
    panel = figure1.paper_panel(trainees(["gpt2"], Selection(scale="paper", data=data), quick=False)["gpt2"], 0)

    def stopped(*_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(figure1, "write_text", stopped)
        with pytest.raises(Stop):
            figure1.checkpoints(tmp_path, "gpt2", panel, [0, 4], 0)
    paths = figure1.checkpoints(tmp_path, "gpt2", panel, [0, 4], 0)
    assert all(path.exists() for path in paths) and len([*tmp_path.glob("checkpoints/*.json")]) == 1
    monkeypatch.setattr(figure1, "train", None)
    assert figure1.checkpoints(tmp_path, "gpt2", panel, [0, 4], 0) == paths


def test_trainings_on_other_data_or_schedules_are_others(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    (other / "imagenet").mkdir(parents=True)
    for number in range(9):
        image(other / "imagenet" / f"class{number % 3}" / f"{number}.png", (40, 36), (9, 8, 25 * number))
    (other / "openwebtext").mkdir()
    (np.arange(200) % 37).astype(np.uint16).tofile(other / "openwebtext" / "train.bin")
    for name, optimizer in (("resnet18", "SGD"), ("gpt2", "AdamW")):
        found: list[Any] = []
        for folder in (data, other):
            trainee = trainees([name], Selection(scale="paper", data=folder), quick=False)[name]
            panel = figure1.paper_panel(trainee, 0)
            paths = figure1.checkpoints(tmp_path, name, panel, [0, 4], 0)
            losses = load_or_train(tmp_path, name, optimizer, 0.01, 0, trainee.settings(0), trainee).losses
            found.append((paths, losses, trainee.found.description))
        assert found[0][0] != found[1][0] and found[0][1] != found[1][1] and found[0][2] == found[1][2]
    longer = replace(panel, settings=replace(panel.settings, warmup=2))
    assert figure1.checkpoints(tmp_path, name, longer, [0, 4], 0) != paths


COMMANDS = ["fig1", "fig3", "fig4", "table1", "fig10", "fig11"]
IMAGES_OF = {"fig11": "vit-base"}


def refused(command: str, model: str, folder: Path | None, out: Path, capsys: Any, *more: str) -> str:
    arguments = ["paper", command, "--scale", "paper", "--model", model, "--out", str(out), *more]
    assert main([*arguments, *(["--data", str(folder)] if folder else [])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("blockhess: ")
    return error


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_images(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, bad = IMAGES_OF.get(command, "resnet18"), tmp_path / "bad"
    assert "needs --data FOLDER with imagenet/CLASS" in refused(command, model, None, tmp_path, capsys)
    assert "a folder of images for every class" in refused(command, model, bad, tmp_path, capsys)
    (bad / "imagenet").mkdir(parents=True)
    image(bad / "imagenet" / "a" / "0.png", (5, 3), (1, 2, 3))
    error = refused(command, model, bad, tmp_path, capsys)
    assert "must be a batch of 4, got 1" in error or "must hold a batch of 4 images, got 1" in error
    for number in range(1, 5):
        (bad / "imagenet" / "a" / f"{number}.png").write_bytes(b"no image")
    assert "must be an image" in refused(command, model, bad, tmp_path, capsys)
    for number in range(4):
        image(bad / "imagenet" / f"more{number}" / "0.png", (5, 3), (1, 2, 3))
    assert "must hold 3 classes at most, got 5" in refused(command, model, bad, tmp_path, capsys)
    assert "device must be one of this machine's, got 'warp'" in refused(
        command, model, bad, tmp_path, capsys, "--device", "warp"
    )


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"fig10"}))
def test_bad_text(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "openwebtext" / "train.bin"
    assert "uint16 tokens, as nanoGPT's" in refused(command, "gpt2", tmp_path, tmp_path, capsys)
    path.parent.mkdir()
    np.arange(5, dtype=np.uint16).tofile(path)
    assert "context must be below the text's length 5, got 8" in refused(command, "gpt2", tmp_path, tmp_path, capsys)
    np.arange(100, 140, dtype=np.uint16).tofile(path)
    assert "must be below vocab_size = 40, got 1" in refused(command, "gpt2", tmp_path, tmp_path, capsys)


@pytest.mark.parametrize("command", ["fig3", "fig4", "table1", "fig11"])
def test_bad_dialogs(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    assert "must hold movie_lines.txt and movie_conversations.txt" in refused(
        command, "bert", tmp_path, tmp_path, capsys
    )
    (tmp_path / "cornell").mkdir()
    corpus(tmp_path / "cornell", conversations="u0 +++$+++ u1 +++$+++ m0 +++$+++ ['L1']\n")
    assert "pairs must be at least two, got 0" in refused(command, "bert", tmp_path, tmp_path, capsys)


@pytest.mark.parametrize(("command", "model"), [("fig1", "bert"), ("fig10", "gpt2"), ("fig11", "vgg16")])
def test_networks_that_a_figure_does_not_have(command: str, model: str, tmp_path: Path, capsys: Any) -> None:
    assert f"{command}: model must be one of" in refused(command, model, tmp_path, tmp_path, capsys)
    assert main(["paper", command, "--model", "lstm", "--out", str(tmp_path)]) == 2
    assert f"{command}: model must be one of" in capsys.readouterr().err


def test_calibrate_says_why_it_is_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "calibrate", "--scale", "paper", "--out", str(tmp_path)]) == 2
    assert "calibrate: scale must be mini, got 'paper': a rank correlation" in capsys.readouterr().err
    with pytest.raises(ValueError, match="scale must be one of"):
        calibrate.run(folder=tmp_path, selection=Selection(scale="huge"))


def test_a_stream_goes_through_every_image_once_an_epoch(data: Path) -> None:
    found = sources.source("vgg16", data)
    stream = sources.Stream(found, 9, 3, 5, torch.device("cpu"))
    pixels = [tuple(row[0].flatten()[:1].tolist() + row[1].flatten()[:1].tolist()) for step in range(6)
              for row in stream[step][0]]  # fmt: skip
    assert len(set(pixels[:9])) == len(set(pixels[9:])) == 9 and pixels[:9] != pixels[9:]
    assert torch.equal(stream[4][0], found.draw(3, 5, 4)[0]) and not torch.equal(stream[4][0], stream[1][0])
    assert torch.equal(stream[-1][0], stream[8][0]) and len(stream[:2]) == 2
    with pytest.raises(IndexError):
        stream[9]


def test_steps_have_windows_of_their_own(data: Path) -> None:
    found = sources.source("gpt2", data)
    first = [tuple(found.draw(4, seed, step)[0].flatten().tolist()) for seed in (0, 1) for step in (0, 1, 2)]
    assert len(set(first)) == 6


def test_quick_takes_few_samples_and_steps_of_the_real_networks(data: Path) -> None:
    made = trainees(["resnet18", "gpt2"], Selection(scale="paper", data=data), quick=True)
    assert {name: t.settings(3).num_steps for name, t in made.items()} == {"resnet18": 6, "gpt2": 6}
    assert len(made["gpt2"].batches(6, 0)[0][0]) == 4 and made["gpt2"].settings(3).seeds == (3,)


class TestRecipes:
    """The numbers, as the paper and the code bases have them."""

    @pytest.fixture(autouse=True)
    def tiny(self) -> None:
        """Nothing is narrowed."""

    def test_cnns_take_the_papers_rule(self) -> None:
        for name in ("resnet18", "vgg16"):
            rates = RECIPES[name].rates
            assert rates["AdamW"][0] == pytest.approx(rates["SGD"][0] / 100) and RECIPES[name].clip is None
            assert RECIPES[name].epochs * (1_281_167 // RECIPES[name].batch) == 90 * 5_004

    def test_language_models_are_clipped_and_take_nanogpts_batches(self) -> None:
        assert all(RECIPES[name].clip == 1.0 for name in ("bert", "gpt2-nano", "gpt2"))
        assert RECIPES["gpt2"].batch * 1024 == 491_520 and RECIPES["gpt2-nano"].batch * 256 == 16_384
        assert all(RECIPES[name].rates["SGD"] == GRID for name in ("vit-base", "bert", "gpt2-nano", "gpt2"))

    def test_batchnorm_sees_the_whole_batch(self) -> None:
        assert RECIPES["resnet18"].at_once == RECIPES["resnet18"].batch
        assert all(recipe.batch % recipe.at_once == 0 for recipe in RECIPES.values())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes_of_interrupted_commands(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise Interrupted(number)

    monkeypatch.setattr(experiments, "run_experiments", interrupted)
    assert main(["paper", "fig1", "--out", str(tmp_path)]) == code
    assert f"finished work is in {tmp_path}, the same command resumes it" in capsys.readouterr().err


def test_data_are_told_apart_by_their_count_and_by_one_sample() -> None:
    def found(count: int, value: float) -> sources.Source:
        return sources.Source("data", lambda *_: torch.full((1, 2), value), nn.MSELoss(), "row", count)

    assert found(10, 0.0).identity == found(10, 0.0).identity
    assert len({found(count, value).identity for count, value in [(10, 0.0), (11, 0.0), (10, 1.0)]}) == 3
