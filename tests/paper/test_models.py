"""The paper's six models: parameter counts, initialization, the paper's blocks, names, other packages' versions."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import blockhess
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess.problem.blocks import Block, ParameterSlice, heads, partition
from blockhess_paper.models import (
    BERT,
    CONFIGS,
    VGG,
    BERTConfig,
    MaskedPairs,
    VGGConfig,
    ViT,
    ViTConfig,
    masked_pair_loss,
    named,
)
from blockhess_paper.models.bert import IGNORED, sinusoids
from tests.helpers.dense_hessian import assert_close, dense_hessian, operator, operator_blocks


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(name: str, **sizes: Any) -> nn.Module:
    with torch.device("meta"):
        return named(name, **sizes)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # torchvision's resnet18 and vgg16; timm's vit_base_patch16_224.
        ("resnet18", 11_689_512),
        ("vgg16", 138_357_544),
        ("vit-base", 86_567_656),
        # nanoGPT prints the count without positions: 10.65M of 65 characters, 123.59M.
        ("gpt2-nano", 10_646_784 + 256 * 384),
        ("gpt2", 123_587_328 + 1024 * 768),
        # The paper's 40M.
        ("bert", 39_998_114),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    assert count(on_meta(name)) == parameters


def test_parameter_counts_by_formula() -> None:
    w, vocab = 768, 16_800
    layer = 4 * (w * w + w) + (w * 4 * w + 4 * w) + (4 * w * w + w) + 2 * w
    assert count(on_meta("bert")) == vocab * w + 3 * w + 2 * layer + (2 * w + 2) + vocab * (w + 1)
    config = VGGConfig(4, (1, 2), hidden=8, pooled=2, num_classes=5, in_channels=1)
    convolutions = (9 + 1) * 4 + (9 * 4 + 1) * 8 + (9 * 8 + 1) * 8
    assert count(VGG(config)) == convolutions + (32 * 8 + 8) + (8 * 8 + 8) + (8 * 5 + 5)
    assert count(VGG(VGGConfig(**vars(config) | {"batch_norm": True}))) == count(VGG(config)) + 2 * (4 + 8 + 8)


# What Figure 4 shows: number of blocks, the first and the last.
FIGURE_4 = {
    "resnet18": (18, "conv1", "fc"),
    "vgg16": (16, "features.0", "classifier.6"),
    "vit-base": (14, "patch_embed.proj", "head"),
    "bert": (16, "embedding.token", "mask_lm.linear"),
    "gpt2-nano": (19, "transformer.wpe", "transformer.h.5.mlp.c_proj"),
    "gpt2": (25, "wte", "h.11.mlp.c_proj"),
}


def paper_blocks(model: Any, figure: bool) -> tuple[Block, ...]:
    return partition(model, model.paper_blocks(figure)).blocks


@pytest.mark.parametrize("name", FIGURE_4)
def test_blocks_of_figure_4(name: str) -> None:
    names = [block.info.name for block in paper_blocks(on_meta(name), figure=True)]
    assert (len(names), names[0], names[-1]) == FIGURE_4[name]


def test_labels_of_figure_4() -> None:
    def labels(name: str) -> dict[str, tuple[str, ...]]:
        return {b.info.name: b.info.parameters for b in paper_blocks(on_meta(name), figure=True)}

    assert labels("resnet18")["layer3.1.conv2"] == ("layers.5.conv2.weight",)
    assert labels("gpt2-nano")["transformer.h.2.ln_2"] == ("layers.2.ln_2.weight",)
    assert {int(label.split(".")[1]) for label in labels("gpt2") if label.startswith("h.")} == {0, 3, 7, 11}
    assert {int(label.split(".")[1]) for label in labels("vit-base") if label.startswith("blocks")} == {0, 6, 11}


def test_blocks_by_the_papers_text() -> None:
    def infos(name: str) -> dict[str, int]:
        return {block.info.name: block.info.dim for block in paper_blocks(on_meta(name), figure=False)}

    # All but the BatchNorms, which have 2 x (64 + 4 x (64 + 128 + 256 + 512) + 128 + 256 + 512) parameters.
    assert sum(infos("resnet18").values()) == 11_689_512 - 9600
    assert sum(infos("vgg16").values()) == 138_357_544
    assert sum(infos("bert").values()) == 39_998_114 - 2 * 2 * 768
    assert len(infos("gpt2-nano")) == 13 and not any("ln" in name for name in infos("gpt2-nano"))
    assert {int(name.split(".")[1]) for name in infos("vit-base") if name.startswith("blocks")} == {0, 5, 11}
    assert len(infos("gpt2")) == 25


def test_every_second_parameter_of_nanogpt_is_figure_4c() -> None:
    # nanoGPT's order: wte, wpe, then six of every layer; those of even number, counted from 1.
    order = ["tok", "pos"]
    for i in range(6):
        order += [f"layers.{i}.{part}" for part in ("ln_1", "attn.qkv", "attn.proj", "ln_2", "mlp.fc", "mlp.proj")]
    blocks = paper_blocks(on_meta("gpt2-nano"), figure=True)
    assert [block.info.parameters[0] for block in blocks] == [f"{name}.weight" for name in order[1::2]]


def test_bert_tokens_outside_the_vocabulary_are_refused() -> None:
    few = torch.zeros(1, 8, dtype=torch.int64)
    model = BERT(BERTConfig(65, context=8, num_layers=1, num_heads=1, width=4))
    with pytest.raises(ValueError, match="below the model's vocab_size = 65, got 70"):
        blockhess.plan(model, MaskedPairs(few + 70, few + 1, few, few[:, 0]), masked_pair_loss)


def test_vgg_initialization_is_torchvisions() -> None:
    torch.manual_seed(0)
    model = VGG(VGGConfig(32, (1, 1), hidden=64, pooled=2, num_classes=10))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_out = module.weight.shape[0] * math.prod(module.weight.shape[2:])
            expected = math.sqrt(2 / fan_out) if isinstance(module, nn.Conv2d) else 0.01
            assert module.weight.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * module.weight.numel()))
            assert module.bias.eq(0).all()


def test_vit_initialization_is_timms() -> None:
    torch.manual_seed(0)
    model = ViT(ViTConfig(32, 8, depth=2, num_heads=4, width=64, num_classes=100))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 or name == "pos_embed":
            rel = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(0.02, rel=rel), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert parameter.eq(0).all(), name
    assert 0 < model.cls_token.abs().max().item() < 1e-5
    # nn.Conv2d: uniform up to 1 / sqrt(fan_in).
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.01)


def test_bert_initialization_is_torchs() -> None:
    torch.manual_seed(0)
    model = BERT(BERTConfig(500, context=8, num_layers=1, num_heads=2, width=64))
    assert model.embedding.token.weight[1:].std().item() == pytest.approx(1.0, rel=5 / math.sqrt(2 * 499 * 64))
    assert model.embedding.token.weight[0].eq(0).all() and model.embedding.segment.weight[0].eq(0).all()
    assert model.mask_lm.linear.weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)


def test_sinusoids_by_hand() -> None:
    table = sinusoids(3, 4)
    expected = [math.sin(2), math.cos(2), math.sin(2 / 100), math.cos(2 / 100)]
    assert table[2].tolist() == pytest.approx(expected, abs=1e-6)
    assert table[0].tolist() == [0, 1, 0, 1]


def test_bert_attends_both_ways_but_not_to_padding() -> None:
    torch.manual_seed(0)
    model = named("bert-mini", vocab_size=20, context=8).eval()
    tokens = torch.tensor([[1, 5, 6, 7, 2, 0, 0, 0]])
    segments = (tokens > 0).long()
    with torch.no_grad():
        _, logits = model(tokens, segments)
        _, changed = model(tokens.index_fill(1, torch.tensor(3), 9), segments)
        _, shorter = model(tokens[:, :5], segments[:, :5])
    assert (logits - changed).abs().amax(-1)[0, :5].gt(1e-4).all()
    torch.testing.assert_close(logits[:, :5], shorter, rtol=1e-4, atol=1e-4)


def test_heads_split_the_vits_qkv() -> None:
    model = on_meta("vit-base")
    parts = heads(model, "blocks.0.attn.qkv.weight", 1, roles=("q", "k", "v"))
    assert [block.info.shape for block in partition(model, parts).blocks] == [(768, 768)] * 3


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (ViT(ViTConfig(8, 4, 1, 2, 8, 3, 1)), [torch.zeros(1, 1, 9, 8)], r"ViT: images must be 8 x 8, got \(9, 8\)"),
        (VGG(VGGConfig(2, (1, 1), 4, 1, 3, 1)), [torch.zeros(1, 1, 3, 9)], r"VGG: images must be at least 4 x 4"),
        *(
            (model, [torch.zeros(*shape)], rf"{name}: images must be \(batch, 1, height, width\), got \({first}, ")
            for name, model in (
                ("ViT", ViT(ViTConfig(8, 4, 1, 2, 8, 3, 1))),
                ("VGG", VGG(VGGConfig(2, (1, 1), 4, 1, 3, 1))),
                ("ResNet", ResNet(ResNetConfig(2, (1, 1), 3, 1))),
            )
            for first, shape in ((5, (5, 3, 8, 8)), (1, (1, 8, 8)))
        ),
        (
            BERT(BERTConfig(5, 4, 1, 1, 8)),
            [torch.ones(2, 1, 5).long()],
            "BERT: tokens must have length <= context = 4, got 5",
        ),
    ],
)
def test_inputs_of_another_size_are_refused(model: nn.Module, inputs: Any, message: str) -> None:
    if isinstance(model, BERT):
        inputs = [*inputs[0]]
    with pytest.raises(ValueError, match=message):
        model(*inputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VGGConfig(hidden=0), "VGGConfig: hidden must be at least 1, got 0"),
        (lambda: VGGConfig(convs_per_stage=(1, 0)), "VGGConfig: convs_per_stage must hold counts"),
        (lambda: ViTConfig(image_size=20, patch_size=16), "image_size must be a multiple of patch_size = 16, got 20"),
        (lambda: ViTConfig(width=10, num_heads=4), "width must be a multiple of num_heads = 4, got 10"),
        (lambda: BERTConfig(width=9, num_heads=3), "width must be even"),
        (lambda: named("gpt3"), "name must be one of .*the nearest are gpt2"),
        (lambda: named("gpt2", heads=3), "GPTConfig has no field 'heads'"),
        (lambda: named("keras:gpt2"), "PACKAGE:NAME must be of hf, timm, torchvision"),
        (lambda: named("hf:gpt3"), "must be a model type of Transformers.*; the nearest are .*gpt2"),
    ],
)
def test_bad_sizes_and_names(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["timm:vit_base_patch16_224", "torchvision:resnet18", "hf:gpt2"])
def test_a_package_that_is_not_installed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"hf": "transformers"}.get(name.split(":")[0], name.split(":")[0])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{re.escape(name)}' needs {package}; type: pip install {package}"):
        named(name)


@pytest.mark.parametrize("fault", ["raise RuntimeError('operator nms does not exist')", "import no_such_package"])
def test_a_package_that_does_not_load_is_told_from_one_that_is_not_installed(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision.py").write_text(fault)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    message = r"is installed but does not load beside torch .*: (operator nms|No module named 'no_such_package')"
    with pytest.raises(ImportError, match=message):
        named("torchvision:resnet18")


def test_models_of_transformers_are_named() -> None:
    pytest.importorskip("transformers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 11, "n_positions": 4}
    assert type(named("hf:gpt2", **sizes)).__name__ == "GPT2LMHeadModel"
    assert count(on_meta("hf:gpt2")) == 124_439_808
    assert type(on_meta("hf:bert")).__name__ == "BertForPreTraining"
    llama = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 4}
    assert type(named("hf:llama", vocab_size=11, **llama)).__name__ == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="GPT2Config has no field 'heads'"):
        named("hf:gpt2", heads=3)
    with pytest.raises(ValueError, match="with a language model, such as gpt2 or bert, got 'vit'"):
        named("hf:vit")


def test_mini_models_are_small_relatives() -> None:
    for name in FIGURE_4:
        kind, config = CONFIGS[f"{name}-mini"]
        assert kind is CONFIGS[name][0] and count(kind(config)) < 250_000


@pytest.fixture
def math_attention() -> Iterator[None]:
    """The one attention of torch that has a second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def gpt_and_transformers() -> tuple[GPT, nn.Module]:
    """Ours, and Transformers' GPT-2 with the same weights; GELU exact, separate query, key and value."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = GPT(GPTConfig(11, context=4, num_layers=2, num_heads=2, width=8, bias=True)).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=4, n_layer=2, n_head=2, n_embd=8, activation_function="gelu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).double()
    with torch.no_grad():
        theirs.transformer.wte.weight.copy_(ours.tok.weight)
        theirs.transformer.wpe.weight.copy_(ours.pos.weight)
        theirs.transformer.ln_f.load_state_dict(ours.ln_f.state_dict())
        for mine, block in zip(ours.layers, theirs.transformer.h):
            block.ln_1.load_state_dict(mine.ln_1.state_dict())
            block.ln_2.load_state_dict(mine.ln_2.state_dict())
            qkv = (mine.attn.query, mine.attn.key, mine.attn.value)
            block.attn.c_attn.weight.copy_(torch.cat([linear.weight for linear in qkv]).T)
            block.attn.c_attn.bias.copy_(torch.cat([linear.bias for linear in qkv]))
            for linear, conv in (
                (mine.attn.proj, block.attn.c_proj),
                (mine.mlp.fc, block.mlp.c_fc),
                (mine.mlp.proj, block.mlp.c_proj),
            ):
                conv.weight.copy_(linear.weight.T)
                conv.bias.copy_(linear.bias)
    return ours, theirs


def transposed(block: Tensor, rows: int, columns: int) -> Tensor:
    """The Hessian of W^T of shape (columns, rows), from that of W, (rows, columns)."""
    n = rows * columns
    return block.view(rows, columns, rows, columns).permute(1, 0, 3, 2).reshape(n, n)


@pytest.mark.usefixtures("math_attention")
def test_gpt_and_transformers_gpt2_have_the_same_hessian_blocks() -> None:
    ours, theirs = gpt_and_transformers()
    tokens = torch.randint(11, (3, 4))
    targets = tokens.roll(-1, 1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        # Transformers computes its own loss in float32.
        return nn.functional.cross_entropy(model(batch[0]).logits.flatten(0, 1), batch[1].flatten())

    mine = {"wte": "tok.weight", "query": "layers.1.attn.query.weight", "value": "layers.0.attn.value.weight",
            "fc": "layers.0.mlp.fc.weight", "bias": "layers.1.mlp.proj.bias"}  # fmt: skip
    here = operator_blocks(operator(ours, (tokens, targets), next_token_loss, mine))
    h = "transformer.h"
    other = {"wte": "transformer.wte.weight", "query": ParameterSlice(f"{h}.1.attn.c_attn.weight", 0, 8, dim=1),
             "value": ParameterSlice(f"{h}.0.attn.c_attn.weight", 16, 24, dim=1), "fc": f"{h}.0.mlp.c_fc.weight",
             "bias": f"{h}.1.mlp.c_proj.bias"}  # fmt: skip
    there = operator_blocks(operator(theirs, (tokens, targets), loss, other))
    for name, (rows, columns) in {"query": (8, 8), "value": (8, 8), "fc": (32, 8)}.items():
        assert_close(transposed(here[name], rows, columns), there[name])
    assert_close(here["wte"], there["wte"])
    assert_close(here["bias"], there["bias"])
    # And a different block is seen to be different.
    assert (transposed(here["query"], 8, 8) - there["value"]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("math_attention")
def test_bert_and_transformers_bert_have_the_same_hessian_blocks() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = BERTConfig(11, context=6, num_layers=2, num_heads=2, width=8)
    ours = BERT(config).double()
    theirs = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=6, type_vocab_size=3, layer_norm_eps=1e-5, hidden_act="gelu",
        ),
        add_pooling_layer=False,
    ).double().eval()  # fmt: skip
    theirs.embeddings.LayerNorm = nn.Identity()  # which the blog's has not
    names = {
        "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
        "output_linear": "attention.output.dense", "fc1": "intermediate.dense", "fc2": "output.dense",
    }  # fmt: skip
    with torch.no_grad():
        theirs.embeddings.word_embeddings.weight.copy_(ours.embedding.token.weight)
        theirs.embeddings.token_type_embeddings.weight.copy_(ours.embedding.segment.weight)
        theirs.embeddings.position_embeddings.weight.copy_(sinusoids(6, 8))
        ours.embedding.position = ours.embedding.position.double()
        for layer, mine in zip(theirs.encoder.layer, ours.encoder):
            for name, there in names.items():
                layer.get_submodule(there).load_state_dict(mine.get_submodule(name).state_dict())

    class WithOurHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.next_sentence, self.mask_lm = theirs, ours.next_sentence, ours.mask_lm

        def forward(self, tokens: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
            x = self.bert(tokens, attention_mask=(tokens != 0).long(), token_type_ids=segments).last_hidden_state
            return self.next_sentence(x[:, 0]), self.mask_lm(x)

    tokens = torch.tensor([[1, 5, 2, 7, 2, 0], [1, 6, 8, 2, 9, 2]])
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 2]])
    labels = torch.full_like(tokens, IGNORED)
    labels[0, 1], labels[1, 4] = 10, 3
    batch = MaskedPairs(tokens, segments, labels, torch.tensor([1, 0]))
    mine = {name: f"encoder.{i}.{name}.weight" for i, name in ((0, "query"), (1, "value"), (0, "fc1"), (1, "fc2"))}
    mine["token"] = "embedding.token.weight"
    other = {
        name: f"bert.encoder.layer.{i}.{names[name]}.weight"
        for i, name in ((0, "query"), (1, "value"), (0, "fc1"), (1, "fc2"))
    }
    other["token"] = "bert.embeddings.word_embeddings.weight"
    here = operator_blocks(operator(ours, batch, masked_pair_loss, mine))
    there = operator_blocks(operator(WithOurHeads(), batch, masked_pair_loss, other))
    for name in mine:
        assert_close(here[name], there[name])
    assert here["query"].abs().max() > 1e-6


@pytest.mark.usefixtures("math_attention")
@pytest.mark.parametrize("name", ["vgg", "vit"])
def test_hessian_blocks_of_image_models_are_those_of_autograd(name: str) -> None:
    torch.manual_seed(0)
    if name == "vgg":
        model: nn.Module = VGG(VGGConfig(2, (1, 1), hidden=4, pooled=1, num_classes=3, in_channels=1))
        block, size = "features.3.weight", 8
        nn.init.normal_(model.classifier[-1].weight)  # so that the curvature is not near zero
    else:
        model = ViT(ViTConfig(8, 4, depth=1, num_heads=2, width=8, num_classes=3, in_channels=1))
        block, size = "blocks.0.attn.proj.weight", 8
    model = model.double().eval()
    images, labels = torch.randn(3, 1, size, size, dtype=torch.float64), torch.tensor([0, 1, 2])
    found = operator_blocks(operator(model, (images, labels), nn.CrossEntropyLoss(), {"x": block}))
    expected = dense_hessian(model, lambda f: nn.functional.cross_entropy(f(images), labels), [block])
    assert_close(found["x"], expected)
