"""From a model to its block spectra: `blockhess.spectrum`.

For every block l of the parameters, stochastic Lanczos quadrature of H_l = d2 Loss / d w_l^2 (the paper's Algorithm 5).

Promises: the model is left as it was; a block's probes do not depend on which other blocks are asked for, nor does its
result, except that reorthogonalize="auto" shares one budget among the blocks. One seed gives the same bits as far as
torch's own kernels do: some backward passes (LayerNorm's) depend on the number of threads.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from os import PathLike
from typing import Any

import torch
from torch import nn

import blockhess_ext
from blockhess._version import __version__
from blockhess.problem import fingerprint
from blockhess.problem.blocks import BlockSpec, unwrap
from blockhess.problem.losses import make_loss
from blockhess.problem.memory import shared_budget
from blockhess.problem.model_state import batchnorm_policy
from blockhess.problem.prepare import LOSS_TOLERANCE, prepared_problem
from blockhess.problem.problem import Problem
from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup
from blockhess.run.distributed import Parallel, joined
from blockhess.run.job import Job
from blockhess.run.merge import load_run
from blockhess.run.options import Options, choice, count
from blockhess.run.plan import Plan
from blockhess.run.progress import check_progress, progress_bar
from blockhess.run.recorder import Recorder
from blockhess.run.storage import directory
from blockhess.run.storage.directory import RunDirectory
from blockhess.spectra import Spectra


class NonFiniteError(ValueError):
    """Hessian-vector products of some blocks were NaN, infinite or out of range; `partial` holds the other Spectra."""

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
    first_probe: int = 0,
    keep_vectors: bool = False,
    run_dir: str | PathLike[str] | None = None,
    parallel: Parallel = None,
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
            which returns the mean loss, or (mean loss, weight of the batch); see `losses.make_loss`.
        blocks: "parameter" (one block per parameter tensor), "full", a dict from block name to parameter names and
            `ParameterSlice`s, or a list of (regex, group) pairs; see `blocks.partition`.
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
            "frozen_batch_stats", the average over the batches of their own, held fixed. Recorded is what was done:
            "batch" where no layer keeps running statistics.
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
        first_probe: index of the first random vector of every block. Runs with other ones, made on other machines, are
            joined by `merge`.
        keep_vectors: keep the vectors after the last step (two per probe, and the kept basis), in the result's
            `vectors` and in run_dir, so that `extend` can make more steps. The plan says how much memory they take.
        run_dir: a directory, made if it is missing, in which the run is recorded as it goes. Called again with the same
            arguments after any end of the process, it goes on from there to the same bits (on CUDA under
            torch.use_deterministic_algorithms, else the result's "same_bits_on_resume" is False); a finished run
            gives its result. SIGTERM and SIGINT save the state, then raise `runs.signals.Interrupted`.
        parallel: how the processes of torch.distributed's default group share the job, which all of them call with the
            same arguments: "work": each makes some of the recurrences; "data": each computes products for some of the
            batches, its own or every so many-th of those given to all; (work, data): both, neighbouring ranks sharing
            batches. None: they do not; this process does it all. All get the same result.
        on_nonfinite: "raise" or "report": what to do where Hessian-vector products are not finite.
        progress: True, False, or "auto": a bar on stderr where tqdm is installed and it takes more than a few seconds.

    Returns:
        Spectra of the blocks, in the order of the model's parameters or of `blocks`.

    Raises:
        ValueError, TypeError: an argument is not as described; run_dir is in use, or holds another run: says in what
            they differ.
        OSError: run_dir does not take the state, as when the disk is full; what was saved before is kept.
        NonFiniteError: see `on_nonfinite`; `.partial` holds what was computed.
        NotImplementedError: an operation of the model has no second derivative, or its parameters are shards.
        distributed.RankError: another rank failed.

    Source: the paper's Algorithms 4 and 5.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> spectra = spectrum(model, batch, torch.nn.CrossEntropyLoss(), num_probes=2)
        >>> list(spectra)
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(parallel))
        choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
        if parallel is not None and keep_vectors:
            raise ValueError("spectrum: keep_vectors must be False with parallel, got True: no rank has all vectors")
        options = Options(
            num_probes, num_steps, tol, sigma, engine, distribution, reorthogonalize, memory_budget,
            first_probe, keep_vectors,
        )  # fmt: skip
        run = None if run_dir is None else stack.enter_context(directory.opened(run_dir, ranks))
        budget = shared_budget(_budget(memory_budget, run), model, ranks)
        posing = (blocks, batchnorm, dtype, budget, matmul_precision)
        problem, cut, fingerprints = stack.enter_context(prepared_problem(model, data, loss_fn, *posing, ranks))
        made = {
            "model": type(unwrap(model)).__name__,
            "loss": problem.loss.name,
            "loss_value": problem.loss_value,
            "weight": problem.weight,
            "batchnorm": batchnorm_policy(model, batchnorm),
            "matmul_precision": matmul_precision,
            "frozen": list(cut.frozen),
            "tied": {name: list(aliases) for name, aliases in cut.tied.items()},
            "unused": list(problem.unused),
            "fingerprints": fingerprints,
            "torch": str(torch.__version__),
            "blockhess": __version__,
        }
        identity = _identity(problem, options, made, seed)
        identity |= {"parallel": parallel if parallel is None else str(parallel)}
        ranks.agree(identity)
        planned = dataclasses.replace(options, memory_budget=budget)
        spectra = _run_job(
            lambda records, plan: Job(problem, planned, records, plan),
            seed, made, start, progress, run, identity, ranks,
        )  # fmt: skip
    return _finite(spectra, on_nonfinite)


def _budget(memory_budget: int | str | None, run: RunDirectory | None) -> int | str | None:
    """The memory budget of a run that was begun, unless another one is given."""
    begun = None if run is None else run.plan
    return memory_budget if begun is None or memory_budget is not None else begun.memory_budget


def _run_job(
    make: Callable[[Recorder | None, Plan | None], Job],
    seed: int | None,
    made: dict[str, Any],
    start: float,
    progress: bool | str,
    run: RunDirectory | None,
    identity: dict[str, Any],
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Spectra:
    """The spectra of a job, recorded as it goes where there is a run directory; or what the directory holds.

    Args:
        make: the job, given what keeps its work, and its plan if it was begun before.
        made: provenance, as far as the job does not know it; seconds are added to those in it.
        start: of the clock.
        identity: what tells the job from others.
        ranks: which share it.
    """
    if run is None:
        job = make(None, None)
    else:
        run.check(identity)
        result = run.result()
        if result is not None:
            return result
        fresh = ranks.gather(blockhess_ext.arguments.probe_seed(seed))[0]
        seed = fresh if run.run is None else run.run["seed"]
        job = make(run, run.plan)
        run.begin(identity, job.plan, seed, job.infos, identity["keep_vectors"], max(job.plan.hvps - job.hvps, 0))
        made = made | {"same_bits_on_resume": identity["deterministic"]}
    most = max(job.plan.hvps - job.hvps, 0) // ranks.size
    with progress_bar(most, "HVP", progress if ranks.rank == 0 else False) as on_hvp:
        quadrature = job.run(seed, on_hvp)
    seconds = made.get("seconds", 0.0) + (time.perf_counter() - start if run is None else run.seconds)
    spectra = Spectra(job.infos, quadrature, made | job.provenance(quadrature) | {"seconds": seconds}, job.vectors)
    if run is not None:
        run.finish(spectra)
    return spectra


def extend(
    spectra: Spectra | str | PathLike[str],
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    num_probes: int | None = None,
    num_steps: int | None = None,
    blocks: BlockSpec = "parameter",
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    run_dir: str | PathLike[str] | None = None,
    on_nonfinite: str = "raise",
    progress: bool | str = "auto",
    **same: Any,
) -> Spectra:
    """Add probes, or steps, to a finished run, without redoing any: what `spectrum` would have given with so many from
    the start, had it made the first run's choices. (More blocks are a run of their own, joined by `merge`.)

    Args:
        spectra: from `spectrum` or `extend`; or the file of a result, or the directory of a finished run.
        model, data, loss_fn, blocks, dtype: as in the first run.
        num_probes: of every estimated block, together with those that it has. Blocks that were written out, and
            blocks that have as many, stay as they are.
        num_steps: of every probe, together with those that it has made; for runs with keep_vectors=True.
        memory_budget, on_nonfinite, progress: as for `spectrum`.
        run_dir: as for `spectrum`; a directory of its own, not that of the first run.
        same: other arguments of `spectrum`. They are those of the first run; one that is given must equal it.

    Returns:
        New Spectra, with vectors of their own where the first run kept them; `spectra` is left alone.

    Raises:
        ValueError: the model's parameters, data, loss, blocks or an option differ from the first run's; says which. Or
            more steps are asked for and the vectors were not kept.
        TypeError: `same` holds something that is no argument of `spectrum`.
        NonFiniteError: as `spectrum`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch, loss_fn = (torch.randn(32, 4), torch.randint(3, (32,))), torch.nn.CrossEntropyLoss()
        >>> two = spectrum(model, batch, loss_fn, num_probes=2, engine="autograd")
        >>> extend(two, model, batch, loss_fn, num_probes=5).quadrature.num_probes
        5
    """
    choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
    start = time.perf_counter()
    if isinstance(spectra, str | PathLike):
        spectra = load_run(spectra)
    if not isinstance(spectra, Spectra):
        raise TypeError(f"extend: spectra must be Spectra or the path of a run, got {type(spectra).__name__}")
    first, made = spectra.provenance, spectra.quadrature
    missing = [name for name in ("num_steps", *_KEPT, "fingerprints", "plan") if name not in first]
    if missing:
        raise ValueError(f"extend: spectra must come from spectrum of this version, got none with {', '.join(missing)}")
    for name, value in same.items():
        if name not in _KEPT:
            raise TypeError(f"extend: arguments must be those of spectrum, got {name!r}")
        _same(name, value, first[name])
    if first["tol"] is not None and len({run["first_probe"] for run in first.get("merged", ())}) > 1:
        raise ValueError("extend: spectra must not be merged from probes that a tolerance chose, which leave gaps")
    if num_probes is num_steps is None:
        raise ValueError("extend: num_probes or num_steps must be given, got neither")
    wanted: dict[str, Any] = {}
    for name, number, has in (("num_probes", num_probes, made.num_probes), ("num_steps", num_steps, made.num_steps)):
        wanted[name] = has if number is None else count(name, number, "extend")
        if wanted[name] < has:
            raise ValueError(f"extend: {name} must be at least {has}, which spectra has, got {number}")
    kept = {name: first[name] for name in _KEPT if name in Options.__dataclass_fields__}
    options = Options(**wanted, memory_budget=memory_budget, **kept)
    batchnorm = "eval" if first["batchnorm"] == "none" else first["batchnorm"]
    _same("loss", make_loss(loss_fn).name, first["loss"])  # before it meets data that are not for it
    with ExitStack() as stack:
        run = None if run_dir is None else stack.enter_context(directory.opened(run_dir))
        posing = (blocks, batchnorm, dtype, _budget(memory_budget, run), first["matmul_precision"])
        problem, _, fingerprints = stack.enter_context(prepared_problem(model, data, loss_fn, *posing))
        _same("names of the blocks", [info.name for info in problem.infos], list(spectra.names))
        _same("sizes of the blocks", problem.dims, list(spectra.dims))
        _same("dtype of the vectors", str(problem.dtype).removeprefix("torch."), made.dtype)
        for what, digest in fingerprints.items():
            _same(f"fingerprint of the {what}", digest, first["fingerprints"][what])
        if not math.isclose(problem.loss_value, first["loss_value"], rel_tol=LOSS_TOLERANCE):
            _same("value of the loss", problem.loss_value, first["loss_value"])
        now = first | {"torch": str(torch.__version__), "blockhess": __version__}
        identity = _identity(problem, options, now, made.seed)
        identity |= {"extends": fingerprint.of_data([(made.alpha, made.beta, made.steps)])}

        def make(records: Recorder | None, plan: Plan | None) -> Job:
            return Job(problem, options, records, plan, spectra, more_probes=num_probes is not None)

        longer = _run_job(make, made.seed, first, start, progress, run, identity)
    return _finite(longer, on_nonfinite)


ON_NONFINITE = ("raise", "report")

# Arguments of `spectrum` that provenance keeps by name, and that an extension shares with the first run.
_KEPT = (
    "tol",
    "sigma",
    "seed",
    "distribution",
    "reorthogonalize",
    "batchnorm",
    "engine",
    "matmul_precision",
    "first_probe",
    "keep_vectors",
)


def _identity(problem: Problem, options: Options, made: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """All that must be the same for a run to go on to the same bits: JSON values by names for the user."""
    device = problem.device
    return {
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(options)},
        "seed": None if seed is None else blockhess_ext.arguments.probe_seed(seed),
        **{name: made[name] for name in ("batchnorm", "matmul_precision", "model", "loss")},
        "value of the loss": made["loss_value"],
        "parameters": made["fingerprints"]["model"],
        "data": made["fingerprints"]["data"],
        "dtype": str(problem.dtype).removeprefix("torch."),
        "blocks": [f"{info.name} ({info.dim})" for info in problem.infos],
        "batches": problem.n_batches,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "deterministic": device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "torch": made["torch"],
        "blockhess": made["blockhess"],
    }


def _same(name: str, got: Any, first: Any) -> None:
    if got != first:
        raise ValueError(f"extend: {name} must be that of the first run, {first!r}, got {got!r}")


def _finite(spectra: Spectra, on_nonfinite: str) -> Spectra:
    failed = [name for name, bad in zip(spectra.names, spectra.quadrature.nonfinite.any(0)) if bad]
    if on_nonfinite == "raise" and failed:
        names = ", ".join(failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise NonFiniteError(
            f"spectrum: Hessian-vector products must be finite, got NaN, inf or sizes out of range (1e-120 ... 1e120) "
            f"in {len(failed)} of {len(spectra)} blocks: {names}; the error's .partial holds the others",
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
    choice("on_nonfinite", given.arguments["on_nonfinite"], ON_NONFINITE)
    check_progress(given.arguments["progress"])
    blockhess_ext.arguments.probe_seed(given.arguments["seed"])
    wishes = Options(**{f.name: given.arguments[f.name] for f in dataclasses.fields(Options)})
    posing = {n: given.arguments[n] for n in inspect.signature(prepared_problem).parameters if n in given.arguments}
    with prepared_problem(**posing) as (problem, *_):
        return Job(problem, wishes).plan
