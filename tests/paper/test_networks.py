"""Table 1 and Figures 3 and 4: networks at both scales, spectra measured once, verdicts that follow from numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import blockhess
from blockhess.cli.demo import one_thread
from blockhess.cli.main import main
from blockhess.models import ResNet, ResNetConfig
from blockhess.problem.blocks import partition
from blockhess_paper.commands import NETWORK_EXPERIMENTS
from blockhess_paper.models import CONFIGS
from blockhess_paper.models.bert import IGNORED
from blockhess_paper.networks import networks, table1
from blockhess_paper.networks.figure3 import SHOWN, four_blocks
from blockhess_paper.networks.networks import NETWORKS, Selection, network
from blockhess_paper.results import NOT_REPRODUCED, PARTLY, REPRODUCED
from tests.helpers.dense_hessian import dense_hessian
from tests.paper.test_datasets import corpus, image

TITLES = {name: title for name, (title, _, _) in NETWORKS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("networks")
    with one_thread():
        for name in NETWORK_EXPERIMENTS:
            assert main(["paper", name, "--quick", "--out", str(out)]) == 0
    return out


def content(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORK_EXPERIMENTS)
def test_every_experiment_writes_data_picture_and_verdicts(folder: Path, name: str) -> None:
    found = content(folder, name)
    assert (folder / f"{name}.png").stat().st_size > 5_000
    assert found["claims"] and all(c["verdict"] in (REPRODUCED, PARTLY, NOT_REPRODUCED) for c in found["claims"])
    assert found["settings"]["scale"] == "mini" and found["settings"]["num_probes"] == 2


@pytest.mark.slow
def test_table_1_has_all_networks_and_both_policies(folder: Path) -> None:
    found = content(folder, "table1")
    [row, *_] = found["numbers"]["js0"].values()
    assert set(row) == {*TITLES.values(), "ResNet18, BatchNorm eval", "ResNet18, BatchNorm batch"} - {"ResNet18"}
    assert found["numbers"]["with the diagonal"]["GPT2-nano"] == pytest.approx(6 / 7, rel=1e-5)
    assert "286.41" in found["text"] and "149" not in found["text"]


@pytest.mark.slow
def test_default_definition_is_that_of_spectra(folder: Path) -> None:
    spectra = blockhess.load(folder / "spectra" / "gpt2-nano-none.npz")
    values = content(folder, "table1")["numbers"]["js0"]["distance, normalization none, sigma 1% of range"]
    assert values["GPT2-nano"] == pytest.approx(float(spectra.js0(axis="linear", base=np.e)), rel=1e-4)


def test_spectra_are_measured_once_and_again_where_something_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spectra" / "vgg16-none.npz"
    arguments = ["paper", "fig4", "--quick", "--model", "vgg16", "--out", str(tmp_path)]
    with one_thread():
        assert main(arguments) == 0
    os.utime(path, (1, 1))
    assert main(arguments) == 0
    assert path.stat().st_mtime == 1
    assert main([*arguments, "--seed", "5"]) == 0
    assert path.stat().st_mtime > 1
    assert blockhess.load(path).quadrature.seed == 5
    # One network alone supports no claim about CNNs and Transformers.
    assert content(tmp_path, "fig4")["claims"] == []


def test_ratio_by_hand() -> None:
    values = {"resnet18": 1.0, "vgg16": 2.0, "vit-base": 30.0, "bert": 8.0, "gpt2-nano": 9.0, "gpt2": 10.0}
    assert table1.ratio(values) == 4.0


def test_claims_of_table_1_follow_from_the_numbers() -> None:
    def verdicts(values: tuple[float, ...]) -> list[str]:
        row = dict(zip(NETWORKS, values))
        key = ("distance", "none", None)
        judged = {p: {key: table1.distance_to_paper(values, table1.PAPER)} for p in ("eval", "batch")}
        ratios = {p: {key: table1.ratio(row)} for p in ("eval", "batch")}
        return [claim.verdict for claim in table1._claims(judged, ratios)]

    assert verdicts(table1.PAPER) == [REPRODUCED, REPRODUCED, REPRODUCED]
    assert verdicts(tuple(v / 1000 for v in table1.PAPER)) == [PARTLY, REPRODUCED, REPRODUCED]
    assert verdicts((0.5,) * 6) == [NOT_REPRODUCED] * 3
    assert verdicts((1.0, 1.0, 5.0, 3.0, 2.0, 4.0))[1:] == [NOT_REPRODUCED, REPRODUCED]


@pytest.mark.parametrize("name", SHOWN)
def test_the_four_blocks_of_figure_3(name: str) -> None:
    with torch.device("meta"):
        model: Any = networks.named(name)
        blocks = [b.info.name for b in partition(model, model.paper_blocks(figure=True)).blocks]
    chosen = four_blocks(name, blocks)
    assert len(set(chosen)) == 4 and set(chosen) <= set(blocks)
    if name == "vit-base":
        assert chosen == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.6.attn.qkv", "blocks.6.mlp.fc1"]


def tiny(name: str, **_: object) -> nn.Module:
    """A model that takes the paper's data but is built in no time."""
    sizes = {"vgg16": {"width": 2, "hidden": 4}, "vit-base": {"width": 12, "depth": 1}, "bert": {"width": 12},
             "resnet18": {"width": 2}, "gpt2": {"width": 12, "num_layers": 1}, "gpt2-nano": {"width": 6}}  # fmt: skip
    kind, config = CONFIGS[name]
    return kind(type(config)(**vars(config) | sizes[name] | {k: v for k, v in _.items()}))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_papers_size_is_read_from_the_users_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    for kind in ("a", "b"):
        (tmp_path / "imagenet").mkdir(exist_ok=True)
        image(tmp_path / "imagenet" / kind / "1.png", (240, 256), (9, 9, 9))
    (tmp_path / "cornell").mkdir()
    corpus(tmp_path / "cornell")
    (tmp_path / "openwebtext").mkdir()
    np.arange(1100, dtype=np.uint16).tofile(tmp_path / "openwebtext" / "train.bin")
    monkeypatch.setattr(networks, "named", tiny)
    net = network(name, Selection(scale="paper", data=tmp_path), size=2, at_once=1)
    with one_thread():
        plan = blockhess.plan(
            net.model,
            net.data,
            net.loss_fn,
            blocks=net.model.paper_blocks(figure=True),  # type: ignore[operator]
            num_probes=10,
            num_steps=100,
            engine="autograd",
        )
    assert plan.hvps > 0 and len(plan.exact) >= 5
    first = net.data[0][0]
    assert first.shape[1:] == {"bert": (64,), "gpt2-nano": (256,), "gpt2": (1024,)}.get(name, (3, 224, 224))


