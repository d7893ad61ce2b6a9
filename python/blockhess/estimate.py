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
from blockhess import adaptive, fingerprint
from blockhess.batches import as_batches, batch_size, split_batch
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
from blockhess_ext.slq import reorthogonalized_blocks


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
    tol: float | None = None,
    sigma: float | None = None,
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
        blocks: "parameter" (one block per parameter tensor), "full", "paper" or "paper-figure" (the paper's own, of
            `blockhess.models`), a dict from block name to parameter names and `Part`s, or a list of (regex, group)
            pairs; see `blocks.partition`.
        num_probes: random vectors per block.
        num_steps: Lanczos steps per vector; a block makes no more than it has entries.
        tol: spend no more products than it takes to bring the error of every block's distribution function, in
            Wasserstein-1 distance as a share of the block's range, below this; num_probes and num_steps are the most
            then. Steps end where the quadrature settles (`blockhess_ext.batched_slq`), and a block gets as many
            probes, two at least, as its size asks for (`adaptive.statistical_error`). A block for which the most was
            too little is noted "tolerance not reached". Small blocks are written out all the same.
        sigma: with tol: the error is the L1 distance, in 0 ... 2, of densities blurred by a Gaussian of this share of
            the block's range.
        seed: of the random vectors, which also depend on the blocks' names; None takes a fresh one and records it.
        distribution: of the random vectors, "gaussian" or "rademacher".
        reorthogonalize: "none", "full", "partial" or "auto"; see `blockhess_ext.batched_slq`.
        batchnorm: statistics that BatchNorm uses: "eval", the running ones; "batch", those of each batch; or
            "frozen-batch-stats", the average over the batches of their own, held fixed.
        engine: what computes Hessian-vector products: "autograd" walks the graph of the gradient, "traced" turns it
            into linear programs first, "auto" takes the one that counted operations favour, and writes small blocks
            out exactly where that needs fewer products; "exact" writes all blocks out. "ggn" takes the generalised
            Gauss-Newton matrix instead of the Hessian.
        dtype: to compute in; None means the parameters' own, and float32 for float16 and bfloat16 ones. What a model
            itself converts stays as it is: Transformers models compute their loss in float32.
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
    options = _Options(num_probes, num_steps, tol, sigma, engine, distribution, reorthogonalize, memory_budget)
    posing = (blocks, batchnorm, dtype, memory_budget, matmul_precision)
    with _posed(model, data, loss_fn, *posing) as (problem, cut, fingerprints):
        job = _Job(problem, options)
        made = {
            "model": type(unwrap(model)).__name__,
            "loss": problem.loss.name,
            "loss_value": problem.loss_value,
            "weight": problem.weight,
            "batchnorm": batchnorm if has_batchnorm(model) else "none",
            "matmul_precision": matmul_precision,
            "frozen": list(cut.frozen),
            "tied": {name: list(aliases) for name, aliases in cut.tied.items()},
            "unused": list(problem.unused),
            "fingerprints": fingerprints,
            "torch": str(torch.__version__),
            "blockhess": blockhess.__version__,
        }
        with progress_bar(job.plan.hvps, "HVP", progress) as on_hvp:
            quadrature = job.run(seed, on_hvp)
    spectra = Spectra(
        job.infos, quadrature, made | job.provenance(quadrature) | {"seconds": time.perf_counter() - start}
    )
    return _finite(spectra, on_nonfinite)


