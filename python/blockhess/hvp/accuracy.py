"""Checks of Hessian-vector products before a run, and their rounding error, with one random vector per block.

On the first batch, float32 products are compared with float64 products, if these are of the same function. For float64,
the difference to float32 products is scaled by the ratio of the machine epsilons. Traced products are also compared
with those of autograd, and these with differences of gradients, see differences.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blockhess.hvp.autograd import AutogradEngine
from blockhess.hvp.difference import DifferenceEngine
from blockhess.hvp.differences import GROWTH, LARGEST_GROUP, Differences, flattened, unit_products
from blockhess.hvp.ggn import GaussNewtonEngine
from blockhess.hvp.operator import Engine, norm
from blockhess.hvp.traced.engine import TracedEngine
from blockhess.hvp.traced.operations import NotTraceable
from blockhess.problem.memory import release_unused
from blockhess.problem.problem import Problem
from blockhess_ext.operator_checks import least_size

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Accuracy:
    """Error of the product with a random unit vector v, by index of the block.

    Attributes:
        norms: |H_l v|, computed in float64 where that is the same function.
        errors: norm of the error of H_l v; empty if it is unknown.
        confirmed: the blocks whose derivatives agree with differences, also of others than those that were multiplied.
        unknown: why the errors are unknown, or "".
        gradient_error: norm of the error of the gradient, or its usual size if that is unknown.
        undecided: the blocks whose derivatives were compared with differences, without a result.
        left_open: by confirmed block, the largest error of H_l v that was not ruled out, where products are unknown.
        is_defined: whether the loss was found beside the parameters.
    """

    norms: Mapping[int, float]
    errors: Mapping[int, float]
    confirmed: frozenset[int]
    unknown: str = ""
    gradient_error: float = 0.0
    undecided: frozenset[int] = frozenset()
    left_open: Mapping[int, float] = field(default_factory=dict)
    is_defined: bool = True

    def is_zero(self, number: int) -> bool:
        """Return whether a block is zero within the error, by products and by differences."""
        return number in self.confirmed and self.norms[number] <= self.errors.get(number, -1.0)


def gradient(problem: Problem, accuracy: Accuracy) -> Tensor:
    """Return the gradient of all data (sum(dims),), or zeros if it is within the error of that of the first batch."""
    found = problem.gradient()
    return torch.zeros_like(found) if _is_rounding(problem, accuracy, norm(found)) else found


def gradient_norms(problem: Problem, accuracy: Accuracy) -> list[float]:
    """Return the norm of `gradient` for every block; of a sharded model, one block is gathered at a time."""
    if problem.is_sharded:
        shards = problem.sharded_gradient()
        parts: Iterable[Tensor] = (flattened(problem, l, shards) for l in range(len(problem.dims)))
    else:
        parts = torch.split(problem.gradient(), problem.dims)
    norms = [norm(part) for part in parts]
    return [0.0] * len(norms) if _is_rounding(problem, accuracy, math.hypot(*norms)) else norms


def _is_rounding(problem: Problem, accuracy: Accuracy, size: float) -> bool:
    sums = 1 if problem.loss.averaged else problem.n_batches
    return size <= GROWTH * sums * accuracy.gradient_error


class EngineMismatch(ArithmeticError):
    """The products of an engine differ from those of autograd."""


def measure(
    problem: Problem,
    engine: Engine,
    numbers: Sequence[int] | None = None,
    groups: int | None = None,
    largest_group: int = LARGEST_GROUP,
) -> Accuracy:
    """Check products with some blocks, by default all, and estimate their error.

    Traced products are made for every block alone, and for all of them together, as in a run. Differences are taken
    along all parameters of a group, along single blocks whose products are zero within their error, and along every
    third block of groups that are undecided; without groups, along all of these blocks. Products that are differences
    themselves are compared with those of another step.

    Args:
        problem, engine: what to check.
        numbers: indices of the blocks.
        groups: how many groups of parameters to compare with differences, by default all.
        largest_group: number of elements up to which parameters are in a group.

    Raises:
        EngineMismatch: traced products differ from those of autograd by more than rounding.
        NotTraceable: a traced program does not run.
        DerivativeMismatch: the gradient is not that of the loss, or products are not its derivatives.
        ValueError: the parameters are converted, and the loss uses those that it captured.
    """
    numbers = range(len(problem.dims)) if numbers is None else numbers
    if isinstance(engine, DifferenceEngine):
        return _of_differences(problem, engine, numbers, largest_group)
    try:
        own = unit_products(problem, engine, numbers)
        alone = {}
        if isinstance(engine, TracedEngine) and engine.rows > 1:
            alone = {l: unit_products(problem, engine, [l])[l] for l in numbers}
    except RuntimeError as error:
        if not isinstance(engine, TracedEngine) or isinstance(error, NotImplementedError):
            raise
        raise NotTraceable(f"a program fails: {str(error).splitlines()[0]}") from error
    here = Differences(problem, GaussNewtonEngine if engine.name == "ggn" else AutogradEngine, largest_group)
    if here.captured:
        name, parameter = next(iter(here.captured.items()))
        raise ValueError(
            f"spectrum: dtype must be {parameter.dtype} where loss_fn uses parameters that it captured, such as "
            f"{name!r}, got {problem.dtype}; use those of the model that loss_fn is given"
        )
    double = problem.dtype == torch.float64
    groups = len(here.groups) if groups is None else groups
    chosen = [here.groups[(2 * i + 1) * len(here.groups) // (2 * groups)] for i in range(groups)]
    together = chosen if len(chosen) == 1 else []  # of several groups, one product at a time is in memory
    moved = here.products(together) if double else {}
    there, repeat, unknown = _repeat(problem, numbers, here, moved, chosen)
    expected = own
    if isinstance(engine, TracedEngine):
        expected = here.products(numbers)
        for traced in filter(None, (own, alone)):
            _check(problem, traced, expected, repeat)
    noise = {l: _distance(own[l], repeat[l]) for l in numbers} if repeat else {}
    noise = {l: distance for l, distance in noise.items() if math.isfinite(distance)}
    if not noise:
        unknown = unknown or "products are not finite"
    if there is None or repeat is None or double:
        there, repeat = here, expected | (moved or here.products(together))
    scale = torch.finfo(torch.float64).eps / EPS if double else 1.0
    norms = {l: norm(repeat[l]) for l in numbers}
    errors = {l: scale * error for l, error in noise.items()}
    gradient_error = scale * here.gradient_error
    if unknown and chosen:
        gradient_error = here.eps * max(there.terms(group, _of_group(there, group, repeat)) for group in chosen)
    zero = {l for l in numbers if norms[l] <= errors.get(l, -1.0)}
    others = {l: norms[l] for l in numbers if l not in zero}
    agreed = [group for group in chosen if there.group_agrees(group, _of_group(there, group, repeat), others)]
    single = zero | set(there.blocks_in(set(chosen) - set(agreed))[::3]) & set(numbers)
    if not groups:
        single = set(numbers)
    confirmed = set(there.blocks_in(agreed)) - set(there.blocks_in(set(there.groups) - set(agreed))) - single
    confirmed -= there.undecided
    confirmed |= {l for l in single if there.agree(l, repeat[l], noise.get(l, 0.0) * there.eps / EPS, l in zero)}
    undecided = (set(there.blocks_in(chosen)) | single) - confirmed
    left_open = {l: error for l, error in there.left_open.items() if l in confirmed - set(numbers)}
    return Accuracy(
        norms,
        errors,
        frozenset(confirmed),
        unknown,
        gradient_error,
        frozenset(undecided),
        left_open,
        there.is_defined,
    )


def _of_group(differences: Differences, group: int, products: Mapping[int, Tensor]) -> Tensor:
    """Return the product with a group, computed unless it is known."""
    return products[group] if group in products else differences.products([group])[group]


def _of_differences(problem: Problem, engine: DifferenceEngine, numbers: Sequence[int], largest_group: int) -> Accuracy:
    """Return the error of products by differences, after comparing the gradient with differences of the loss.

    Without float64, small blocks are lost in a group: they are compared for one block at a time, as are those of a
    sharded model, which gathers no more.
    """
    steps = {l: engine.step(l) for l in numbers}
    norms = {l: step.norm for l, step in steps.items()}
    errors = {l: step.error for l, step in steps.items()}
    double: Differences | None = None
    if problem.dtype == torch.float64 and not problem.is_sharded:
        double = Differences(problem, DifferenceEngine, largest_group)
    elif not problem.is_sharded:
        with suppress(Exception):  # of any kind: the model may take one dtype only
            double = _in_dtype(problem, torch.float64, DifferenceEngine, largest_group)
    if double is None or double.captured:
        here = Differences(problem, DifferenceEngine, largest_group)
        confirmed = {l for l in numbers if here.agree(l, torch.tensor([[norms[l]]], device="cpu"))}
    else:
        here = double
        here.gradients = {}
        release_unused()
        chosen = DifferenceEngine(here.problem)
        sizes = ((group, torch.tensor([[chosen.step(group).norm]], device="cpu")) for group in here.groups)
        agreed = [group for group, size in sizes if here.group_agrees(group, size, {})]
        confirmed = set(here.blocks_in(agreed))
    gradient_error = math.hypot(*(step.gradient_error for step in steps.values()))
    undecided = frozenset(numbers) - confirmed
    return Accuracy(norms, errors, frozenset(confirmed), gradient_error=gradient_error, undecided=undecided)


def _repeat(
    problem: Problem, numbers: Sequence[int], here: Differences, moved: Mapping[int, Tensor], chosen: Sequence[int]
) -> tuple[Differences | None, dict[int, Tensor] | None, str]:
    """Return differences and products in the other precision, or None for both and why they are not comparable.

    Args:
        moved: the products with the chosen groups in float64, if that is the dtype of the problem.
        chosen: groups of parameters to multiply also. If none, an earlier call has compared the gradients.
    """
    dtype = torch.float32 if problem.dtype == torch.float64 else torch.float64
    try:
        there = _in_dtype(problem, dtype, here.engine, here.largest_group)
        if there.captured:
            return None, None, f"loss_fn uses parameters that it captured, which are not converted to {dtype}"
        if chosen:
            here.compare_gradients(there)
        here.gradients, there.gradients = {}, {}
        release_unused()
        repeat = there.products([*numbers, *([] if moved or len(chosen) > 1 else chosen)])
        release_unused()
        if chosen and (found := here.differs_from(there, 0.0)):
            terms = (there.terms(group, _of_group(there, group, moved or repeat)) for group in chosen)
            found = here.differs_from(there, max(terms))
            if found:
                return None, None, f"in {dtype} the loss is another function, {found}; does it draw random numbers?"
        return there, repeat, ""
    except Exception as error:  # of any kind: the model may take one dtype only
        cause = error.__cause__ or error
        reason = (str(cause).strip() or repr(cause)).splitlines()[0]
        return None, None, f"the loss cannot be computed in {dtype}: {reason}"


def _in_dtype(
    problem: Problem, dtype: torch.dtype, engine: Callable[[Problem], Engine], largest_group: int
) -> Differences:
    with suppress(Exception):  # most models do without another default dtype, which other threads would see
        sets_default = torch.get_default_dtype() != torch.float32
        there = Differences(problem.in_dtype(dtype, sets_default), engine, largest_group)
        if there.eps <= torch.finfo(dtype).eps:
            return there
    return Differences(problem.in_dtype(dtype), engine, largest_group)


def _distance(a: Tensor, b: Tensor) -> float:
    return norm(a.double() - b.double())


def _check(
    problem: Problem, traced: dict[int, Tensor], expected: dict[int, Tensor], repeat: dict[int, Tensor] | None
) -> None:
    # Some models compute part of their loss in float32, whatever the dtype of their parameters.
    largest = max(least_size(problem.dims, problem.dtype), *map(norm, expected.values()))
    for number, right in expected.items():
        noise = max(EPS * largest, 0.0 if repeat is None else _distance(right, repeat[number]))
        error, size = _distance(traced[number], right), norm(right)
        if error > EPS**0.5 * size + 100 * noise:
            raise EngineMismatch(
                f"products of block {problem.infos[number].name!r} differ from autograd's by {error:.3g}, of {size:.3g}"
            )