@pytest.mark.parametrize("name", ["resnet18", "gpt2", "bert"])
@pytest.mark.parametrize("argument", ["size", "at_once"])
def test_no_samples_are_refused(name: str, argument: str) -> None:
    """0 does not mean the scale's own number."""
    with pytest.raises(ValueError, match=f"network: {argument} must be at least 1, got 0"):
        network(name, **{argument: 0})


def test_the_papers_batches() -> None:
    net = network("gpt2-nano", Selection(scale="paper"))
    assert sum(x.numel() for x, _ in net.data) == 163_840 and net.data[0][0].numel() == 8_192
    assert sum(p.numel() for p in net.model.parameters()) == 10_745_088 + (76 - 65) * 384


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "scale must be one of mini, paper, got 'huge'"),
        (["--model", "lenet"], "name must be one of resnet18"),
        (["--scale", "paper", "--model", "hf:gpt2"], "timm:NAME or torchvision:NAME, got 'hf:gpt2'"),
        (["--scale", "paper", "--model", "gpt2"], "needs --data FOLDER with imagenet/CLASS"),
        (["--scale", "paper", "--model", "gpt2", "--data", "nowhere"], "uint16 tokens, as nanoGPT's"),
        (["--scale", "paper", "--model", "vgg16", "--data", "nowhere"], "a folder of images for every class"),
    ],
)
def test_bad_requests(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(networks, "named", tiny)
    assert main(["paper", "table1", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_transformers_model_takes_the_networks_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    named = networks.named
    monkeypatch.setattr(networks, "named", lambda name, **sizes: named(name, n_layer=1, n_head=2, n_embd=8, **sizes))
    with one_thread():
        assert main(["paper", "table1", "--quick", "--model", "hf:gpt2", "--out", str(tmp_path)]) == 0
    assert list(content(tmp_path, "table1")["numbers"]["default"]) == ["hf:gpt2"]


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
def test_a_transformers_model_gets_the_labels_that_its_loss_asks_for(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    named = networks.named
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    monkeypatch.setattr(networks, "named", lambda name, **given: named(name, **sizes, **given))
    net = network(f"hf:{kind}", size=2)
    assert net.loss_fn is None and net.model(**net.data).loss.isfinite()
    labels = net.data["labels"]
    masked = kind in ("bert", "roberta")
    assert ("attention_mask" in net.data) == masked and bool((labels == IGNORED).any()) == masked
    if kind == "bert":  # whose loss has two halves, and is none without the other
        assert net.model(**{key: net.data[key] for key in ("input_ids", "labels")}).loss is None


@pytest.mark.parametrize(
    ("kind", "sizes", "built"),
    [
        ("electra", {"num_hidden_layers": 1, "hidden_size": 8, "embedding_size": 8}, "ElectraForPreTraining"),
        ("t5", {"d_model": 8, "num_layers": 1}, "T5ForConditionalGeneration"),
    ],
)
def test_other_language_models_are_refused(
    kind: str, sizes: dict[str, int], built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    named = networks.named
    monkeypatch.setattr(networks, "named", lambda name, **given: named(name, num_attention_heads=2, **sizes, **given))
    with pytest.raises(ValueError, match=f"next-sentence language model, got 'hf:{kind}', a {built}"):
        network(f"hf:{kind}")


@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
def test_blocks_of_a_relu_network_are_psd_of_low_rank_unless_batch_statistics_depend_on_them(batchnorm: str) -> None:
    # Logits are piecewise linear in one layer's weights: H_l = J^T (d2 Loss / d logits^2) J, its rank at most
    # images (classes - 1).
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(4, (1,), num_classes=3, in_channels=1, stem="small")).double()
    model.train(batchnorm == "batch")
    images, labels = torch.randn(4, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    block = "layers.0.conv1.weight"
    hessian = dense_hessian(model, lambda f: nn.functional.cross_entropy(f(images), labels), [block])
    eigenvalues = torch.linalg.eigvalsh(hessian)
    size = eigenvalues.abs().max()
    rank = int((eigenvalues.abs() > 1e-10 * size).sum())
    if batchnorm == "eval":
        assert eigenvalues.min() > -1e-10 * size and rank <= 4 * (3 - 1)
    else:
        assert eigenvalues.min() < -1e-3 * size and rank > 4 * (3 - 1)
