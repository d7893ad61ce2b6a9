"""Layers, blocks and faults of which random models are made; all map features (..., width) to features of that shape.

A class with the argument `plain` computes, where that is true, the same values by differentiable operations of torch
only. Its parameters have the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Map = Callable[[Tensor], Tensor]


class Apply(nn.Module):
    """A function as a module, which may use `inner`."""

    def __init__(self, function: Callable[..., Tensor], *inner: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.inner)


class Pooled(nn.Module):
    """The mean over all but the first and the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            x = x.mean(1)
        return x


class ReZero(nn.Module):
    """x + alpha f(x) with a 0-dimensional alpha."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.alpha = nn.Linear(width, width), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * torch.tanh(self.inner(x))


class Temperature(nn.Module):
    """x exp(t) with a 0-dimensional t."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.exp()


class LoRA(nn.Module):
    """A frozen int8 matrix, its scale, and a trainable product of rank 1; train(False) may merge it, as PEFT's does."""

    def __init__(self, width: int, merging: bool, zero: bool) -> None:
        super().__init__()
        w = torch.randn(width, width)
        self.scale = nn.Parameter(w.abs().max() / 127, requires_grad=False)
        self.base = nn.Parameter((w / self.scale).round().to(torch.int8), requires_grad=False)
        self.down = nn.Parameter(torch.randn(1, width))
        self.up = nn.Parameter(torch.zeros(width, 1) if zero else torch.randn(width, 1))
        self.merging, self.merged = merging, False

    def train(self, mode: bool = True) -> LoRA:
        self.merged = self.merging and not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            raise AssertionError("merged: the adapter is hidden")
        return torch.tanh(x @ (self.base.to(self.scale.dtype) * self.scale + self.up @ self.down).mT)


class Experts(nn.Module):
    """Every row goes to the better one of two experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 2)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weight, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = torch.where(chosen == number)[0]
            out = out.index_add(0, rows, weight[rows, None] * torch.tanh(expert(flat[rows])))
        return out.view_as(x)


class Counting(nn.Module):
    """Buffers that forward changes and does not use: a counter, and a running mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(x.detach().flatten(0, -2).mean(0), alpha=0.1)
        return x


class Noisy(nn.Module):
    """Adds noise: of a generator that starts anew at every call, drawn in `dtype` or in that of x, or any noise."""

    def __init__(self, generator: bool, dtype: torch.dtype | None, plain: bool = False) -> None:
        super().__init__()
        self.generator, self.dtype, self.plain = generator, dtype, plain

    def forward(self, x: Tensor) -> Tensor:
        if not self.generator:
            return x if self.plain else x + 0.3 * torch.randn_like(x)
        source = torch.Generator().manual_seed(3)
        return x + 0.3 * torch.randn(x.shape, generator=source, dtype=self.dtype or x.dtype).to(x.dtype)


class Positive(nn.Module):
    """A parametrization."""

    def forward(self, w: Tensor) -> Tensor:
        return F.softplus(w) - 0.5


class BesideFrozen(nn.Module):
    """A frozen linear layer beside a trained one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(width, width).requires_grad_(False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.trained(x)) + self.frozen(x)


class Attention(nn.Module):
    """nn.MultiheadAttention, or F.scaled_dot_product_attention, over the second dimension."""

    def __init__(self, width: int, fused: bool, mask: bool) -> None:
        super().__init__()
        self.inner: nn.Module = nn.Linear(width, 3 * width) if fused else nn.MultiheadAttention(
            width, 1, batch_first=True
        )  # fmt: skip
        self.fused, self.mask = fused, mask

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return x + F.scaled_dot_product_attention(*self.inner(x).chunk(3, -1), is_causal=self.mask)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if self.mask else None
        return x + self.inner(x, x, x, need_weights=False, attn_mask=mask)[0]


class WithoutGradients(nn.Module):
    """A layer under no_grad, whose parameters are not frozen, alone or beside its inputs."""

    def __init__(self, width: int, beside: bool, plain: bool) -> None:
        super().__init__()
        self.inner, self.beside, self.plain = nn.Linear(width, width), beside, plain

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.plain):
            y = torch.tanh(self.inner(x))
        return x + y if self.beside else y


class Checkpointed(nn.Module):
    def __init__(self, width: int, reentrant: bool, plain: bool) -> None:
        super().__init__()
        self.inner, self.reentrant, self.plain = nn.Linear(width, width), reentrant, plain

    def forward(self, x: Tensor) -> Tensor:
        if self.plain:
            return torch.tanh(self.inner(x))
        return torch.tanh(checkpoint(self.inner, x, use_reentrant=self.reentrant))


# What reads gradients, or changes them.


@dataclass(frozen=True)
class Hook:
    """Of a gradient: returns nothing, or `change` of it."""

    change: Callable[[Tensor], Tensor] | None = None

    def __call__(self, gradient: Tensor) -> Tensor | None:
        return self.change and self.change(gradient)

    def before(self, module: nn.Module, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return self.change and (self.change(outputs[0]),)

    def after(
        self, module: nn.Module, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...] | None:
        return self.change and tuple(g if g is None else self.change(g) for g in inputs)


def half(gradient: Tensor) -> Tensor:
    return 0.5 * gradient


def clipped(gradient: Tensor) -> Tensor:
    return gradient.clamp(-1e-3, 1e-3)


def masked(gradient: Tensor) -> Tensor:
    mask = torch.ones_like(gradient)
    mask[..., 0] = 0
    return gradient * mask


def saturated(gradient: Tensor) -> Tensor:
    return gradient / (gradient.norm() + 0.1)


EDITS = (half, clipped, masked, saturated)


class Hooked(nn.Module):
    """A layer with a hook on its weight, its output, or the module."""

    def __init__(self, width: int, where: str, hook: Hook | None) -> None:
        super().__init__()
        self.inner, self.hook = nn.Linear(width, width), hook if where == "output" else None
        if hook is not None and where == "weight":
            self.inner.weight.register_hook(hook)
        elif hook is not None and where == "module":
            self.inner.register_full_backward_hook(hook.after)
        elif hook is not None and where == "module, before":
            self.inner.register_full_backward_pre_hook(hook.before)
        elif hook is not None and where == "accumulated":
            self.inner.weight.register_post_accumulate_grad_hook(lambda p: None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if self.hook is not None and y.requires_grad:
            y.register_hook(self.hook)
        return torch.tanh(y)


# Functions with a derivative of their own, and tricks: name -> (as written, plain).


class SoundTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class SoundSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return scale * x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return 2 * ctx.scale * g * ctx.saved_tensors[0], None


class CutTanh(SoundTanh):
    """Its backward multiplies by a derivative that has no graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        ctx.slope = 1 - y * y
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class OnceTanh(SoundTanh):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class WrongTanh(SoundTanh):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return g * (1 - y * y * y)


