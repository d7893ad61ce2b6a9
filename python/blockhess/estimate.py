"""Estimation of block spectra: `blockhess.spectrum`, `extend` and `plan`.

Stochastic Lanczos quadrature of H_l = d2 Loss / d w_l^2 for every block l of the parameters (the paper's Algorithm 5).

The model is left unchanged. The probes of a block do not depend on the other blocks, nor does its result, up to
rounding, except that reorthogonalize="auto" shares one budget among the blocks. The same call gives the same bits as
far as torch's kernels do: some backward passes (LayerNorm's) depend on the number of threads.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from os import PathLike
from typing import Any, overload

import torch
from torch import nn

from blockhess._version import __version__
from blockhess.problem import fingerprint
from blockhess.problem.batches import DRAWN_ANEW
from blockhess.problem.blocks import BlockSpec, unwrap
from blockhess.problem.losses import make_loss
from blockhess.problem.memory import shared_budget
from blockhess.problem.model_state import batchnorm_policy
from blockhess.problem.prepare import LOSS_TOLERANCE, prepared_problem
from blockhess.problem.problem import Problem
from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup
from blockhess.problem.shards import holders
from blockhess.run.distributed import Parallel, process_group
from blockhess.run.forecast import Forecast, forecast
from blockhess.run.job import Job
from blockhess.run.merge import load_run
from blockhess.run.options import Options, with_defaults
from blockhess.run.plan import Plan
from blockhess.run.progress import check_progress, progress_bar
from blockhess.run.storage import directory
from blockhess.run.storage.directory import RunDirectory
from blockhess.spectra import Spectra, as_spectra
from blockhess_ext.arguments import choice, integer, probe_seed

ON_NONFINITE = ("raise", "mark")


class NonFiniteError(ValueError):
    """Hessian-vector products of some blocks were NaN, infinite or out of range; `partial` holds the other Spectra."""

    def __init__(self, message: str, partial: Spectra) -> None:
        super().__init__(message)
        self.partial = partial

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, Spectra]]:
        return type(self), (str(self), self.partial)


def spectrum(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    blocks: BlockSpec = "parameter",
    num_probes: int | None = None,
    num_steps: int | None = None,
    tol: float | None = None,
    tol_sigma: float | None = None,
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

    The Hessian is that of the loss averaged over all data, at the present parameters, with the model in eval mode.
    Settings of the process are changed meanwhile, such as torch's default dtype with `dtype=`, so other threads should
    not compute with torch; `spectrum` in another thread waits, and loss_fn must not wait for that.

    Args:
        model: any module with real floating-point parameters.
        data: one batch (a tuple, mapping, tensor or object with tensors), or a list, DataLoader or other collection of
            batches, on the model's device. All batches are loaded at the start. One batch is fastest; several limit the
            memory to that of one.
        loss_fn: None for `model(**batch).loss` (Transformers). An nn.Module such as nn.CrossEntropyLoss() or a function
            of torch.nn.functional for `loss_fn(model(inputs), targets)`; parameters of the module are constants, listed
            in `provenance["loss_parameters"]`. Any other callable for `loss_fn(model, batch)`, which returns the mean
            loss or (mean loss, weight of the batch); see `losses.make_loss`.
        blocks: "parameter" for one block per parameter tensor, "full" for a single block, a dict from block name to
            parameter names and `ParameterSlice`s, or a list of (regex, group) pairs; see `blocks.partition`.
        num_probes: number of random vectors per block; None means 10, the paper's number.
        num_steps: number of Lanczos steps per vector, limited by the block's size; None means 100, the paper's number.
        tol: error tolerance; None means 0.01 if neither num_probes nor num_steps is given, otherwise none: counts that
            are given are used as they are. With a tolerance they are upper limits, and every block takes only as many
            steps and probes (at least 2) as it needs for an error of its cumulative distribution function, in
            Wasserstein-1 distance relative to the block's range, below tol, and for residual bounds of its extreme
            eigenvalues below tol times the largest |eigenvalue|. A block is computed exactly if that takes fewer
            products. Blocks for which the limits are too low get the note "tolerance not reached".
        tol_sigma: if given, tol limits instead the L1 distance (0 ... 2) of the densities smoothed by a Gaussian whose
            standard deviation is tol_sigma times the block's range.
        seed: of the random vectors, which also depend on the names of the blocks; None draws a seed and records it.
        distribution: of the random vectors, "gaussian" or "rademacher".
        reorthogonalize: "none", "full", "partial" or "auto"; see `blockhess_ext.batched_slq`.
        batchnorm: statistics used by BatchNorm layers: "eval" for the running statistics, "batch" for those of each
            batch, or "frozen_batch_stats" for the average over all batches, held constant. "batch" is recorded if no
            layer has running statistics.
        engine: method of computing Hessian-vector products. "autograd" differentiates the gradient's graph, for one
            vector at a time. "traced" converts the gradient to one linear program for all blocks and multiplies several
            vectors together. "auto" chooses between them by counted work, and computes small blocks exactly if that
            takes fewer products; "exact" computes all blocks exactly. "ggn" uses the generalized Gauss-Newton matrix
            instead of the Hessian, with a linear program if that saves time. "difference" takes differences of
            gradients, for models without second derivatives, where "auto" takes them too.
        dtype: of the computation. None means that of the parameters, and float32 for float16 and bfloat16 parameters.
            Conversions inside the model are unchanged: Transformers models compute their loss in float32.
        matmul_precision: of float32 matrix products and convolutions. "highest" is float32. "high" and "medium" are
            TF32 on CUDA. On a CPU, "medium" is bfloat16 and "high" TF32 in matrix products if the CPU has instructions
            for it, otherwise float32. The error that results is part of the errors of the products of checked blocks,
            `provenance["hvp_error"]`.
        memory_budget: memory of the run besides model and data, in bytes or as a string such as "6 GiB"; by default
            half of the device's memory. Work that exceeds it is split into several passes, and large batches into
            parts. It also limits how many vectors are multiplied together, and how many parameters move together in
            checks of products. A warning tells where the smallest possible run takes more.
        first_probe: index of the first random vector of every block. `merge` combines runs with different probes.
        keep_vectors: whether to keep the last two vectors of every probe, and its basis if there is one, in the
            result's `vectors` and in run_dir, so that `extend` can add steps. `plan` reports their size.
        run_dir: directory, created if missing, in which the run is recorded. A call with the same arguments resumes an
            interrupted run with the same bits (on CUDA if torch.use_deterministic_algorithms is set, otherwise the
            result's "same_bits_on_resume" is False) and returns the result of a finished one. SIGTERM, SIGINT and
            SIGHUP save the state and raise `run.storage.signals.Interrupted`.
        parallel: how to divide the job among the processes of torch.distributed's default group, all of which make the
            same call and get the same result. "recurrences": each process computes some of the recurrences. "data":
            each computes products for some of the batches: its own, or every world_size-th of those given to all.
            (recurrences, data): a mesh of both, in which neighboring ranks share batches. None: this process alone,
            or all processes that hold shards of the model (fully_shard, DTensor parameters). Where several groups of
            neighboring ranks hold a sharded model each, "recurrences" divides them among the groups.
        on_nonfinite: if Hessian-vector products are not finite, "raise" an error or "mark" the blocks in the result.
        progress: True, False, or "auto" for a bar on stderr if tqdm is installed and the job takes more than a few
            seconds.

    Returns:
        Spectra of the blocks, in the order of the model's parameters or of `blocks`.

    Raises:
        ValueError, TypeError: an argument is invalid; run_dir is in use, or holds a different run (lists the
            differences).
        OSError: run_dir cannot be written, for example because the disk is full; what was saved before is intact.
        NonFiniteError: see `on_nonfinite`; `.partial` holds what was computed.
        NotImplementedError: an operation of the model has no second derivative and `engine` needs it, or the
            parameters are sharded in a way that is not supported.
        DerivativeMismatch: a ValueError; the gradient is not that of the loss, or products are not its derivatives.
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
        ranks = stack.enter_context(process_group(parallel, holders(model)))
        choice("on_nonfinite", on_nonfinite, ON_NONFINITE, "spectrum")
        if ranks.size > 1 and keep_vectors:
            raise ValueError("spectrum: keep_vectors must be False on several ranks, got True: none has all vectors")
        options = with_defaults(
            num_probes, num_steps, tol, tol_sigma, engine=engine, distribution=distribution,
            reorthogonalize=reorthogonalize, memory_budget=memory_budget, first_probe=first_probe,
            keep_vectors=keep_vectors,
        )  # fmt: skip
        run = None if run_dir is None else stack.enter_context(directory.opened(run_dir, ranks))
        budget = shared_budget(_budget(memory_budget, run), model, ranks)
        settings = (blocks, batchnorm, dtype, budget, matmul_precision)
        problem, cut, fingerprints = stack.enter_context(
            prepared_problem(model, data, loss_fn, *settings, ranks, engine)
        )
        made = {
            "model": type(unwrap(model)).__name__,
            "loss": problem.loss.name,
            "loss_value": problem.loss_value,
            "weight": problem.weight,
            "batchnorm": batchnorm_policy(model, batchnorm),
            "matmul_precision": matmul_precision,
            "frozen": list(cut.frozen),
            "loss_parameters": problem.loss_parameters,
            "tied": {name: list(aliases) for name, aliases in cut.tied.items()},
            "unused": list(problem.unused),
            "fingerprints": fingerprints,
            "torch": str(torch.__version__),
            "blockhess": __version__,
        }
        identity = _identity(problem, options, made, seed) | {"parallel": parallel and str(parallel)}
        ranks.agree(identity)
        options = dataclasses.replace(options, memory_budget=budget)
        spectra = _run_job(partial(Job, problem, options), seed, made, start, progress, run, identity, ranks)
    return _checked(spectra, on_nonfinite)


def _budget(memory_budget: int | str | None, run: RunDirectory | None) -> int | str | None:
    """Return memory_budget, or by default that of the recorded run."""
    default = run.plan.memory_budget if run is not None and run.plan else None
    return default if memory_budget is None else memory_budget


def _run_job(
    make: Callable[..., Job],
    seed: int | None,
    made: dict[str, Any],
    start: float,
    progress: bool | str,
    run: RunDirectory | None,
    identity: dict[str, Any],
    ranks: ProcessGroup = SINGLE_PROCESS,
) -> Spectra:
    """Run a job, recorded in the run directory if there is one, or return the result that the directory holds.

    `make` returns the job, given the recorder and the plan of a recorded run. `made` is the provenance that the job
    itself does not provide; its "seconds" are added to those since `start`.
    """
    if run is None:
        job = make()
    else:
        run.check(identity)
        result = run.result()
        if result is not None:
            return as_spectra(result)
        fresh = ranks.gather(probe_seed(seed))[0]
        seed = run.run["seed"] if run.run else fresh
        job = make(run, run.plan)
        run.begin(identity, job.plan, seed, job.infos, max(job.plan.hvps - job.hvps, 0))
        made = made | {"same_bits_on_resume": identity["deterministic"]}
    most = max(job.plan.hvps - job.hvps, 0) // ranks.size
    with progress_bar(most, "HVP", progress if ranks.rank == 0 else False) as on_hvp:
        quadrature = job.run(seed, on_hvp)
    seconds = made.get("seconds", 0.0) + (time.perf_counter() - start if run is None else run.seconds)
    spectra = Spectra(
        job.infos, quadrature, made | job.provenance(quadrature) | {"seconds": seconds}, job.records.vectors
    )
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
    """Add probes or steps to a finished run without repeating any.

    The result is that of `spectrum` with as many probes or steps from the start and the first run's choices, up to
    rounding, or with the same bits if vectors are multiplied one at a time. To add blocks, run `spectrum` on them and
    `merge` the results.

    Args:
        spectra: result of `spectrum` or `extend`, or the path of a result file or of a finished run's directory.
        model, data, loss_fn, blocks, dtype: as in the first run.
        num_probes: new total number of probes of every estimated block. Blocks that were computed exactly, or have as
            many probes, do not change.
        num_steps: new total number of steps of every probe, for runs with keep_vectors=True.
        memory_budget, on_nonfinite, progress: as for `spectrum`.
        run_dir: as for `spectrum`; not the directory of the first run.
        same: other arguments of `spectrum`, which default to those of the first run and must equal them.

    Returns:
        New Spectra, with vectors if the first run kept them; `spectra` is not changed.

    Raises:
        ValueError: the model's parameters, data, loss, blocks or an option differ from the first run's (names it), or
            num_steps is given and the vectors were not kept.
        TypeError: `same` holds a name that is not an argument of `spectrum`.
        NonFiniteError: as for `spectrum`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch, loss_fn = (torch.randn(32, 4), torch.randint(3, (32,))), torch.nn.CrossEntropyLoss()
        >>> two = spectrum(model, batch, loss_fn, num_probes=2, engine="autograd")
        >>> extend(two, model, batch, loss_fn, num_probes=5).quadrature.num_probes
        5
    """
    choice("on_nonfinite", on_nonfinite, ON_NONFINITE, "spectrum")
    start = time.perf_counter()
    if isinstance(spectra, str | PathLike):
        try:
            spectra = as_spectra(load_run(spectra))
        except ValueError as error:
            raise ValueError(f"extend: spectra cannot be read: {error}") from None
    if not isinstance(spectra, Spectra):
        raise TypeError(f"extend: spectra must be Spectra or the path of a run, got {type(spectra).__name__}")
    first, made = spectra.provenance, spectra.quadrature
    missing = ", ".join(name for name in ("num_steps", *_SAME, "fingerprints", "plan") if name not in first)
    if missing:
        raise ValueError(
            f"extend: spectra must be computed by this version of spectrum, whose provenance has {missing}"
        )
    for name, value in same.items():
        if name not in _SAME:
            raise TypeError(f"extend: arguments must be those of spectrum, got {name!r}")
        _check_same(name, value, first[name])
    if first["tol"] is not None and len({run["first_probe"] for run in first.get("merged", ())}) > 1:
        raise ValueError(
            "extend: spectra must not be merged from runs with a tolerance, whose probes are not contiguous"
        )
    if num_probes is num_steps is None:
        raise ValueError("extend: num_probes or num_steps must be given, got neither")
    wanted: dict[str, Any] = {}
    for name, number, has in (("num_probes", num_probes, made.num_probes), ("num_steps", num_steps, made.num_steps)):
        wanted[name] = has if number is None else integer(name, number, 1, op="extend")
        if wanted[name] < has:
            raise ValueError(f"extend: {name} must be at least {has}, which spectra has, got {number}")
    options = Options(**wanted, memory_budget=memory_budget, **{name: first[name] for name in _SAME_OPTIONS})
    batchnorm = "eval" if first["batchnorm"] == "none" else first["batchnorm"]
    _check_same("loss", make_loss(loss_fn).name, first["loss"])  # before it is applied to data of another loss
    with ExitStack() as stack:
        run = None if run_dir is None else stack.enter_context(directory.opened(run_dir))
        settings = (blocks, batchnorm, dtype, _budget(memory_budget, run), first["matmul_precision"])
        problem, _, fingerprints = stack.enter_context(
            prepared_problem(model, data, loss_fn, *settings, engine=options.engine)
        )
        _check_same("names of the blocks", [info.name for info in problem.infos], list(spectra.names))
        _check_same("sizes of the blocks", problem.dims, list(spectra.dims))
        _check_same("dtype of the vectors", str(problem.dtype).removeprefix("torch."), made.dtype)
        for what, digest in fingerprints.items():
            advice = f"; {DRAWN_ANEW}" if what == "data" else ""
            _check_same(f"fingerprint of the {what}", digest, first["fingerprints"][what], advice)
        if not math.isclose(problem.loss_value, first["loss_value"], rel_tol=LOSS_TOLERANCE):
            _check_same("value of the loss", problem.loss_value, first["loss_value"])
        extends = fingerprint.of_data([(made.alpha, made.beta, made.steps)])
        now = first | {"torch": str(torch.__version__), "blockhess": __version__}
        identity = _identity(problem, options, now, made.seed) | {"extends": extends}
        job = partial(Job, problem, options, first=spectra, more_probes=num_probes is not None)
        longer = _run_job(job, made.seed, first, start, progress, run, identity)
    return _checked(longer, on_nonfinite)


# Arguments that an extension shares with the first run; provenance holds them under the same names.
_SAME_OPTIONS = ("tol", "tol_sigma", "engine", "distribution", "reorthogonalize", "first_probe", "keep_vectors")
_SAME = (*_SAME_OPTIONS, "seed", "batchnorm", "matmul_precision")


def _identity(problem: Problem, options: Options, made: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """Return all that must be equal for resuming a run with the same bits: JSON values, by names used in messages."""
    device = problem.device
    return {
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(options)},
        "seed": None if seed is None else probe_seed(seed),
        **{name: made[name] for name in ("batchnorm", "matmul_precision", "model", "loss", "torch", "blockhess")},
        "value of the loss": made["loss_value"],
        "parameters": made["fingerprints"]["model"],
        "data": made["fingerprints"]["data"],
        "dtype": str(problem.dtype).removeprefix("torch."),
        "blocks": [f"{info.name} ({info.dim})" for info in problem.infos],
        "batches": problem.n_batches,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "deterministic": device.type == "cpu" or torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def _check_same(name: str, got: Any, first: Any, advice: str = "") -> None:
    if got != first:
        raise ValueError(f"extend: {name} must be that of the first run, {first!r}, got {got!r}{advice}")


def _checked(spectra: Spectra, on_nonfinite: str) -> Spectra:
    failed = [name for name, bad in zip(spectra.names, spectra.quadrature.nonfinite.any(0)) if bad]
    if on_nonfinite == "raise" and failed:
        names = ", ".join(failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise NonFiniteError(
            f"spectrum: Hessian-vector products must be finite, got NaN, inf or sizes out of range (1e-120 ... 1e120) "
            f"in {len(failed)} of {len(spectra)} blocks: {names}; the error's .partial holds the others",
            spectra,
        )
    return spectra


@overload
def plan(
    model: nn.Module, data: Any, loss_fn: Callable[..., Any] | None = None, *, processes: None = None, **options: Any
) -> Plan: ...
@overload
def plan(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    processes: tuple[int, int],
    **options: Any,
) -> Forecast: ...
def plan(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    processes: tuple[int, int] | None = None,
    **options: Any,
) -> Plan | Forecast:
    """Return what `spectrum` would compute with these arguments, and its cost, without running it.

    Args:
        model, data, loss_fn, options: as for `spectrum`.
        processes: (recurrences, data) to predict the time on a mesh of processes, as for `parallel` of `spectrum`, or
            of groups of processes that hold shards of the model. A few products are measured for that.

    Returns:
        The plan, or with `processes` the forecast; both can be printed.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> plan(model, batch, torch.nn.CrossEntropyLoss()).hvps
        67
    """
    arguments, settings = job_arguments(model, data, loss_fn, **options)
    sizes: list[int] = []
    if processes is not None:
        if not isinstance(processes, tuple) or len(processes) != 2:
            raise TypeError(f"plan: processes must be (recurrences, data), got {processes!r}")
        sizes = [integer("processes", size, 1, op="plan") for size in processes]
    with process_group(None, holders(model)) as ranks:
        prepared = prepared_problem(**arguments, ranks=ranks)
        if sizes:
            return forecast(prepared, settings, *sizes)
        with prepared as (problem, *_):
            return Job(problem, settings).plan


def job_arguments(*given: Any, **options: Any) -> tuple[dict[str, Any], Options]:
    """Return the arguments of `prepared_problem`, and the options, in a call of `spectrum` with these arguments."""
    call = inspect.signature(spectrum).bind(*given, **options)
    call.apply_defaults()
    values = call.arguments
    choice("on_nonfinite", values["on_nonfinite"], ON_NONFINITE, "spectrum")
    check_progress(values["progress"])
    probe_seed(values["seed"])
    arguments = {name: values[name] for name in inspect.signature(prepared_problem).parameters if name in values}
    return arguments, with_defaults(**{f.name: values[f.name] for f in dataclasses.fields(Options)})
