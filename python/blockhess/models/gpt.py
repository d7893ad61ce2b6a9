"""A decoder-only Transformer with the architecture and initialisation of nanoGPT.

    x = tok(t) + pos;  x += attn(ln(x));  x += mlp(ln(x))  per layer;  logits = ln(x) tok^T

Query, key and value are separate parameters unless `fused_qkv`, so that each is a block of its own. There is
no dropout: a Hessian needs a deterministic loss. Token t's logits depend on tokens 0..t only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a `GPT`; the defaults are nanoGPT's shakespeare-char model, the paper's GPT2-nano (10.65M).

    `mlp_width` None means 4 x width; `layer_norm=False` leaves out every LayerNorm, as in the paper's Figure 2.
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
    """Width to mlp_width, GELU, and back."""

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
    """Character or token language model; its head is the token embedding, one parameter with two uses.

    Initialised from torch's global generator: N(0, 0.02^2), residual projections
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
        self._initialise()

    def _initialise(self) -> None:
        residual_std = 0.02 / math.sqrt(2 * self.config.num_layers)
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
            ValueError: length exceeds the context.
        """
        length = tokens.shape[-1]
        if length > self.config.context:
            raise ValueError(f"GPT: tokens must have length <= context = {self.config.context}, got {length}")
        x = self.tok(tokens) + self.pos.weight[:length]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.ln_f(x), self.tok.weight)

    def paper_blocks(self, figure: bool) -> dict[str, str]:
        """Block name -> parameter of the paper's set, under the names of Figure 4 where that is meant.

        With a fused qkv that of GPT2-nano, the parameters of even index: wpe and every layer's c_attn, ln_2 and c_proj
        in Figure 4 (c); by the text without the LayerNorm. Otherwise that of GPT-2: wte, which is the head too, and the
        weights of layers 1, 4, 8 and 12 of 12.
        """
        depth = self.config.num_layers
        if self.config.fused_qkv:
            blocks = {"transformer.wpe": "pos.weight"}
            labels = {"attn.c_attn": "attn.qkv", "ln_2": "ln_2", "mlp.c_proj": "mlp.proj"}
            if not (figure and self.config.layer_norm):
                del labels["ln_2"]
            shown, prefix = set(range(depth)), "transformer."
        else:
            blocks, prefix = {"wte": "tok.weight"}, ""
            attention = {
                "attn.wq": "attn.query",
                "attn.wk": "attn.key",
                "attn.wv": "attn.value",
                "attn.wo": "attn.proj",
            }
            labels = {**attention, "mlp.c_fc": "mlp.fc", "mlp.c_proj": "mlp.proj"}
            shown = {0, max(0, depth // 3 - 1), max(0, 2 * depth // 3 - 1), depth - 1}
        for i in sorted(shown):
            blocks |= {f"{prefix}h.{i}.{label}": f"layers.{i}.{name}.weight" for label, name in labels.items()}
        return blocks if figure else {name: name for name in blocks.values()}


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    """Mean cross-entropy in nats of every position's next token, and the number of positions (its weight).

    Args:
        model: maps tokens (batch, length) to logits (batch, length, vocab_size).
        batch: tokens and targets, both (batch, length) int64.

    Returns:
        The scalar loss, and the count of targets: the pair `blockhess.spectrum` averages batches with.

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


def check_tokens(model: nn.Module, *tokens: Tensor) -> None:
    """Check tokens against `model.config.vocab_size`, since an embedding on a GPU would abort the process.

    Fake and meta tensors, which hold no values, pass.

    Raises:
        ValueError: a token is not below the vocabulary size.
    """
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is None or any(type(t) is not Tensor or t.is_meta for t in tokens):
        return
    largest = max(int(t.max()) for t in tokens)
    if largest >= vocab_size:
        raise ValueError(f"tokens in data must be below the model's vocab_size = {vocab_size}, got {largest}")
