"""Derivatives of the loss of the first batch compared with central differences, along a random unit vector v.

    (L(w + e v) - L(w - e v)) / 2e  =  <g(w + e v) + g(w - e v), v> / 2  +  O(e^2)
    (g(w + e v) - g(w - e v)) / 2e  =  H v  +  O(e^2)

The first equation holds if g is the gradient of the loss, the second if H v is the derivative of g. Where one is wrong,
its two sides differ by the same amount for every step e. Where the step crosses a kink, as of ReLU, they do not, and
nothing follows. Parameters move together first, in groups, then those of single blocks. They are replaced, never
written to.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from blockhess.hvp.autograd import AutogradEngine
from blockhess.hvp.causes import likely_cause
from blockhess.hvp.operator import Column, Engine, norm
from blockhess.problem import graph
from blockhess.problem.blocks import Block, BlockInfo, Piece
from blockhess.problem.memory import release_unused
from blockhess.problem.problem import Problem
from blockhess.problem.shards import is_shard, local, part_of, whole
from blockhess_ext.operator_checks import least_size

# Steps relative to the parameters, as powers of the machine epsilon. The first one suits smooth losses, the second one
# crosses fewer kinks, the third one has less rounding.
STEPS = (3 / 8, 1 / 2, 1 / 4)
# Factor between one rounding error and that of a sum of many.
GROWTH = 10
# Largest part of a product that may be wrong in a block that is confirmed.
RESOLUTION = 0.1
# Parameters move together up to this number of elements, unless memory is small.
LARGEST_GROUP = 2**25
# Blocks of a group that are also compared alone, at most.
MOST_ALONE = 4


class DerivativeMismatch(ValueError):
    """The gradient is not that of the loss, or products are not derivatives of the gradient."""


class Differences:
    """Central differences of the loss of the first batch and of its gradient, and products by an engine.

    Args:
        problem: model, loss, data, blocks.
        engine: class of the engine. Products of others than autograd are no derivatives by autograd, and not compared.
        largest_group: number of elements up to which parameters move together, or one at a time.

    Attributes:
        problem: with the groups as additional blocks.
        groups: numbers of additional blocks, one for each group of parameters.
        eps: largest machine epsilon of the operations between parameters and loss.
        undecided: blocks that groups that agree do not confirm.
        left_open: by block, the largest error of a product with a unit vector that a group leaves open.
        is_defined: whether the loss was found beside the parameters.
        captured: converted parameters whose originals the loss depends on, by name.
        gradients: gradient by name, for the parameters that the loss depends on; empty for a sharded model.
        gradient_error: norm of the difference between the gradients in both precisions; 0 before `compare_gradients`.
    """

    def __init__(
        self,
        problem: Problem,
        engine: Callable[[Problem], Engine] = AutogradEngine,
        largest_group: int = LARGEST_GROUP,
    ) -> None:
        self.engine, self.largest_group = engine, largest_group
        self._padding = _FixedPadding()
        with self._padding:
            loss = problem.evaluate(problem.batches[0])
        self._loss = problem.ranks.same(loss.item())
        self.eps = graph.largest_eps(graph.differentiable_nodes([loss.grad_fn], second_order=False))
        pieces = {piece.name: Piece(piece.name, piece.tensor) for block in problem.blocks for piece in block.pieces}
        replaced = {name: p.tensor for name, p in pieces.items() if p.tensor is not problem.parameters[name]}
        self.captured: dict[str, Tensor] = {}
        self.undecided: set[int] = set()
        self.gradient_error = 0.0
        self._distances: dict[str, tuple[float, float]] = {}
        self.left_open: dict[int, float] = {}
        self.is_defined = True
        with problem.explained(0):
            if replaced:
                found = problem.differentiate(loss, list(replaced.values()), retain_graph=True)
                self.captured = {name: p for (name, p), g in zip(replaced.items(), found) if g is not None}
            found = problem.differentiate(loss, list(problem.parameters.values()))
        self.gradients = {name: g for name, g in zip(problem.parameters, found) if g is not None}
        # Subnormal numbers have the rounding of the least normal one.
        self._largest = max(
            [least_size(problem.dims, problem.dtype), *(norm(whole(g)) for g in self.gradients.values())]
        )
        if problem.is_sharded:
            self.gradients = {}
        self._rms = rms(problem)
        joined = [_joined([pieces[name] for name in group]) for group in parameter_groups(problem, largest_group)]
        self.problem, self.groups = copy.copy(problem), range(len(problem.dims), len(problem.dims) + len(joined))
        self.problem.blocks = (*problem.blocks, *joined)
        self.problem.infos = (*problem.infos, *(block.info for block in joined))
        self.problem.dims = [block.info.dim for block in self.problem.blocks]

    def products(self, numbers: Sequence[int]) -> dict[int, Tensor]:
        """Return H_l v of some blocks by the engine, with v = `unit_vector`."""
        if not numbers:
            return {}
        problem = self.problem.restricted(numbers)
        engine = self.engine(problem)
        # One at a time, so that there is one vector beside the products.
        return {number: unit_products(problem, engine, [number])[number] for number in numbers}

    def terms(self, number: int, products: Tensor) -> float:
        """Return the size of H_l w, whose rounding is that of the gradient, or 0 if it is unknown."""
        size = block_norm(self.problem, number, self._rms)
        terms = math.sqrt(self.problem.dims[number]) * norm(products) * size
        return terms if math.isfinite(terms) else 0.0

    def compare_gradients(self, other: Differences) -> None:
        """Compare the gradient with that of the other precision, for `differs_from`."""
        for name in dict.fromkeys([*self.gradients, *other.gradients]):
            given = [g[name].double() for g in (self.gradients, other.gradients) if name in g]
            difference = norm(given[0] - given[1] if len(given) == 2 else given[0])
            self._distances[name] = difference, norm(given[0])
            self.gradient_error = math.hypot(self.gradient_error, difference)

    def differs_from(self, other: Differences, terms: float) -> str:
        """Return how the gradient differs from that of the other precision by more than rounding, or "".

        Args:
            other: that of `compare_gradients`.
            terms: largest ones known. A gradient that vanishes has their rounding.
        """
        eps = max(self.eps, other.eps)
        if torch.get_float32_matmul_precision() != "highest":
            eps = max(eps, torch.finfo(torch.bfloat16).eps)
        least = 1e3 * eps * max(terms, self._largest, other._largest)
        for name, (difference, size) in self._distances.items():
            if not difference <= eps**0.25 * size + least:
                return f"the gradient of {name!r} differs by {difference:.3g}, of {size:.3g}"
        return ""

    def group_agrees(self, number: int, products: Tensor, norms: Mapping[int, float]) -> bool:
        """Return whether the derivatives with a group agree with differences; False if that is undecided.

        Args:
            number: one of `groups`.
            products: as for `agree`.
            norms: |H_l v| by block, of those that are known and not zero.

        Raises:
            DerivativeMismatch: those with a block that has parameters of the group do not.
        """
        release_unused()  # what multiplying took
        found = self._compare(number, products, 0.0, RESOLUTION)
        if any(comparison.is_fault for comparison in found):
            # In which block? If in none, only products that mix blocks are wrong.
            for l in self._with_parameters(self.problem.infos[number].parameters):
                self.agree(l, self.products([l])[l])
        unequal = [] if len(found) == 1 else self._unequal_blocks(number, products[0], found[1], norms)
        alone = self.products(unequal[:MOST_ALONE])
        self.undecided |= {l for l in unequal if l not in alone or not self.agree(l, alone[l])}
        return all(comparison.agrees for comparison in found)

    def _unequal_blocks(
        self, number: int, products: Tensor, found: _Comparison, norms: Mapping[int, float]
    ) -> list[int]:
        """Return the blocks that a group does not confirm, most unequal first.

        The error of a block with little curvature is small in the norm over all parameters, and also beside products
        with the parameters of other blocks.
        """
        names = self.problem.blocks[number].parameters
        sizes = [piece.tensor.numel() for piece in self.problem.blocks[number].pieces]
        if found.best is None:
            self.is_defined = False
            return []
        errors, lengths = (dict(zip(names, _part_norms(t, sizes))) for t in (found.best, products))
        ratios: dict[int, float] = {}
        for l in self._with_parameters(names):
            own = [name for name in self.problem.infos[l].parameters if name in errors]
            error = math.hypot(*(errors[name] for name in own))
            share = math.sqrt(self.problem.dims[l] / self.problem.dims[number])
            self.left_open[l] = math.hypot(self.left_open.get(l, 0.0), error / share)
            bound = GROWTH * found.tolerance * math.hypot(*(lengths[name] for name in own))
            bound = min(bound, RESOLUTION * share * norms.get(l, math.inf))
            ratios[l] = error / max(bound, sys.float_info.min)
        return [l for l in sorted(ratios, key=lambda l: -ratios[l]) if ratios[l] > 1]

    def blocks_in(self, groups: Iterable[int]) -> list[int]:
        """Return the blocks that have parameters of one of the groups."""
        names = [name for number in groups for name in self.problem.infos[number].parameters]
        return sorted(filter(self.problem.is_used, self._with_parameters(names)))

    def _with_parameters(self, names: Sequence[str]) -> list[int]:
        """Return the blocks that have one of some parameters, in the order of the parameters."""
        owners: dict[str, list[int]] = {}
        for l in range(self.groups.start):
            for name in self.problem.infos[l].parameters:
                owners.setdefault(name, []).append(l)
        return list(dict.fromkeys(l for name in names for l in owners.get(name, ())))

    def agree(self, number: int, products: Tensor, error: float = 0.0, is_zero: bool = False) -> bool:
        """Return whether the derivatives with a block agree with differences; False if that is undecided.

        Args:
            number: index of the block.
            products: H_l v (1, dim), with v = `unit_vector`. Of others than those of autograd, only the norm is used.
            error: norm of its rounding error.
            is_zero: the products are zero within that, so that differences need not resolve them.

        Raises:
            DerivativeMismatch: they do not.
        """
        found = self._compare(number, products, error, math.inf if is_zero else RESOLUTION)
        for comparison in found:
            if comparison.is_fault:
                name, cause = self.problem.infos[number].name, likely_cause(self.problem, number)
                raise DerivativeMismatch(f"spectrum: {comparison.text.format(repr(name))}: {cause}")
        return all(comparison.agrees for comparison in found)

    def _compare(self, number: int, products: Tensor, error: float, resolution: float) -> list[_Comparison]:
        """Compare with differences for the first step, and for the others until one agrees."""
        v, curvature = unit_vector(self.problem, number)[0], norm(products)
        size = block_norm(self.problem, number, self._rms)
        tangents = self.problem.blocks[number].spread(v, self.problem.parameters)
        rounding = GROWTH * self.eps * (self._largest + self.terms(number, products))
        first = _Comparison(self.eps, "the gradient of block {} is not that of the loss")
        second = _Comparison(self.eps, "products of block {} are not derivatives of its gradient", resolution)
        tiny = torch.finfo(self.problem.dtype).tiny
        compared = [first, second] if self.engine is AutogradEngine else [first]

        def take(step: float) -> None:  # which frees the gradients before the next step
            (loss, g), (loss_, g_) = (self._at(number, tangents, s) for s in (step, -step))
            slope = (_dot(g, v) + _dot(g_, v)) / 2
            usual = (norm(g) + norm(g_)) / (2 * math.sqrt(len(v)))
            of_loss = rounding + GROWTH * self.eps * max(abs(self._loss), tiny) / step
            first.add(step, torch.tensor((loss - loss_) / (2 * step) - slope, device="cpu"), usual, of_loss)
            if len(compared) > 1:
                g = g.double().sub_(g_).div_(2 * step).sub_(products[0])
                second.add(step, g, curvature, rounding / step + GROWTH * error)

        for power in STEPS:
            # Beside w, the loss may be undefined, or the model raise any error. Processes that share it must not go on.
            with nullcontext() if self.problem.is_sharded else suppress(Exception):
                take(self.eps**power * size)
            if all(comparison.agrees for comparison in compared):
                return compared
        step = second.faulty_step()
        if step is not None:
            # A kink at w itself may leave the gradient continuous; then its derivatives differ to the two sides.
            g, middle, g_ = (self._at(number, tangents, s)[1].double() for s in (step, 0.0, -step))
            second.is_sided = norm(g - 2 * middle + g_) / (2 * step) > second.error / GROWTH
        return compared

    def _at(self, number: int, tangents: Mapping[str, Tensor], step: float) -> tuple[float, Tensor]:
        """Return the loss, and its gradient (dim,) with respect to a block, at w + step * tangents."""
        problem, names = self.problem, self.problem.blocks[number].parameters
        with moved(problem, tangents, step):
            with self._padding:
                loss = problem.evaluate(problem.batches[0])
            found = problem.differentiate(loss, [problem.parameters[name] for name in names])
        return problem.ranks.same(loss.item()), flattened(problem, number, dict(zip(names, found)))


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


class _FixedPadding(graph.DispatchMode):
    """Keeps the looked-up row at padding_idx, a constant of gradients, at its value in the first evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[Tensor] = []

    def __enter__(self) -> Any:
        self._calls = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.embedding.default or len(args) < 3 or args[2] < 0:
            return out
        table, indices, padding = args[:3]
        if self._calls == len(self._rows):
            self._rows.append(table[padding].clone())
        self._calls += 1
        return torch.where((indices == padding).unsqueeze(-1), self._rows[self._calls - 1], out)


