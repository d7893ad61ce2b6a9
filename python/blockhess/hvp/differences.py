"""Derivatives of the loss compared with central differences, along a random unit vector v of a block.

    (L(w + e v) - L(w - e v)) / 2e      =  <g_l(w + e v) + g_l(w - e v), v> / 2  +  O(e^2)
    (g_l(w + e v) - g_l(w - e v)) / 2e  =  H_l v                                 +  O(e^2)

The first equation holds if g_l is the gradient of the loss, the second if H_l v is the derivative of g_l. Where a
derivative is wrong, the two sides differ by the same amount for every step e. Where a kink lies within the step, as of
ReLU, they do not, and the comparison is undecided. The parameters are replaced, never written to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from blockhess.problem import graph
from blockhess.problem.problem import Problem

# Steps relative to the parameters, as powers of the machine epsilon. The first one suits smooth losses, the second one
# crosses fewer kinks, the third one has less rounding.
STEPS = (3 / 8, 1 / 2, 1 / 4)
# Factor between one rounding error and that of a sum of many.
GROWTH = 10


class DerivativeMismatch(ValueError):
    """A gradient is not that of the loss, or products are not derivatives of the gradient."""


class Differences:
    """Central differences of the loss of the first batch and of its gradient.

    Args:
        problem: model, loss, data, blocks.

    Attributes:
        eps: largest machine epsilon of the operations between parameters and loss.
        gradients: gradient by name, for the parameters that the loss depends on.
        captured: converted parameters whose originals the loss depends on, by name.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        loss = problem.evaluate(problem.batches[0])
        self._loss = loss.item()
        nodes = graph.differentiable_nodes([loss.grad_fn])
        dtypes = {made.dtype for node in nodes for made in node._input_metadata}  # type: ignore[attr-defined]
        del nodes
        self.eps = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
        originals = {piece.name: piece.tensor for block in problem.blocks for piece in block.pieces}
        replaced = {name: p for name, p in originals.items() if p is not problem.parameters[name]}
        self.captured: dict[str, Tensor] = {}
        if replaced:
            found = problem.differentiate(loss, list(replaced.values()), retain_graph=True)
            self.captured = {name: p for (name, p), gradient in zip(replaced.items(), found) if gradient is not None}
        found = problem.differentiate(loss, list(problem.parameters.values()))
        self.gradients = {name: g for name, g in zip(problem.parameters, found) if g is not None}
        self._largest = max(float(g.norm()) for g in self.gradients.values())
        norms = [float(p.detach().norm()) for p in problem.parameters.values()]
        self._rms = math.hypot(*norms) / sum(p.numel() for p in problem.parameters.values()) ** 0.5

    def size(self, number: int) -> float:
        """Return the norm of the parameters of a block, or one of usual size where they are nearly zero."""
        norm = float(_flat(self._problem, number, self._problem.parameters).norm())
        return max(norm, self._problem.dims[number] ** 0.5 * (1e-3 * self._rms or 1.0))

    def other_gradient(self, other: Differences, terms: float) -> str:
        """Return how the gradient differs from that of the other precision by more than rounding, or "".

        Args:
            terms: size of the terms of a gradient that vanishes.
        """
        eps = max(self.eps, other.eps)
        if torch.get_float32_matmul_precision() != "highest":
            eps = max(eps, torch.finfo(torch.bfloat16).eps)
        terms = max(terms, self._largest, other._largest)
        for name in self.gradients.keys() | other.gradients.keys():
            given = [g[name].double() for g in (self.gradients, other.gradients) if name in g]
            difference = float((given[0] - given[1] if len(given) == 2 else given[0]).norm())
            size = float(given[0].norm())
            if not difference <= eps**0.25 * size + 1e3 * eps * terms:
                return f"the gradient of {name!r} differs by {difference:.3g}, of {size:.3g}"
        return ""

    def agree(self, number: int, product: Tensor, error: float = 0.0, hessian: bool = True) -> bool:
        """Return whether the derivatives of a block agree with differences, up to rounding; False if undecided.

        Args:
            number: index of the block.
            product: H_l v (1, dim), with v = `unit_vector`.
            error: norm of its rounding error.
            hessian: whether to compare the product; a Gauss-Newton product is no derivative.

        Raises:
            DerivativeMismatch: the gradient is not that of the loss, or the product is not its derivative.
        """
        problem, name, root = self._problem, self._problem.infos[number].name, self._problem.dims[number] ** 0.5
        v, size, curvature = unit_vector(problem, number)[0].double(), self.size(number), float(product.norm())
        tangents = problem.blocks[number].spread(v, problem.parameters)
        rounding = GROWTH * self.eps * (self._largest + root * curvature * size)
        slope = _Comparison(self.eps, f"the gradient of block {name!r} is not that of the loss")
        second = _Comparison(self.eps, f"products of block {name!r} are not derivatives of its gradient")
        for power in STEPS:
            step = self.eps**power * size
            with suppress(RuntimeError, ValueError, ArithmeticError):  # beside w, the loss may be undefined
                (loss, gradient), (loss_, gradient_) = (self._at(number, tangents, s) for s in (step, -step))
                mean = (gradient + gradient_) / 2
                error_of_loss = rounding + GROWTH * self.eps * abs(self._loss) / step
                slope.add(step, (loss - loss_) / (2 * step) - mean @ v, float(mean.norm()) / root, error_of_loss)
                if hessian:
                    difference = (gradient - gradient_) / (2 * step) - product[0]
                    second.add(step, difference, curvature, rounding / step + GROWTH * error)
            if slope.agrees and (second.agrees or not hessian):
                return True
        for comparison in (slope, second):
            if comparison.is_fault:
                raise DerivativeMismatch(f"spectrum: {comparison}: {likely_cause(problem, number)}")
        return False

    def _at(self, number: int, tangents: Mapping[str, Tensor], step: float) -> tuple[float, Tensor]:
        """Return the loss, and its gradient (dim,) by a block, at w + step * tangents."""
        problem, names = self._problem, self._problem.blocks[number].parameters
        with _moved(problem, tangents, step):
            loss = problem.evaluate(problem.batches[0])
            found = problem.differentiate(loss, [problem.parameters[name] for name in names])
        return loss.item(), _flat(problem, number, dict(zip(names, found))).double()