class CutNorm(torch.autograd.Function):
    """x / |x| as a fused kernel computes it, with a norm that backward takes as constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
        ctx.save_for_backward(x)
        return x / ctx.size

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        y = x / ctx.size
        return (g - y * (g * y).mean(-1, keepdim=True)) / ctx.size


class Adjoint(torch.autograd.Function):
    """z = tanh(x + z / 2), with a backward that solves the adjoint equation by autograd.grad, without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        z = fixed_point(x)
        ctx.save_for_backward(x, z)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.enable_grad():
            x, z = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            f = torch.tanh(x + 0.5 * z)
            u = g.detach()
            for _ in range(30):
                u = g.detach() + torch.autograd.grad(f, z, u, retain_graph=True)[0]
            return torch.autograd.grad(f, x, u)[0]


def fixed_point(x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(30):
        z = torch.tanh(x + 0.5 * z)
    return z


class Reversal(torch.autograd.Function):
    """The identity, with the gradient multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * g, None


class RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def rounded(x: Tensor) -> Tensor:
    return torch.round(4 * x) / 4


def through(x: Tensor) -> Tensor:
    return x + (rounded(x) - x).detach()


def behind_its_back(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    y.data.mul_(0.5)
    return y


def clamped_in_place(x: Tensor) -> Tensor:
    y = 1.0 * x
    y.detach().clamp_(-0.3, 0.3)
    return y


def by_numpy(x: Tensor) -> Tensor:
    return x + torch.from_numpy(x.detach().numpy() ** 2)


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        size = 1 + x.square().mean(-1, keepdim=True)
    return x / size


def normalized(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt()


def identity(x: Tensor) -> Tensor:
    return x


def double(function: Map) -> Map:
    """tanh(2 x), whose slope a function with a cut derivative leaves out."""
    return lambda x: function(2 * x)


FAULTS: dict[str, tuple[Map, Map]] = {
    "Function with a constant slope": (double(CutTanh.apply), double(torch.tanh)),
    "Function with a constant norm": (CutNorm.apply, normalized),
    "Function with a wrong backward": (double(WrongTanh.apply), double(torch.tanh)),
    "once_differentiable": (double(OnceTanh.apply), double(torch.tanh)),
    "adjoint solver": (Adjoint.apply, fixed_point),
    "gradient reversal": (lambda x: Reversal.apply(x, -1.0), identity),
    "gradient scaling": (lambda x: Reversal.apply(x, 0.1), identity),
    "scaling by detach": (lambda x: 0.1 * x + (0.9 * x).detach(), identity),
    "straight-through Function": (RoundThrough.apply, rounded),
    "straight-through detach": (through, rounded),
    "detached factor": (lambda x: x * torch.sigmoid(x).detach(), lambda x: x * torch.sigmoid(x)),
    "factor without gradients": (without_gradients, lambda x: x / (1 + x.square().mean(-1, keepdim=True))),
    "values changed through .data": (behind_its_back, lambda x: 0.5 * torch.tanh(x)),
    "values changed through detach()": (clamped_in_place, lambda x: x.clamp(-0.3, 0.3)),
    "a part by NumPy": (by_numpy, lambda x: x + x * x),
}


def cumulated(x: Tensor) -> Tensor:
    return 0.5 * x + F.pad(x[..., 1:], (0, 1)) * torch.where(x > 0, x, 0.3 * x)


def in_place(x: Tensor) -> Tensor:
    y = 0.9 * x
    y.add_(x.sin()).mul_(0.8)
    y[..., 0] = y[..., 0].tanh()
    return y.sigmoid_()


def spectral(x: Tensor) -> Tensor:
    return x + torch.fft.fft(x, dim=-1).abs().square() * 0.2


SOUND: dict[str, tuple[Map, Map]] = {
    "twice differentiable Function": (SoundTanh.apply, torch.tanh),
    "Function of a number": (lambda x: x + SoundSquare.apply(x, 0.3), lambda x: x + 0.3 * x * x),
    "detached constant": (lambda x: x * (1 + torch.ones_like(x).cumsum(-1).detach()), None),
    "in-place operations": (in_place, None),
    "indexing": (cumulated, None),
    "Fourier transform": (spectral, None),
    "normalization": (normalized, None),
    "vmap": (lambda x: torch.vmap(lambda row: row * row.tanh())(x), lambda x: x * x.tanh()),
    "branch on values": (lambda x: x.tanh() if float(x.sum()) > 0 else x.sigmoid(), None),
    "float32 inside the model": (lambda x: x.float().tanh().to(x.dtype), torch.tanh),
}
SOUND = {name: (written, plain or written) for name, (written, plain) in SOUND.items()}