def extend(
    spectra: Spectra,
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    num_probes: int,
    blocks: BlockSpec = "parameter",
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    on_nonfinite: str = "raise",
    progress: bool | str = "auto",
    **same: Any,
) -> Spectra:
    """Add probes to a finished run, without redoing any: what `spectrum` would have given with so many from the start.

    Args:
        spectra: from `spectrum` or `extend`, or loaded.
        model, data, loss_fn, blocks, dtype: as in the first run.
        num_probes: of every estimated block, together with those that it has. Blocks that were written out, and
            blocks that have as many, stay as they are.
        memory_budget, on_nonfinite, progress: as for `spectrum`.
        same: other arguments of `spectrum`. They are those of the first run; one that is given must equal it.

    Returns:
        New Spectra; `spectra` is left alone.

    Raises:
        ValueError: the model's parameters, data, loss, blocks or an option differ from the first run's; says which.
        TypeError: `same` holds something that is no argument of `spectrum`.
        NonFiniteError: as `spectrum`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch, loss_fn = (torch.randn(32, 4), torch.randint(3, (32,))), torch.nn.CrossEntropyLoss()
        >>> two = spectrum(model, batch, loss_fn, num_probes=2, engine="autograd")
        >>> extend(two, model, batch, loss_fn, num_probes=5).quadrature.num_probes
        5
    """
    _choice("on_nonfinite", on_nonfinite, ("raise", "report"))
    start = time.perf_counter()
    first = spectra.provenance
    missing = [name for name in (*_KEPT, "fingerprints", "plan") if name not in first]
    if missing:
        raise ValueError(f"extend: spectra must come from spectrum of this version, got none with {', '.join(missing)}")
    for name, value in same.items():
        if name not in _KEPT:
            raise TypeError(f"extend: arguments must be those of spectrum, got {name!r}")
        _same(name, value, first[name])
    num_probes = _count("num_probes", num_probes, "extend")
    if num_probes < spectra.quadrature.num_probes:
        raise ValueError(
            f"extend: num_probes must be at least {spectra.quadrature.num_probes}, which spectra has, got {num_probes}"
        )
    options = _Options(
        num_probes, memory_budget=memory_budget, **{f: first[f] for f in _KEPT if f in _Options.__dataclass_fields__}
    )
    batchnorm = "eval" if first["batchnorm"] == "none" else first["batchnorm"]
    posing = (blocks, batchnorm, dtype, memory_budget, first["matmul_precision"])
    with _posed(model, data, loss_fn, *posing) as (problem, _, fingerprints):
        _same("loss", problem.loss.name, first["loss"])
        _same("names of the blocks", [info.name for info in problem.infos], list(spectra.names))
        _same("sizes of the blocks", problem.dims, list(spectra.dims))
        _same("dtype of the vectors", str(problem.dtype).removeprefix("torch."), spectra.quadrature.dtype)
        for what, digest in fingerprints.items():
            _same(f"fingerprint of the {what}", digest, first["fingerprints"][what])
        if not math.isclose(problem.loss_value, first["loss_value"], rel_tol=LOSS_TOLERANCE):
            _same("value of the loss", problem.loss_value, first["loss_value"])
        job = _Job(problem, options, spectra)
        with progress_bar(job.plan.hvps, "HVP", progress) as on_hvp:
            quadrature = job.run(spectra.quadrature.seed, on_hvp)
    seconds = first["seconds"] + time.perf_counter() - start
    return _finite(
        Spectra(job.infos, quadrature, first | job.provenance(quadrature) | {"seconds": seconds}), on_nonfinite
    )


# A loss is another one where its value on the same data differs by more, relatively.
LOSS_TOLERANCE = 1e-4

# Arguments of `spectrum` that provenance keeps by name, and that an extension shares with the first run.
_KEPT = (
    "num_steps",
    "tol",
    "sigma",
    "seed",
    "distribution",
    "reorthogonalize",
    "batchnorm",
    "engine",
    "matmul_precision",
)


def _same(name: str, got: Any, first: Any) -> None:
    if got != first:
        raise ValueError(f"extend: {name} must be that of the first run, {first!r}, got {got!r}")


