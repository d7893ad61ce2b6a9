"""GPT: parameter counts by formula, initialization, causality, bad sizes and tokens."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import nn

import blockhess
from blockhess.datasets import shakespeare
from blockhess.models import GPT, GPTConfig, next_token_loss
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


def test_gpt_initialization_is_nanogpts() -> None:
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
    # Logits are <normalized x, row of tok>: variance s2 = 32 * 0.02^2, so the loss is near ln 76 + s2 / 2.
    assert small_gpt()(batch[0]).std().item() == pytest.approx(0.02 * math.sqrt(32), rel=0.1)
    assert loss.item() == pytest.approx(math.log(76) + 32 * 0.02**2 / 2, abs=0.03)
    assert weight == 4 * 32


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


def test_tokens_are_checked_once_and_again_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(GPTConfig(65, context=8, num_layers=1, num_heads=1, width=4))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    maxima, maximum = [], torch.Tensor.max
    monkeypatch.setattr(torch.Tensor, "max", lambda t: maxima.append(t) or maximum(t))
    for _ in range(3):
        check_tokens(model, tokens)
    assert len(maxima) == 1
    tokens[0, 0] = 65
    with pytest.raises(ValueError, match="got 65"):
        check_tokens(model, tokens)
    check_tokens(GPT(GPTConfig(66, context=8, num_layers=1, num_heads=1, width=4)), tokens)
    with pytest.raises(ValueError, match="got 65"):
        check_tokens(model, tokens)
    with torch.inference_mode():
        check_tokens(model, torch.zeros(1, 8, dtype=torch.int64))