class _Comparison:
    """Differences minus derivatives, for several steps.

    Args:
        eps: machine epsilon.
        text: what is wrong where they differ.
        resolution: largest difference relative to the derivative, whatever the rounding.

    Attributes:
        tolerance: error relative to the derivative that differences may have by themselves.
        agrees: whether they are equal up to rounding, for one of the steps.
        is_sided: whether there is another derivative to each side.
    """

    def __init__(self, eps: float, text: str, resolution: float = math.inf) -> None:
        self._text, self.tolerance, self._resolution = text, GROWTH * eps**0.5, resolution
        self._found: dict[float, tuple[Tensor, float, float]] = {}
        self.agrees = self.is_sided = False

    def add(self, step: float, difference: Tensor, size: float, rounding: float) -> None:
        """Add the difference for a step, given the usual size of the derivative, and the rounding error."""
        self._found[step] = difference, size, rounding
        error = norm(difference)
        is_resolved = self._resolution == math.inf or error <= self._resolution * size
        self.agrees |= is_resolved and error <= self.tolerance * size + rounding

    def faulty_step(self) -> float | None:
        """Return the smallest step with little rounding, if the difference does not depend on the step."""
        ordered = [] if self.agrees else sorted(self._found)
        for step, next_step in itertools.pairwise(ordered):
            (smaller, size, rounding), (larger, *_) = self._found[step], self._found[next_step]
            error = norm(larger)
            if rounding < error / GROWTH:
                same = norm(smaller - larger) < error / GROWTH
                return step if same and error > GROWTH * self.tolerance * size else None
        return None

    @property
    def best(self) -> Tensor | None:
        """The smallest difference, or None if the loss is undefined beside the parameters."""
        return min((found[0] for found in self._found.values()), key=norm, default=None)

    @property
    def is_fault(self) -> bool:
        """Whether the derivative is wrong."""
        return not self.is_sided and self.faulty_step() is not None

    @property
    def error(self) -> float:
        """Norm of the difference for the smallest step."""
        return norm(self._found[min(self._found)][0])

    @property
    def text(self) -> str:
        """What is wrong, and how much."""
        return f"{self._text} (differ by {self.error:.3g}, of {self._found[min(self._found)][1]:.3g})"