def _finite(spectra: Spectra, on_nonfinite: str) -> Spectra:
    failed = [name for name, bad in zip(spectra.names, spectra.quadrature.nonfinite.any(0)) if bad]
    if on_nonfinite == "raise" and failed:
        names = ", ".join(failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise NonFiniteError(
            f"spectrum: Hessian-vector products must be finite, got NaN or inf in {len(failed)} of "
            f"{len(spectra)} blocks: {names}; the error's .partial holds the others",
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
    with _posed(**posing) as (problem, *_):
        return _Job(problem, wishes).plan


@dataclass(frozen=True)
class _Options:
    num_probes: int
    num_steps: int
    tol: float | None
    sigma: float | None
    engine: str
    distribution: str
    reorthogonalize: str
    memory_budget: int | str | None

    def __post_init__(self) -> None:
        for name in ("num_probes", "num_steps"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        blockhess_ext.arguments.tolerance(self.tol, self.sigma, "spectrum")
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
) -> Iterator[tuple[Problem, Partition, dict[str, str]]]:
    """The problem, its model in a fixed state, its batches cut so that one graph fits the budget; and fingerprints."""
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
        fingerprints = {"model": fingerprint.of_model(model), "data": fingerprint.of_data(batches)}
        if batchnorm == "frozen-batch-stats":
            freeze_batch_statistics(model, lambda batch: loss(model, batch), batches)
        try:
            problem = Problem(model, loss, batches, cut.blocks, dtype)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise torch.OutOfMemoryError(
                f"spectrum: data must hold batches whose graph fits the device's memory, got batches of "
                f"{batch_size(batches[0])}; pass smaller ones, in a list: the result does not depend on their size"
            ) from None
        parts = micro_batches(problem, budget_bytes(memory_budget, problem.device))
        # Only where the loss of a batch may be the mean over its samples.
        if parts > 1 and loss.calls_model and not (batchnorm == "batch" and has_batchnorm(model)):
            problem = _split(problem, parts, cut, dtype)
        yield problem, cut, fingerprints


def _split(problem: Problem, parts: int, cut: Partition, dtype: torch.dtype | None) -> Problem:
    """The problem with smaller batches, or as it is where its loss is no mean over samples (a contrastive one)."""
    batches = [part for batch in problem.batches for part in split_batch(batch, parts)]
    try:
        smaller = Problem(problem.model, problem.loss, batches, cut.blocks, dtype)
    except (RuntimeError, ValueError):  # targets that cannot be cut like the inputs
        return problem
    same = math.isclose(smaller.loss_value, problem.loss_value, rel_tol=LOSS_TOLERANCE)
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

    Args:
        problem, options: what to compute.
        first: a finished run of the same, whose choices are replayed and whose probes are kept.

    Attributes:
        plan: as carried out. infos: of the blocks, with notes. hvps: products computed, by the first run too.
        hvp_error: block -> error of H v for a random unit vector v, None where it could not be measured.
    """

    def __init__(self, problem: Problem, options: _Options, first: Spectra | None = None) -> None:
        self._problem, self._options, self._first = problem, options, first
        dims, itemsize = problem.dims, problem.dtype.itemsize
        exact = None
        if first is None:
            self._basis = reorthogonalized_blocks(
                options.reorthogonalize, dims, options.num_steps, bytes_each=options.num_probes * itemsize
            )
        else:
            self._basis = list(first.quadrature.reorthogonalize)
            exact = tuple(name in first.provenance["plan"]["exact"] for name in first.names)
        self.plan = make_plan(
            problem,
            engine=options.engine,
            num_probes=options.num_probes,
            num_steps=options.num_steps,
            basis_dims=[0 if basis in ("none", "exact") else dim for dim, basis in zip(dims, self._basis)],
            budget=budget_bytes(options.memory_budget, problem.device),
            exact=exact,
        )
        self.infos = problem.infos
        self.hvps = 0 if first is None else first.provenance["hvps"]
        self.hvp_error: dict[str, float] | None = None
        self._zero_within: list[float | None] = [None] * len(self.infos)

    @property
    def exact_names(self) -> list[str]:
        """Names of the blocks that were written out."""
        return [info.name for info, exact in zip(self.infos, self.plan.exact) if exact]

    def provenance(self, result: Quadrature) -> dict[str, Any]:
        """How the result was made, as far as the job decides it."""
        options = {f.name: getattr(self._options, f.name) for f in dataclasses.fields(_Options)}
        del options["memory_budget"]  # in the plan, as bytes
        ghosts = result.ghosts().sum(0).tolist()
        bare = [word == "none" for word in result.reorthogonalize]
        return options | {
            "dtype": result.dtype,
            "seed": result.seed,
            "engine": self.plan.engine,
            "plan": dataclasses.asdict(self.plan) | {"exact": self.exact_names},
            "hvp_error": self.hvp_error,
            "ghosts": {info.name: count for info, count, b in zip(self.infos, ghosts, bare) if b and count},
            "hvps": self.hvps,
            "hvps_saved": self.plan.hvps - self.hvps,
        }

    def run(self, seed: int | None, on_hvp: Callable[[], object]) -> Quadrature:
        """All blocks, in their order."""
        problem, options = self._problem, self._options
        seed = blockhess_ext.arguments.probe_seed(seed)
        ids = [_block_id(info.name) for info in problem.infos]
        engine = self._engine()
        found: list[list[Quadrature]] = [[] for _ in ids]  # of every block: parts for some probes each, in order
        if self._first is not None:
            found = [[self._first.quadrature.of_block(l).to(problem.device)] for l in range(len(ids))]

        for probes, blocks in self._rounds(found):
            operator = BlockOperator(problem, engine, blocks, on_hvp)
            part = blockhess_ext.batched_slq(
                operator,
                operator.dims,
                num_probes=len(probes),
                first_probe=probes.start,
                num_steps=options.num_steps,
                tol=options.tol,
                sigma=options.sigma,
                block_ids=[ids[l] for l in blocks],
                distribution=options.distribution,
                reorthogonalize=[self._basis[l] for l in blocks],
                seed=seed,
                dtype=problem.dtype,
                device=problem.device,
                on_nonfinite="report",
            )
            self.hvps += operator.hvps
            for column, l in enumerate(blocks):
                found[l].append(part.of_block(column))

        exact = [l for l, e in enumerate(self.plan.exact) if e and not found[l]]
        if exact:
            rows = max((part.num_probes for part in map(_whole, filter(None, found))), default=options.num_probes)
            operator = BlockOperator(problem, engine, exact, on_hvp)
            written_out = exact_quadratures(
                operator,
                [ids[l] for l in exact],
                rows,
                options.num_steps,
                seed,
                options.distribution,
            )
            self.hvps += operator.hvps
            for l, part in zip(exact, written_out):
                found[l].append(part.to(problem.device))
        whole = Quadrature.joined([_whole(parts) for parts in found], 1)
        radii = whole.nodes.abs().amax((0, 2)).tolist()
        self._note(
            ZERO_NOTE,
            [noise is not None and radius <= noise for radius, noise in zip(radii, self._zero_within)],
        )
        if options.tol is not None:
            few = adaptive.missed(whole, options.tol, options.sigma)
            self._note("tolerance not reached", [f and not e for f, e in zip(few, self.plan.exact)])
        return whole

    def _rounds(self, found: list[list[Quadrature]]) -> Iterator[tuple[range, list[int]]]:
        """Probes and blocks to run together, until every estimated block has found as many probes as it needs."""
        options = self._options
        adapts = options.tol is not None and self._first is None
        least = min(adaptive.LEAST_PROBES, options.num_probes) if adapts else options.num_probes
        needs = {l: least for l, exact in enumerate(self.plan.exact) if not exact}
        while True:
            has = {l: sum(part.num_probes for part in found[l]) for l in needs}
            behind = [l for l in needs if has[l] < needs[l]]
            if not behind:
                return
            start = min(has[l] for l in behind)
            together = {l for l in behind if has[l] == start}
            stop = min(needs[l] for l in together)
            for first, count, blocks in self.plan.passes:
                probes, chosen = (
                    range(max(first, start), min(first + count, stop)),
                    [l for l in blocks if l in together],
                )
                if probes and chosen:
                    yield probes, chosen
            if options.tol is not None and adapts:
                for l in together:
                    (needed,) = adaptive.probes_needed(_whole(found[l]), options.tol, options.sigma)
                    needs[l] = min(needed, options.num_probes)

    def _note(self, text: str, which: Sequence[bool]) -> None:
        self.infos = tuple(with_note(info, text) if wanted else info for info, wanted in zip(self.infos, which))

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


def _whole(parts: Sequence[Quadrature]) -> Quadrature:
    return Quadrature.joined(parts, 0)


def _choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"spectrum: {name} must be one of {', '.join(choices)}, got {value!r}")


def _count(name: str, value: Any, op: str = "spectrum") -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    return number


def _block_id(name: str) -> int:
    """What keys a block's probes: its name, so that they are the same in any partition."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
