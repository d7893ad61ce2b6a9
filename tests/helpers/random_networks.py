"""Small random networks: any sequence of operations on what was computed before, with parameters of its own and shared.

A network is a list of steps. A step takes the results of earlier ones, fits their shapes, and adds a result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LARGEST = 96  # elements of a result


@dataclass(frozen=True)
class Step:
    """One operation: which, on which earlier results counted from the last, and a number for its other choices."""

    name: str
    x: int
    y: int
    choice: int


class Network(nn.Module):
    """The network of some steps for data of one shape. Its output is one vector of all results that nothing reads."""

    def __init__(self, steps: Sequence[Step], x: Tensor) -> None:
        super().__init__()
        self.steps = steps
        self.weights = nn.ParameterList()
        self._weight_of: dict[tuple[int, int], int] = {}
        self(x)

    def weight(self, *shape: int) -> Tensor:
        """Return a parameter of the current step: one of an earlier step for some, a new one for most."""
        self._calls += 1
        key = (self._number, self._calls)
        if key not in self._weight_of:
            shared = [i for i, w in enumerate(self.weights) if w.shape == shape and self._choice % 3 == 2]
            if not shared:
                self.weights.append(nn.Parameter(torch.randn(shape) / max((1, *shape[-1:])) ** 0.5))
            self._weight_of[key] = shared[-1] if shared else len(self.weights) - 1
        return self.weights[self._weight_of[key]]

    def forward(self, x: Tensor) -> Tensor:
        results, unread = [x], {0}
        for number, step in enumerate(self.steps):
            self._number, self._calls, self._choice = number, 0, step.choice
            i, j = len(results) - 1 - step.x % len(results), len(results) - 1 - step.y % len(results)
            unread -= {i, *([j] if step.name in BINARY else ())}
            operation = BINARY.get(step.name) or UNARY[step.name]
            made = operation(self, results[i], *([results[j]] if step.name in BINARY else ()), step.choice)
            results.append(made.flatten()[:_LARGEST].clone() if made.numel() > _LARGEST else made)
            unread.add(len(results) - 1)
        return torch.cat([self._plain(results[i]) for i in sorted(unread)])

    @staticmethod
    def _plain(x: Tensor) -> Tensor:
        return x.flatten()


def fit(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the elements of x, repeated or cut, in a shape."""
    n, flat = prod(shape), x.reshape(-1)
    if flat.numel() < n:
        flat = flat.repeat(-(-n // flat.numel()))
    return flat[:n].reshape(tuple(shape))


def _dim(x: Tensor, choice: int) -> int:
    return choice % x.dim() if x.dim() else 0


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(1, -1) if x.dim() < 2 else x


def _linear(net: Network, x: Tensor, c: int) -> Tensor:
    x = _matrix(x)
    bias = net.weight(2 + c % 2) if c % 4 else None
    return F.linear(x, net.weight(2 + c % 2, x.shape[-1]), bias)


def _from_left(net: Network, x: Tensor, c: int) -> Tensor:
    x = _matrix(x)
    return net.weight(1 + c % 3, x.shape[-2]) @ x


def _batched(net: Network, x: Tensor, c: int) -> Tensor:
    x = _cube(x)
    return torch.bmm(x, net.weight(len(x), x.shape[2], 2)) if c % 2 else torch.bmm(net.weight(len(x), 2, x.shape[1]), x)


def _cube(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], -1) if x.dim() >= 3 else _matrix(x)[None]


def _image(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else _cube(x)[:, :, None]


def _conv1d(net: Network, x: Tensor, c: int) -> Tensor:
    x = _cube(x)
    channels, size = x.shape[1:]
    groups = channels if c % 5 == 4 else 1
    kernel = min(size, 1 + c % 3)
    out = groups * (1 + c % 2)
    bias = net.weight(out) if c % 2 else None
    w = net.weight(out, channels // groups, kernel)
    return F.conv1d(x, w, bias, stride=1 + c % 2, padding=c % 2, groups=groups)


def _conv2d(net: Network, x: Tensor, c: int) -> Tensor:
    x = _image(x)
    channels, h, w = x.shape[1:]
    if c % 5 == 3:
        return F.conv_transpose2d(x, net.weight(channels, 2, 1 + c % 2, 2), stride=(1, 2))
    weight = net.weight(2, channels, min(h, 2), min(w, 2))
    return F.conv2d(x, weight, net.weight(2) if c % 3 else None, padding=c % 2, dilation=1)


def _attention(net: Network, x: Tensor, c: int) -> Tensor:
    x = _cube(x)
    width = x.shape[2]
    q, k, v = (x @ net.weight(width, 3 * 2)).split(2, -1)
    if c % 3 == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=bool(c % 2))
    if c % 3 == 1:
        return ((q @ k.mT) / 2**0.5).softmax(-1) @ v
    return torch.einsum("btd,bsd->bts", q, k).softmax(-2).transpose(1, 2).bmm(v)


def _layer_norm(net: Network, x: Tensor, c: int) -> Tensor:
    x = _matrix(x)
    if c % 3 == 0:
        return F.layer_norm(x, x.shape[-1:], eps=0.1)
    # The second derivative of torch's layer_norm is wrong for a bias without a weight.
    return F.layer_norm(
        x, x.shape[-1:], net.weight(x.shape[-1]), net.weight(x.shape[-1]) if c % 3 == 1 else None, eps=0.1
    )


def _group_norm(net: Network, x: Tensor, c: int) -> Tensor:
    x = _cube(x)
    x = torch.cat([x, x.sin()], 2)
    return F.group_norm(x, 1, net.weight(x.shape[1]) if c % 2 else None, eps=0.1)


def _batch_norm(net: Network, x: Tensor, c: int) -> Tensor:
    x = torch.cat([_cube(x), _cube(x).flip(0) + 1])
    return F.batch_norm(x, None, None, net.weight(x.shape[1]) if c % 2 else None, None, training=True, eps=0.1)


def _embedding(net: Network, x: Tensor, c: int) -> Tensor:
    x = _matrix(x)
    table = net.weight(4, x.shape[-1])
    index = torch.arange(x[..., 0].numel()).reshape(x.shape[:-1]) * (1 + c % 3) % 4
    return x + (F.embedding(index, table) if c % 2 else table[index])


def _scaled(net: Network, x: Tensor, c: int) -> Tensor:
    shape = [n if c >> d & 1 else 1 for d, n in enumerate(x.shape)]
    return (x + net.weight(*shape)) if c % 5 == 0 else (x * net.weight(*shape))


def _used_often(net: Network, x: Tensor, c: int) -> Tensor:
    x = _matrix(x)
    w = net.weight(x.shape[-1], x.shape[-1])
    return torch.tanh(x @ w) @ (w.T if c % 2 else w) + (w.square().sum() if c % 3 else x)


def _in_place(net: Network, x: Tensor, c: int) -> Tensor:
    y = x.clone()
    y.mul_(0.5).add_(x, alpha=2)
    return (y.tanh_, y.sigmoid_, y.sub_(0.3).relu_, lambda: y.div_(3))[c % 4]()


def _split(net: Network, x: Tensor, c: int) -> Tensor:
    d = _dim(x, c)
    if not x.dim():
        return x
    if c % 4 == 0:
        return torch.cat(x.chunk(2, d)[::-1], d)
    if c % 4 == 1:
        return torch.stack(x.unbind(d), min(c // 4 % 2, x.dim() - 1)).sin()
    if c % 4 == 2:
        first, *rest = x.split(1, d)
        return torch.cat([first * 2, *rest, first], d)
    a, b = x.tensor_split(2, d)
    return torch.cat([b.cos(), a], d)


def _part(net: Network, x: Tensor, c: int) -> Tensor:
    d = _dim(x, c)
    if not x.dim():
        return x
    n = x.shape[d]
    return (
        lambda: x.narrow(d, c % n, 1), lambda: x.select(d, c % n),
        lambda: x.index_select(d, torch.tensor([c % n, 0, c % n])), lambda: x.flip(d), lambda: x.roll(1, d),
        lambda: x[..., ::2], lambda: x.gather(d, torch.zeros_like(x, dtype=torch.long)), lambda: x.unsqueeze(d),
        lambda: F.pad(x, (1, c % 2)), lambda: x.diff(dim=d) if n > 1 else x,
    )[c % 10]()  # fmt: skip


def _rearranged(net: Network, x: Tensor, c: int) -> Tensor:
    d = _dim(x, c)
    if x.dim() < 2:
        return x.reshape(-1, 1).T
    order = [*range(d, x.dim()), *range(d)]
    return (
        lambda: x.permute(order), lambda: x.transpose(d, -1), lambda: x.permute(order).reshape(x.shape),
        lambda: x.flatten(0, 1), lambda: x.reshape(-1),
        lambda: x.permute(order).contiguous().view(-1, x.shape[d - 1]), lambda: x.unsqueeze(d).squeeze(0),
        lambda: x.squeeze(), lambda: x.movedim(0, -1).flatten(1), lambda: x.mT,
    )[c % 10]()  # fmt: skip


def _reduced(net: Network, x: Tensor, c: int) -> Tensor:
    d, keep = _dim(x, c), bool(c & 8)
    if not x.dim():
        return x.sum() + x.mean()
    return (
        lambda: x.sum(d, keepdim=keep), lambda: x.mean(d, keepdim=keep), lambda: x.mean(),
        lambda: x.sum((0, -1) if x.dim() > 1 else 0), lambda: x.logsumexp(d, keepdim=keep),
        lambda: x.amax(d, keepdim=keep), lambda: x.var(d, keepdim=keep, correction=0),
        lambda: (x.square().sum(d, keepdim=keep) + 1).sqrt(), lambda: x.cumsum(d), lambda: x.max(d)[0],
        lambda: x.sort(d)[0],
    )[c // 2 % 11]()  # fmt: skip


def _elementwise(net: Network, x: Tensor, c: int) -> Tensor:
    functions: list[Callable[[Tensor], Tensor]] = [
        torch.tanh, torch.sigmoid, torch.sin, F.gelu, F.silu, F.softplus, F.relu, torch.square, torch.exp,
        lambda t: (1 + t * t).sqrt(), lambda t: 1 / (1 + t.square()), lambda t: 2 - t, lambda t: t / 3, lambda t: t**3,
        lambda t: t.clamp(-1, 0.5), torch.abs, lambda t: F.gelu(t, approximate="tanh"), lambda t: t * t.detach(),
        lambda t: torch.where(t > 0, t, t.sin()), lambda t: F.leaky_relu(t) + 1, F.hardswish, F.elu, torch.neg,
        torch.atan, lambda t: t.square() * t.cos(),
    ]  # fmt: skip
    return functions[c % len(functions)](x)


def _pooled(net: Network, x: Tensor, c: int) -> Tensor:
    x = _image(x)
    if min(x.shape[2:]) < 2:
        return F.adaptive_avg_pool2d(x, (1, 2))
    return (
        F.avg_pool2d(x, 2, 1),
        F.max_pool2d(x, 2, 1),
        F.interpolate(x, scale_factor=2.0),
        F.adaptive_avg_pool2d(x, 1),
    )[c % 4]


def _softmax(net: Network, x: Tensor, c: int) -> Tensor:
    x = _matrix(x)
    return F.log_softmax(x, _dim(x, c)) if c % 2 else x.softmax(_dim(x, c))


Operation = Callable[..., Tensor]
UNARY: dict[str, Operation] = {
    "linear": _linear, "from left": _from_left, "bmm with a parameter": _batched, "conv1d": _conv1d, "conv2d": _conv2d,
    "attention": _attention, "layer norm": _layer_norm, "group norm": _group_norm, "batch norm": _batch_norm,
    "embedding": _embedding, "scaled": _scaled, "used often": _used_often, "in place": _in_place, "split": _split,
    "part": _part, "rearranged": _rearranged, "reduced": _reduced, "elementwise": _elementwise, "pooled": _pooled,
    "softmax": _softmax,
}  # fmt: skip


def _product(net: Network, x: Tensor, y: Tensor, c: int) -> Tensor:
    x = _matrix(x)
    return x @ fit(y, (*x.shape[:-2], x.shape[-1], 2) if c % 2 else (x.shape[-1], 2))


def _concatenated(net: Network, x: Tensor, y: Tensor, c: int) -> Tensor:
    if not x.dim():
        return torch.stack([x, y.mean()])
    d = _dim(x, c)
    like = [2 if i == d else n for i, n in enumerate(x.shape)]
    return (
        torch.cat([x, fit(y, like)], d),
        torch.stack([x, fit(y, x.shape), x], d),
        torch.cat([x, x, fit(y, like)], d),
    )[c % 3]


def _combined(net: Network, x: Tensor, y: Tensor, c: int) -> Tensor:
    """An elementwise function of two results, the second broadcast in some dimensions."""
    shape = [n if c >> (d + 3) & 1 else 1 for d, n in enumerate(x.shape)]
    y = fit(y, shape if c % 2 else x.shape)
    return (
        lambda: x + y, lambda: x - y, lambda: x * y, lambda: x / (1 + y.square()), lambda: torch.where(x > y, x, y),
        lambda: torch.addcmul(x, y, y, value=0.5), lambda: torch.maximum(x, y), lambda: x.lerp(y.expand_as(x), 0.3),
        lambda: torch.rsub(x, y, alpha=2), lambda: torch.atan2(x, y.square() + 1),
        lambda: F.mse_loss(x, y.expand_as(x)), lambda: x.clone().mul_(y), lambda: x.clone().add_(y, alpha=-1.5),
    )[c % 13]()  # fmt: skip


BINARY: dict[str, Operation] = {"product": _product, "concatenated": _concatenated, "combined": _combined}
OPERATIONS = [*UNARY, *BINARY]


def loss(output: Tensor, choice: int) -> Tensor:
    """Return a loss that is bounded below, or the cross-entropy of the last elements."""
    if choice % 3 == 0:
        return F.cross_entropy(output[None], torch.tensor([choice % len(output)]))
    if choice % 3 == 1:
        return (output.tanh() - 0.3).square().mean()
    return (1 + output.square()).log().sum()