def _part_norms(vector: Tensor, sizes: Sequence[int]) -> list[float]:
    return [norm(part) for part in vector.split(list(sizes))]


def parameter_groups(problem: Problem, largest: int) -> list[list[str]]:
    """Return the names of the parameters in groups of at most `largest` elements, or of one parameter."""
    groups: list[list[str]] = []
    room = 0
    for name, parameter in problem.parameters.items():
        if not groups or parameter.numel() > room:
            groups.append([])
            room = largest
        groups[-1].append(name)
        room -= parameter.numel()
    return groups


def _joined(pieces: Sequence[Piece]) -> Block:
    """Return a block of whole parameters, named after them."""
    dim, names = sum(piece.tensor.numel() for piece in pieces), tuple(piece.name for piece in pieces)
    label = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return Block(BlockInfo(label, (dim,), dim, names), tuple(pieces))


def unit_vector(problem: Problem, number: int) -> Tensor:
    """Return the random unit vector (1, dim) of a block, the same in every precision."""
    v: Tensor = torch.randn(
        1,
        problem.dims[number],
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(number),
        device="cpu",
    )
    v /= v.norm()
    return v.to(problem.device, problem.dtype)


def unit_products(problem: Problem, engine: Engine, numbers: Sequence[int]) -> dict[int, Tensor]:
    """Return H_l v of some blocks by an engine of the problem, with v = `unit_vector`."""
    engine.prepare(0)
    columns = []
    for number in numbers:
        vectors = unit_vector(problem, number)
        columns.append(Column(number, vectors, torch.zeros_like(vectors)))
    for _ in engine.multiply([column for column in columns if problem.is_used(column.number)], 1.0):
        pass
    return {column.number: column.products for column in columns}


