"""The reference models: parameter counts by formula, initialisation, causality, bad sizes."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import nn

import blockhess
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess.models.gpt import check_tokens


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small_gpt(**options: bool) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=76, context=32, num_layers=2, num_heads=2, width=32, **options))


def test_gpt2_nano_has_the_papers_parameter_count() -> None:
    with torch.device("meta"):
        model = GPT()
    w, layers, vocab, context = 384, 6, 65, 256
    assert count(model) == vocab * w + context * w + layers * (12 * w * w + 2 * w) + w
    assert count(model) - model.pos.weight.numel() == 10_646_784


def test_gpt_biases_add_their_count() -> None:
    w, layers = 32, 2
    extra = count(small_gpt(bias=True)) - count(small_gpt())
    # Per layer: two LayerNorms, query, key, value, proj (w each), fc (4 w), proj (w); and the last LayerNorm.
    assert extra == layers * (2 + 4 + 4 + 1) * w + w


def test_gpt_fused_qkv_is_the_same_function() -> None:
    separate, fused = small_gpt(), small_gpt(fused_qkv=True)
    assert count(separate) == count(fused)
    state = separate.state_dict()
    for i in range(2):
        parts = [state.pop(f"layers.{i}.attn.{name}.weight") for name in ("query", "key", "value")]
        state[f"layers.{i}.attn.qkv.weight"] = torch.cat(parts)
    fused.load_state_dict(state)
    tokens = torch.randint(76, (2, 32))
    torch.testing.assert_close(fused(tokens), separate(tokens), rtol=1e-5, atol=1e-6)


def test_gpt_initialisation_is_nanogpts() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(num_layers=2, bias=True))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            expected = 0.02 / math.sqrt(2 * 2) if name.endswith("proj.weight") else 0.02
            # The standard deviation of n draws is known to 1 / sqrt(2 n): 5 sigma of the smallest, 65 x 384.
            assert parameter.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * 65 * 384)), name
        else:
            assert parameter.eq(0.0 if name.endswith("bias") else 1.0).all(), name


@pytest.mark.parametrize("fused_qkv", [False, True])
def test_gpt_is_causal(fused_qkv: bool) -> None:
    model = small_gpt(fused_qkv=fused_qkv)
    tokens = torch.randint(76, (1, 32))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 76
    difference = (model(tokens) - model(changed)).abs().amax(dim=-1)[0]
    assert difference[:20].eq(0).all()
    assert difference[20:].gt(0).all()


def test_gpt_starts_near_the_uniform_loss() -> None:
    [batch] = shakespeare().batches(batch_size=4, context=32)
    loss, weight = next_token_loss(small_gpt(), batch)
    # Logits are <normalised x, row of tok>: variance s2 = 32 * 0.02^2, so the loss is near ln 76 + s2 / 2.
    assert small_gpt()(batch[0]).std().item() == pytest.approx(0.02 * math.sqrt(32), rel=0.1)
    assert loss.item() == pytest.approx(math.log(76) + 32 * 0.02**2 / 2, abs=0.03)
    assert weight == 4 * 32


def test_resnet18_has_torchvisions_parameter_count() -> None:
    with torch.device("meta"):
        assert count(ResNet()) == 11_689_512


def test_small_resnet_parameter_count() -> None:
    with torch.device("meta"):
        model = ResNet(ResNetConfig(width=8, blocks_per_stage=(1, 1), num_classes=10, in_channels=1, stem="small"))
    stem = 9 * 8 + 16
    stage_1 = 2 * (9 * 8 * 8 + 16)
    stage_2 = (9 * 8 * 16 + 32) + (9 * 16 * 16 + 32) + (8 * 16 + 32)
    assert count(model) == stem + stage_1 + stage_2 + 16 * 10 + 10


def test_resnet_initialisation_is_torchvisions() -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(width=32, blocks_per_stage=(1, 1)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            n = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=5 / math.sqrt(2 * n))
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all()


@pytest.mark.parametrize("stem, size", [("small", 28), ("imagenet", 64)])
def test_resnet_classifies_images_of_any_size(stem: str, size: int) -> None:
    model = ResNet(ResNetConfig(width=4, blocks_per_stage=(1, 1), num_classes=7, in_channels=1, stem=stem))
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


def test_resnet_stages_halve_the_image_and_double_the_width() -> None:
    model = ResNet(ResNetConfig(width=4, blocks_per_stage=(1, 2, 1), num_classes=7, in_channels=1, stem="small"))
    x, shapes = torch.zeros(1, 4, 28, 28), []
    for layer in model.layers:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 28, 28), (8, 14, 14), (8, 14, 14), (16, 7, 7)]


def test_resnet_starts_near_the_uniform_loss_with_batch_statistics() -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(width=8, blocks_per_stage=(1, 1), num_classes=10, in_channels=1, stem="small"))
    images, labels = fashion_mnist(64)
    assert nn.functional.cross_entropy(model(images), labels).item() == pytest.approx(math.log(10), abs=0.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_layers": 0}, "GPTConfig: num_layers must be at least 1, got 0"),
        ({"width": 30, "num_heads": 4}, "GPTConfig: width must be a multiple of num_heads = 4, got 30"),
    ],
)
def test_gpt_refuses_bad_sizes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


def test_gpt_refuses_more_tokens_than_its_context() -> None:
    with pytest.raises(ValueError, match="length <= context = 32, got 33"):
        small_gpt()(torch.zeros(1, 33, dtype=torch.int64))


def test_resnet_refuses_bad_sizes() -> None:
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ResNetConfig(width=0)
    with pytest.raises(ValueError, match="blocks_per_stage must hold counts"):
        ResNetConfig(blocks_per_stage=())
    with pytest.raises(ValueError, match="stem must be"):
        ResNetConfig(stem="tiny")


def test_gpt_tokens_outside_the_vocabulary_are_refused() -> None:
    """Shakespeare has 76 characters; nanoGPT's vocabulary is of 65, and torch's own error names neither."""
    model = GPT(GPTConfig(65, context=8, num_layers=1, num_heads=1, width=4))
    few, all_kinds = torch.zeros(1, 8, dtype=torch.int64), torch.arange(72, 80).clamp(max=75)[None]
    data = [(few, few), (few, all_kinds)]
    with pytest.raises(ValueError, match="tokens in data must be below the model's vocab_size = 65, got 75"):
        blockhess.spectrum(model, data, next_token_loss, num_probes=1, num_steps=1)


@pytest.mark.parametrize("token, refused", [(64, False), (65, True)])
def test_the_vocabulary_ends_before_its_size(token: int, refused: bool) -> None:
    model = GPT(GPTConfig(65, context=8, num_layers=1, num_heads=1, width=4))
    with pytest.raises(ValueError, match="got 65") if refused else contextlib.nullcontext():
        check_tokens(model, torch.full((1, 8), token))
