"""From a model to its block spectra: `blockhess.spectrum`.

For every block l of the parameters, stochastic Lanczos quadrature of H_l = d2 Loss / d w_l^2 (the paper's Algorithm 5).

Promises: the model is left as it was; a block's probes do not depend on which other blocks are asked for, nor does its
result, except that reorthogonalize="auto" shares one budget among the blocks. One seed gives the same bits as far as
torch's own kernels do: some backward passes (LayerNorm's) depend on the number of threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import blockhess
import blockhess_ext
from blockhess.batches import as_batches, split_batch
from blockhess.blocks import ZERO_NOTE, BlockSpec, Partition, partition, unwrap, with_note
from blockhess.engines import BlockOperator, Engine, NotTraceable
from blockhess.engines.accuracy import Disagreement, measure
from blockhess.engines.exact import exact_quadratures
from blockhess.engines.plan import CHOICES, Plan, budget_bytes, make_plan, micro_batches, without_tracing
from blockhess.losses import as_loss
from blockhess.model_state import fixed_state, freeze_batch_statistics, has_batchnorm
from blockhess.problem import Problem
from blockhess.progress import progress_bar
from blockhess.spectra import Spectra
from blockhess_ext import Quadrature
from blockhess_ext.slq import blocks_with_basis


class NonFiniteError(ValueError):
    """Hessian-vector products of some blocks were NaN or infinite; `partial` holds the Spectra of what was computed."""

    def __init__(self, message: str, partial: Spectra) -> None:
        super().__init__(message)
        self.partial = partial


def spectrum(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    blocks: BlockSpec = "parameter",
    num_probes: int = 10,
    num_steps: int = 100,
    seed: int | None = 0,
    distribution: str = "gaussian",
    reorthogonalize: str = "auto",
    batchnorm: str = "eval",
    engine: str = "auto",
    dtype: torch.dtype | None = None,
    matmul_precision: str = "highest",
    memory_budget: int | str | None = None,
    on_nonfinite: str = "raise",
    progress: bool | str = "auto",
) -> Spectra:
    """Estimate the eigenvalue density of the Hessian of every parameter block.

    The Hessian is that of the loss averaged over all data, at the model's present parameters, in eval mode.

    Args:
        model: any module with real floating-point parameters.
        data: one batch (a tuple, mapping or tensor) or a list, DataLoader or other collection of batches, on the
            model's device. They are drawn once and kept. One batch is fastest; several need memory for one at a time.
        loss_fn: None: `model(**batch).loss` (Transformers). An nn.Module such as nn.CrossEntropyLoss() or a function of
            torch.nn.functional: `loss_fn(model(inputs), targets)`. Any other callable: `loss_fn(model, batch)`,
            which returns the mean loss, or (mean loss, weight of the batch); see `losses.as_loss`.
        blocks: "parameter" (one block per parameter tensor), "full", a dict from block name to parameter names and
            `Part`s, or a list of (regex, group) pairs; see `blocks.partition`.
        num_probes: random vectors per block.
        num_steps: Lanczos steps per vector; a block makes no more than it has entries.
        seed: of the random vectors, which also depend on the blocks' names; None takes a fresh one and records it.
        distribution: of the random vectors, "gaussian" or "rademacher".
        reorthogonalize: "none", "full" or "auto"; see `blockhess_ext.batched_slq`.
        batchnorm: statistics that BatchNorm uses: "eval", the running ones; "batch", those of each batch; or
            "frozen-batch-stats", the average over the batches of their own, held fixed.
        engine: what computes Hessian-vector products: "autograd" walks the graph of the gradient, "traced" turns it
            into linear programs first, "auto" takes the one that counted operations favour, and writes small blocks
            out exactly where that needs fewer products; "exact" writes all blocks out. "ggn" takes the generalised
            Gauss-Newton matrix instead of the Hessian.
        dtype: to compute in; None means the parameters' own, and float32 for float16 and bfloat16 ones.
        matmul_precision: of float32 matrix products, as torch.set_float32_matmul_precision: "highest", "high" (TF32 on
            CUDA) or "medium" (bfloat16). The error it makes is in the result's `hvp_error`.
        memory_budget: bytes, or a text such as "6 GiB", that vectors and graphs may take; by default half of the
            device's memory. What does not fit is done in several passes, large batches in parts.
        on_nonfinite: "raise" or "report": what to do where Hessian-vector products are not finite.
        progress: True, False, or "auto": a bar on stderr where tqdm is installed and it takes more than a few seconds.

    Returns:
        Spectra of the blocks, in the order of the model's parameters or of `blocks`.

    Raises:
        ValueError, TypeError: an argument is not as described.
        NonFiniteError: see `on_nonfinite`; `.partial` holds what was computed.
        NotImplementedError: an operation of the model has no second derivative.

    Source: the paper's Algorithms 4 and 5.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> spectra = spectrum(model, batch, torch.nn.CrossEntropyLoss(), num_probes=2)
        >>> list(spectra)
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    _choice("on_nonfinite", on_nonfinite, ("raise", "report"))
    start = time.perf_counter()
    options = _Options(num_probes, num_steps, engine, distribution, reorthogonalize, memory_budget)
    num_probes, num_steps = options.num_probes, options.num_steps
    with _posed(model, data, loss_fn, blocks, batchnorm, dtype, memory_budget, matmul_precision) as (problem, cut):
        job = _Job(problem, options)
        with progress_bar(job.plan.hvps, "HVP", progress) as on_hvp:
            quadrature = job.run(seed, on_hvp)
    spectra = Spectra(
        job.infos,
        quadrature,
        {
            "model": type(unwrap(model)).__name__,
            "loss": problem.loss.name,
            "loss_value": problem.loss_value,
            "weight": problem.weight,
            "batchnorm": batchnorm if has_batchnorm(model) else "none",
            "dtype": quadrature.dtype,
            "matmul_precision": matmul_precision,
            "seed": quadrature.seed,
            "num_probes": num_probes,
            "num_steps": num_steps,
            "distribution": distribution,
            "reorthogonalize": reorthogonalize,
            "engine": job.plan.engine,
            "plan": dataclasses.asdict(job.plan) | {"exact": job.exact_names},
            "hvp_error": job.hvp_error,
            "frozen": list(cut.frozen),
            "tied": {name: list(aliases) for name, aliases in cut.tied.items()},
            "unused": list(problem.unused),
            "hvps": job.hvps,
            "seconds": time.perf_counter() - start,
            "torch": str(torch.__version__),
            "blockhess": blockhess.__version__,
        },
    )
    if on_nonfinite == "raise" and quadrature.nonfinite.any():
        failed = [info.name for info, bad in zip(problem.infos, quadrature.nonfinite.any(0)) if bad]
        names = ", ".join(failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise NonFiniteError(
            f"spectrum: Hessian-vector products must be finite, got NaN or inf in {len(failed)} of "
            f"{len(problem.infos)} blocks: {names}; the error's .partial holds the others",
            spectra,
        )
    return spectra


def plan(model: nn.Module, data: Any, loss_fn: Callable[..., Any] | None = None, **options: Any) -> Plan:
    """What `spectrum` would do with these arguments, without computing any product.

    Args:
        model, data, loss_fn, options: as for `spectrum`.

    Returns:
        The plan; print it.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> plan(model, batch, torch.nn.CrossEntropyLoss()).hvps
        67
    """
    given = inspect.signature(spectrum).bind(model, data, loss_fn, **options)
    given.apply_defaults()
    wishes = _Options(**{f.name: given.arguments[f.name] for f in dataclasses.fields(_Options)})
    posing = {name: given.arguments[name] for name in inspect.signature(_posed).parameters}
    with _posed(**posing) as (problem, _):
        return _Job(problem, wishes).plan


@dataclass(frozen=True)
class _Options:
    num_probes: int
    num_steps: int
    engine: str
    distribution: str
    reorthogonalize: str
    memory_budget: int | str | None

    def __post_init__(self) -> None:
        for name in ("num_probes", "num_steps"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        for name, choices in (
            ("distribution", blockhess_ext.ops.DISTRIBUTIONS),
            ("reorthogonalize", blockhess_ext.arguments.REORTHOGONALIZE),
            ("engine", CHOICES),
        ):
            _choice(name, getattr(self, name), choices)


@contextmanager
def _posed(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None,
    blocks: BlockSpec,
    batchnorm: str,
    dtype: torch.dtype | None,
    memory_budget: int | str | None,
    matmul_precision: str,
) -> Iterator[tuple[Problem, Partition]]:
    """The problem, its model in a fixed state, its batches cut so that one graph fits the budget."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"spectrum: model must be a torch.nn.Module, got {type(model).__name__}")
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise ValueError(f"spectrum: dtype must be None or a floating-point torch.dtype, got {dtype!r}")
    _choice("matmul_precision", matmul_precision, ("highest", "high", "medium"))
    model = unwrap(model)
    cut = partition(model, blocks)
    loss = as_loss(loss_fn)
    with fixed_state(model, batchnorm), _matmul_precision(matmul_precision):
        batches = as_batches(data, pairs=loss.pairs)  # in here, since a DataLoader draws random numbers
        if batchnorm == "frozen-batch-stats":
            freeze_batch_statistics(model, lambda batch: loss(model, batch), batches)
        problem = Problem(model, loss, batches, cut.blocks, dtype)
        parts = micro_batches(problem, budget_bytes(memory_budget, problem.device))
        # Only where the loss of a batch may be the mean over its samples.
        if parts > 1 and loss.calls_model and not (batchnorm == "batch" and has_batchnorm(model)):
            problem = _split(problem, parts, cut, dtype)
        yield problem, cut


def _split(problem: Problem, parts: int, cut: Partition, dtype: torch.dtype | None) -> Problem:
    """The problem with smaller batches, or as it is where its loss is no mean over samples (a contrastive one)."""
    batches = [part for batch in problem.batches for part in split_batch(batch, parts)]
    try:
        smaller = Problem(problem.model, problem.loss, batches, cut.blocks, dtype)
    except (RuntimeError, ValueError):  # targets that cannot be cut like the inputs
        return problem
    same = abs(smaller.loss_value - problem.loss_value) <= 1e-4 * abs(problem.loss_value)
    return smaller if same else problem


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Job:
    """A planned run: the engine is made, and checked, when it begins.

    Attributes:
        plan: as carried out. infos: of the blocks, with notes. hvps: products computed.
        hvp_error: block -> error of H v for a random unit vector v, None where it could not be measured.
    """

    def __init__(self, problem: Problem, options: _Options) -> None:
        self._problem, self._options = problem, options
        dims, itemsize = problem.dims, problem.dtype.itemsize
        kept = blocks_with_basis(
            options.reorthogonalize, dims, options.num_steps, bytes_each=options.num_probes * itemsize
        )
        self._basis = ["full" if keep else "none" for keep in kept]
        self.plan = make_plan(
            problem,
            engine=options.engine,
            num_probes=options.num_probes,
            num_steps=options.num_steps,
            basis_dims=[dim if keep else 0 for dim, keep in zip(dims, kept)],
            budget=budget_bytes(options.memory_budget, problem.device),
        )
        self.infos = problem.infos
        self.hvps = 0
        self.hvp_error: dict[str, float] | None = None
        self._zero_within: list[float | None] = [None] * len(self.infos)

    @property
    def exact_names(self) -> list[str]:
        """Names of the blocks that were written out."""
        return [info.name for info, exact in zip(self.infos, self.plan.exact) if exact]

    def run(self, seed: int | None, on_hvp: Callable[[], object]) -> Quadrature:
        """All blocks, in their order."""
        problem, options = self._problem, self._options
        seed = blockhess_ext.arguments.probe_seed(seed)
        ids = [_block_id(info.name) for info in problem.infos]
        engine = self._engine()
        parts: list[Quadrature] = []
        order: list[int] = []
        for blocks, passes in itertools.groupby(self.plan.passes, key=lambda p: p[2]):
            chunks = []
            for first, count, _ in passes:
                operator = BlockOperator(problem, engine, blocks, on_hvp)
                chunks.append(
                    blockhess_ext.batched_slq(
                        operator,
                        operator.dims,
                        num_probes=count,
                        first_probe=first,
                        num_steps=options.num_steps,
                        block_ids=[ids[l] for l in blocks],
                        distribution=options.distribution,
                        reorthogonalize=[self._basis[l] for l in blocks],
                        seed=seed,
                        dtype=problem.dtype,
                        device=problem.device,
                        on_nonfinite="report",
                    )
                )
                self.hvps += operator.hvps
            parts.append(Quadrature.joined(chunks, 0))
            order += blocks
        exact = [l for l, e in enumerate(self.plan.exact) if e]
        if exact:
            operator = BlockOperator(problem, engine, exact, on_hvp)
            parts += exact_quadratures(
                operator,
                [ids[l] for l in exact],
                options.num_probes,
                options.num_steps,
                seed,
                options.distribution,
            )
            order += exact
            self.hvps += operator.hvps
        device = parts[0].nodes.device
        whole = Quadrature.joined([part.to(device) for part in parts], 1)
        whole = whole.of_blocks([order.index(l) for l in range(len(ids))])
        radii = whole.nodes.abs().amax((0, 2)).tolist()
        self.infos = tuple(
            with_note(info, ZERO_NOTE) if largest is not None and radius <= largest else info
            for info, radius, largest in zip(self.infos, radii, self._zero_within)
        )
        return whole

    def _engine(self) -> Engine:
        """The planned engine, its products checked; autograd where a trace planned by "auto" cannot be had."""
        try:
            engine = self.plan.make(self._problem)
            accuracy = measure(self._problem, engine)
        except (NotTraceable, Disagreement) as error:
            if self._options.engine == "traced":
                raise NotImplementedError(f"spectrum: engine='traced' cannot be had: {error}") from error
            self.plan = without_tracing(self.plan, f"no trace: {error}")
            engine = self.plan.make(self._problem)
            accuracy = measure(self._problem, engine)
        if accuracy is not None:
            self.hvp_error = {info.name: error for info, error in zip(self.infos, accuracy.errors)}
            self._zero_within = [
                self._noise(l, error) if self._problem.is_used(l) and accuracy.is_zero(l) else None
                for l, error in enumerate(accuracy.errors)
            ]
        return engine

    def _noise(self, number: int, error: float) -> float:
        """The largest eigenvalue of a block that is zero in the first batch, if it is zero in all."""
        if len(self._problem.batches) == 1:
            return math.inf
        # A random unit vector shows |E|_F / sqrt(dim) of an error E, give or take a factor.
        return float(10 * error * self._problem.dims[number] ** 0.5 * sum(self._problem.shares))


def _choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"spectrum: {name} must be one of {', '.join(choices)}, got {value!r}")


def _count(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"spectrum: {name} must be an integer, got {value!r}") from None
    if number < 1:
        raise ValueError(f"spectrum: {name} must be at least 1, got {value}")
    return number


def _block_id(name: str) -> int:
    """What keys a block's probes: its name, so that they are the same in any partition."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
