"""Decoder-only Transformer with the architecture and initialization of nanoGPT.

    x = tok(t) + pos;  x += attn(ln(x));  x += mlp(ln(x))  per layer;  logits = ln(x) tok^T

Query, key and value are separate parameters, hence separate blocks, unless `fused_qkv`. There is no dropout: a Hessian
needs a deterministic loss. The logits of token t depend on tokens 0..t only.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`; the defaults are nanoGPT's shakespeare-char model, the paper's GPT2-nano (10.65M).

    `mlp_width=None` means 4 x width; `layer_norm=False` removes every LayerNorm, as in the paper's Figure 2.
    """

    vocab_size: int = 65
    context: int = 256
    num_layers: int = 6
    num_heads: int = 6
    width: int = 384
    bias: bool = False
    fused_qkv: bool = False
    mlp_width: int | None = None
    layer_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "num_layers", "num_heads", "width", "mlp_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"GPTConfig: {name} must be at least 1, got {value}")
        if self.width % self.num_heads:
            raise ValueError(f"GPTConfig: width must be a multiple of num_heads = {self.num_heads}, got {self.width}")


class CausalAttention(nn.Module):
    """Multi-head causal self-attention over (batch, tokens, width)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, bias = config.width, config.bias
        self.num_heads = config.num_heads
        self.fused_qkv = config.fused_qkv
        if config.fused_qkv:
            self.qkv = nn.Linear(width, 3 * width, bias=bias)
        else:
            self.query = nn.Linear(width, width, bias=bias)
            self.key = nn.Linear(width, width, bias=bias)
            self.value = nn.Linear(width, width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused_qkv:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = self.query(x), self.key(x), self.value(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers, width -> mlp_width -> width, with a GELU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden = config.mlp_width or 4 * config.width
        self.fc = nn.Linear(config.width, hidden, bias=config.bias)
        self.proj = nn.Linear(hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))  # type: ignore[no-any-return]


def _norm(config: GPTConfig) -> nn.Module:
    return nn.LayerNorm(config.width, bias=config.bias) if config.layer_norm else nn.Identity()


class Layer(nn.Module):
    """One pre-LayerNorm residual layer."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = _norm(config)
        self.attn = CausalAttention(config)
        self.ln_2 = _norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Language model over characters or tokens, whose output layer shares the weight of the token embedding.

    Initialized from torch's global generator: weights N(0, 0.02^2), those of residual projections
    N(0, 0.02^2 / (2 num_layers)), biases 0, LayerNorm gains 1.

    Args:
        config: sizes; the default is nanoGPT's shakespeare-char model.

    Source: Radford et al. 2019 (GPT-2); https://github.com/karpathy/nanoGPT.

    Example:
        >>> import torch
        >>> model = GPT(GPTConfig(vocab_size=10, context=8, num_layers=1, num_heads=2, width=16))
        >>> model(torch.zeros(3, 8, dtype=torch.int64)).shape
        torch.Size([3, 8, 10])
    """

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.tok = nn.Embedding(config.vocab_size, config.width)
        self.pos = nn.Embedding(config.context, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.ln_f = _norm(config)

        residual_std = 0.02 / math.sqrt(2 * config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, length, vocab_size) of tokens (batch, length) int64.

        Raises:
            ValueError: the length exceeds the context.
        """
        length = tokens.shape[-1]
        if length > self.config.context:
            raise ValueError(f"GPT: tokens must have length <= context = {self.config.context}, got {length}")
        x = self.tok(tokens) + self.pos.weight[:length]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.ln_f(x), self.tok.weight)

    def paper_blocks(self, figure: bool = False) -> dict[str, str]:
        """Return the blocks that the paper compares, as a dict from block name to parameter name.

        With `fused_qkv` those of GPT2-nano, the parameters of even index: the position embedding and c_attn, c_proj of
        every layer (and ln_2 in Figure 4 (c)). Otherwise those of GPT-2: the token embedding, and the weights of layers
        1, 4, 8 and 12 of 12.

        Args:
            figure: name the blocks as in Figure 4; otherwise, as the parameters.
        """
        depth = self.config.num_layers
        if self.config.fused_qkv:
            blocks, prefix, layers = {"transformer.wpe": "pos.weight"}, "transformer.", set(range(depth))
            labels = {"attn.c_attn": "attn.qkv", "ln_2": "ln_2", "mlp.c_proj": "mlp.proj"}
            if not (figure and self.config.layer_norm):
                del labels["ln_2"]
        else:
            blocks, prefix, layers = {"wte": "tok.weight"}, "", {0, depth // 3 - 1, 2 * depth // 3 - 1, depth - 1}
            labels = {"attn.wq": "attn.query", "attn.wk": "attn.key", "attn.wv": "attn.value", "attn.wo": "attn.proj"}
            labels |= {"mlp.c_fc": "mlp.fc", "mlp.c_proj": "mlp.proj"}
        for i in sorted(layers - {-1}):
            blocks |= {f"{prefix}h.{i}.{label}": f"layers.{i}.{name}.weight" for label, name in labels.items()}
        return blocks if figure else {name: name for name in blocks.values()}


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    """Return the mean cross-entropy in nats of the next token at every position, and the number of positions.

    Args:
        model: maps tokens (batch, length) to logits (batch, length, vocab_size).
        batch: tokens and targets, both (batch, length) int64.

    Returns:
        The scalar loss and its weight, with which `blockhess.spectrum` averages over batches.

    Example:
        >>> import torch
        >>> model = GPT(GPTConfig(vocab_size=10, context=8, num_layers=1, num_heads=2, width=16))
        >>> tokens = torch.zeros(3, 8, dtype=torch.int64)
        >>> next_token_loss(model, (tokens, tokens))[1]
        24.0
    """
    tokens, targets = batch
    check_tokens(model, tokens, targets)
    logits = model(tokens)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten()), float(targets.numel())


# Tensor -> its version and the vocab_size that it was checked against.
_CHECKED: MutableMapping[Tensor, tuple[int, int]] = WeakTensorKeyDictionary()


def check_tokens(model: nn.Module, *tokens: Tensor) -> None:
    """Check tokens against `model.config.vocab_size`, since an embedding on a GPU would abort the process.

    A tensor is checked once, as its maximum waits for the device. Fake and meta tensors, which hold no values, pass.
    """
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is None or any(type(t) is not Tensor or t.is_meta for t in tokens):
        return
    for t in tokens:
        check = None if t.is_inference() else (t._version, vocab_size)
        if check is not None and check == _CHECKED.get(t):
            continue
        if (largest := int(t.max())) >= vocab_size:
            raise ValueError(f"tokens in data must be below the model's vocab_size = {vocab_size}, got {largest}")
        if check is not None:
            _CHECKED[t] = check