def rms(problem: Problem) -> float:
    """Return the root mean square of all parameters."""
    norms = [norm(whole(p.detach())) for p in problem.parameters.values()]
    return math.hypot(*norms) / math.sqrt(sum(p.numel() for p in problem.parameters.values()))


def block_norm(problem: Problem, number: int, rms: float, floor: float = 1e-3) -> float:
    """Return the norm of the parameters of a block, or `floor` times the usual one where they are nearly zero."""
    size = norm(flattened(problem, number, problem.parameters))
    return max(size, math.sqrt(problem.dims[number]) * (floor * rms or 1.0))


def flattened(problem: Problem, number: int, tensors: Mapping[str, Tensor | None]) -> Tensor:
    """Return the entries of a block in tensors by name, (dim,)."""
    flat = torch.zeros(1, problem.dims[number], dtype=problem.dtype, device=problem.device)
    detached = {name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()}
    problem.blocks[number].accumulate(detached, flat)
    return flat[0]


@contextmanager
def moved(problem: Problem, tangents: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """Replace the values of parameters by w + step * tangents within the context, wherever they are used."""
    with ExitStack() as stack:
        for name, tangent in tangents.items():
            parameter = problem.parameters[name]
            if is_shard(parameter):
                shard = local(parameter.detach())
                stack.callback(shard.copy_, shard.clone())
                shard.add_(part_of(tangent, parameter), alpha=step)
                continue
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = parameter.data.add(tangent, alpha=step)
        yield