class _Comparison:
    """Differences minus derivatives, for several steps; `str` tells how much they differ."""

    def __init__(self, eps: float, text: str) -> None:
        self._text, self._tolerance = text, GROWTH * eps ** (1 / 3)
        self._found: dict[float, tuple[Tensor, float, float]] = {}
        self.agrees = False

    def add(self, step: float, difference: Tensor, size: float, rounding: float) -> None:
        """Add the difference for a step, given the usual size of the derivative, and the rounding error."""
        self._found[step] = difference, size, rounding
        self.agrees |= float(difference.norm()) <= self._tolerance * size + rounding

    @property
    def is_fault(self) -> bool:
        """Whether the difference does not depend on the step: of the two smallest ones with little rounding."""
        ordered = [] if self.agrees else sorted(self._found)
        for (smaller, _, rounding), (larger, _, _) in itertools.pairwise(self._found[step] for step in ordered):
            clear = float(larger.norm()) / GROWTH
            if rounding < clear:
                return float((smaller - larger).norm()) < clear
        return False

    def __str__(self) -> str:
        difference, size, _ = self._found[min(self._found)]
        return f"{self._text} (differ by {float(difference.norm()):.3g}, of {size:.3g})"


def likely_cause(problem: Problem, number: int) -> str:
    """Return what may give a block a wrong derivative, and what to do."""
    block, causes = problem.blocks[number], []
    causes += [f"the hook on {piece.name!r}" for piece in block.pieces if piece.tensor._backward_hooks]
    for name, module in problem.model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            causes.append(f"the backward hook on {name or 'the model'!r} ({type(module).__name__})")
    leaves = {problem.parameters[name] for name in block.parameters}
    loss = problem.evaluate(problem.batches[0])
    for node in _between(loss, leaves):
        if isinstance(node, BackwardCFunction) and node.name() != "BackwardHookFunctionBackward":
            function = getattr(type(node), "_forward_cls", type(node))
            causes.append(f"the torch.autograd.Function {function.__qualname__}")
    if causes:
        found = " or ".join(dict.fromkeys(causes))
        return f"the cause may be {found}; remove it, or write it in plain PyTorch"
    return (
        "the cause may be a detach(), .data or no_grad(), or a hook on a tensor, between this block and the loss; "
        "write it in plain PyTorch"
    )


def _between(loss: Tensor, leaves: Iterable[Tensor]) -> list[Node]:
    """Return the nodes of the graph of a loss from which a leaf is reached."""
    wanted = {id(leaf) for leaf in leaves}
    order: list[Node] = []
    waiting = [(loss.grad_fn, False)]
    reaches: dict[Node, bool] = {}
    while waiting:  # depth first; a node is decided after those that it leads to
        node, decided = waiting.pop()
        if node is None:
            continue
        if decided:
            variable = getattr(node, "variable", None)
            following = any(reaches.get(next_node, False) for next_node, _ in node.next_functions if next_node)
            reaches[node] = following or id(variable) in wanted
            order += [node] * reaches[node]
        elif node not in reaches:
            reaches[node] = False
            waiting.append((node, True))
            waiting += [(next_node, False) for next_node, _ in node.next_functions]
    return order


def unit_vector(problem: Problem, number: int) -> Tensor:
    """Return the random unit vector (1, dim) of a block, the same in every precision."""
    v = torch.randn(1, problem.dims[number], dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    return (v / v.norm()).to(problem.device, problem.dtype)


def _flat(problem: Problem, number: int, tensors: Mapping[str, Tensor | None]) -> Tensor:
    """Return the entries of a block in tensors by name, (dim,)."""
    flat = torch.zeros(1, problem.dims[number], dtype=problem.dtype, device=problem.device)
    detached = {name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()}
    problem.blocks[number].accumulate(detached, flat)
    return flat[0]


@contextmanager
def _moved(problem: Problem, tangents: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """Replace the values of parameters by w + step * tangents within the context, wherever they are used."""
    with ExitStack() as stack:
        for name, tangent in tangents.items():
            parameter = problem.parameters[name]
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = parameter.data.add(tangent, alpha=step)
        yield
