"""Stochastic Lanczos quadrature of many blocks and probes at once (the paper's Algorithm 5).

    probe v  ->  Lanczos coefficients alpha, beta of (H_l, v)  ->  T = tridiag(alpha, beta)  ->  nodes and weights of T

All (probe, block) recurrences advance together, with one operator call and one pass of the kernels per step.

Guarantees: a recurrence ends on its own when its Krylov space is exhausted, when it has made as many steps as its block
has elements, when its quadrature has converged (`tol`), or when the operator returns a non-finite value; the others
continue. The host never waits for the device inside the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blockhess_ext import arguments, completion, huge_pages, operator_checks, ops
from blockhess_ext.cuda_graph import GraphedStep, Recorder, Step, graphed_step, recorder_of
from blockhess_ext.device import check_device, explain_out_of_memory, normal_mode
from blockhess_ext.layout import Layout
from blockhess_ext.operator_checks import SymmetryCheck
from blockhess_ext.quadrature import Quadrature
from blockhess_ext.recurrences import NON_FINITE
from blockhess_ext.state import LanczosBatch, State

# "auto" reorthogonalizes blocks so small that their Krylov space may be exhausted, smallest first, while their basis
# fits in this many bytes. The density of larger blocks is accurate without (Chen, Trogdon, Ubaru 2021).
AUTO_BASIS_BYTES = 2**28
AUTO_DIMS_PER_STEP = 8


class NonFiniteError(ValueError):
    """The operator returned NaN, inf or a value out of range; `partial` holds the result, with these marked in
    `nonfinite`."""

    def __init__(self, message: str, partial: Quadrature) -> None:
        super().__init__(message)
        self.partial = partial

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, Quadrature]]:
        return type(self), (str(self), self.partial)


def batched_slq(
    hvp: Callable[[Tensor], Tensor],
    dims: Sequence[int],
    *,
    num_probes: int = 10,
    first_probe: int = 0,
    num_steps: int = 100,
    tol: float | None = None,
    sigma: float | None = None,
    probes: Tensor | None = None,
    block_ids: Sequence[int] | None = None,
    distribution: str = "gaussian",
    reorthogonalize: str | Sequence[str] = "auto",
    seed: int | None = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    on_nonfinite: str = "raise",
    check: bool | None = None,
    cuda_graph: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    state: State | None = None,
    on_state: Callable[[State], None] | None = None,
) -> Quadrature:
    """Return Gauss quadratures of the spectral measures of a block-diagonal symmetric operator.

    Args:
        hvp: maps v (n_probes, n) to H v, of the same shape, dtype and device, with n = sum(dims). Block l of the result
            must depend on block l of v only. The result is not modified. Segments of v have norm 1, or are zero where
            the recurrence has ended. If hvp has a method `mark_finished(finished)`, it is called with a mask (n_probes,
            n_blocks) bool on the CPU whenever more recurrences are known to have ended; their part of the result is
            ignored from then on.
        dims: number of elements of each block.
        num_probes: number of random probes per block.
        first_probe: index of the first probe. Probe p of a seed is the same vector in every call.
        num_steps: maximum number of Lanczos steps; a block makes at most as many as it has elements.
        tol: stop a recurrence once the estimated error of its quadrature is at most tol, in Wasserstein-1 distance as a
            fraction of the range of its nodes, and the residual bounds of its extreme nodes are at most tol times the
            largest |node|. The estimate is the change between two checkpoints, which must be small twice in a row.
            Checkpoints are 5 steps apart, later an eighth of the steps made.
        sigma: with tol, measure the error as L1 distance, in 0 ... 2, of the densities smoothed by a Gaussian whose
            width is this fraction of the range, and leave out the residual bounds.
        probes: (n_probes, n) vectors to use instead of random ones; each segment is normalized.
        block_ids: non-negative integers that key the random probes of each block; by default the block's index.
        distribution: "gaussian" or "rademacher".
        reorthogonalize: "none"; "full": classical Gram-Schmidt twice, which stores num_steps vectors per probe;
            "partial": stores as many, but orthogonalizes only where orthogonality is about to be lost, see
            `partial_reorthogonalization`; or "auto": full for blocks of at most 8 num_steps elements while their basis
            fits in 256 MiB, none for the others. A sequence gives "none", "full" or "partial" for each block.
        seed: seed of the random probes; None draws one, which the result records.
        dtype: data type of the vectors, float32 (default) or float64. Products below the smallest normal number, about
            1e-38 in float32, lose digits; `check` refuses an operator whose products all are so small.
        device: device of the vectors; by default that of `probes`, or the CPU.
        on_nonfinite: what to do, once all other recurrences have ended, if hvp returned NaN, inf or, in float64, a
            magnitude above 1e120 or below 1e-120 but not 0: "raise" NonFiniteError, or "mark" the affected recurrences
            in `Quadrature.nonfinite`.
        check: how to check hvp. Its symmetry is tested at the second and at the fourth step, without another product;
            blocks below 1e-4 of the largest are not judged, as they may be zero but for rounding, unless they are
            computed alone. Its size is tested at the second step, or the only one, see dtype. Whether blocks depend on
            each other takes one more product, of vectors that are zero in about half of the blocks: True makes it, None
            only if hvp was not checked with these dims before and at least 50 steps are to be made. False skips all
            checks, also of a sample of v for changes that torch does not count.
        cuda_graph: replay the steps from CUDA graphs, which pays off for batches so small that launching kernels takes
            longer than running them; results are bitwise the same. hvp itself runs eagerly and its result is copied to
            one more set of vectors, unless it has an attribute `capturable` equal to True. Such an hvp must do the same
            work on the same addresses of the current stream in every call, except that its first call after
            `mark_finished` may change them, must not synchronize, and must not store tensors created in a call. If it
            has a method `replayed`, that is called after every step that was made without calling hvp. The two captures
            synchronize with the device, and are repeated after `mark_finished`.
        on_step: called after every step with the number of steps made and the number of recurrences still running, as
            far as the host knows; on a GPU this may be a few steps old.
        state: resume from this state instead of starting at step 0, with bitwise the same result as an uninterrupted
            run. All other arguments must be those of the run that produced it, except num_steps, which may be larger,
            and reorthogonalize="auto", which then takes the modes of that run. num_steps = state.step returns the
            quadrature of the state.
        on_state: called after every step with the state, which it must not change. The next step changes its tensors:
            use `State.copy` to store it. The state of the last step is not changed.

    Returns:
        Quadrature with nodes and weights (n_probes, n_blocks, min(num_steps, max(dims))) float64. With alpha and beta
        these take 32 bytes for each probe, block and step of the largest block, also in blocks with fewer elements.

    Raises:
        ValueError, TypeError: an argument, or a result of hvp, is not as described.
        RuntimeError: hvp.capturable is True but its work cannot be captured.
        RuntimeError, TypeError, ValueError: hvp raised an exception of Python, torch or NumPy, which is the cause;
            those of other classes pass unchanged.
        NonFiniteError: see on_nonfinite; its attribute `partial` is the result.

    Source: the paper's Algorithms 4 and 5; Ubaru, Chen, Saad 2017.

    Example:
        >>> scales = torch.tensor([1.0, 1.0, 5.0])
        >>> q = batched_slq(lambda v: v * scales, dims=[2, 1], num_probes=1)
        >>> q.nodes[0, 1, 0].item(), q.steps.tolist()
        (5.0, [[1, 1]])
    """
    if not callable(hvp):
        raise TypeError(f"batched_slq: hvp must be a function, got {hvp!r}")
    if not (state is None or isinstance(state, State)):
        raise TypeError(f"batched_slq: state must be None or a State, got {state!r}")
    for name, function in (("on_step", on_step), ("on_state", on_state)):
        if not (function is None or callable(function)):
            raise TypeError(f"batched_slq: {name} must be None or a function, got {function!r}")
    dims = arguments.block_dims(dims)
    num_steps = arguments.integer("num_steps", num_steps, 1)
    tol, sigma = arguments.tolerance(tol, sigma)
    arguments.choice("distribution", distribution, ops.DISTRIBUTIONS)
    reorthogonalize = arguments.reorthogonalization(reorthogonalize, len(dims))
    arguments.choice("on_nonfinite", on_nonfinite, ("raise", "mark"))
    arguments.choice("check", check, (True, False, None))
    arguments.choice("cuda_graph", cuda_graph, (True, False))
    if device is None:
        device = probes.device if isinstance(probes, Tensor) else "cpu"
    device = check_device(device)
    recorder = recorder_of(device) if cuda_graph else None
    layout = Layout.of(dims, device)
    ids = arguments.block_id_tensor(block_ids, len(dims)).to(device)

    if probes is None:
        seed = arguments.probe_seed(seed)
        dtype = arguments.choice("dtype", torch.float32 if dtype is None else dtype, arguments.VECTOR_DTYPES)
        num_probes = arguments.integer("num_probes", num_probes, 1)
        first_probe = arguments.integer("first_probe", first_probe, 0)
    else:
        seed, distribution = None, "given"
        num_probes, dtype = arguments.check_probes(probes, layout, dtype)

    row_bytes = num_probes * dtype.itemsize
    if state is None:
        modes = reorthogonalization_modes(reorthogonalize, dims, num_steps, bytes_per_element=row_bytes)
    else:
        modes = arguments.state_modes(state.reorthogonalize, reorthogonalize, len(dims))
        arguments.integer("num_steps", num_steps, state.step)
    layout = layout.with_basis([mode != "none" for mode in modes])
    basis_bytes = layout.n_basis * min(num_steps, layout.n) * row_bytes
    sets = 4 if cuda_graph and not _capturable(hvp) else 3
    with explain_out_of_memory(sets, layout.n * row_bytes, basis_bytes), normal_mode():
        v = huge_pages.zeros(num_probes, layout.n, dtype=dtype, device=device)
        if state is None and probes is not None:
            v.copy_(arguments.unit_probes(probes, layout))
        elif state is None:
            assert seed is not None
            v.copy_(ops.random_probes(
                layout, num_probes, seed=seed, block_ids=ids, first_probe=first_probe, distribution=distribution,
                dtype=dtype,
            ))  # fmt: skip
        batch = LanczosBatch(v, layout, num_steps, modes, tol, sigma, 0 if state is None else state.step)
        if operator_checks.is_block_check_due(check, hvp, dims, batch.num_steps - batch.step):
            run = recorder.warm_up if recorder else lambda work: work()
            operator_checks.check_blocks(hvp, layout, batch.v_prev, run)
            operator_checks.remember(hvp, dims)
        if state is not None:
            batch.load(state)
        symmetry = None if check is False else SymmetryCheck(batch.recurrences, layout, probes is None, dtype)
        _lanczos(hvp, batch, layout, symmetry, recorder, on_step, on_state)

    recurrences, m = batch.recurrences, batch.num_steps
    alpha, beta = (table[:m].flatten(1).T.contiguous() for table in (recurrences.alpha, recurrences.beta))
    steps, status = recurrences.steps, recurrences.status
    del batch, recurrences, symmetry  # their tables are as large as alpha and beta
    nodes, weights = ops.tridiag_quadrature(alpha, beta, steps.flatten())
    shape = (*steps.shape, m)
    result = Quadrature(
        nodes=nodes.view(shape),
        weights=weights.view(shape),
        alpha=alpha.view(shape),
        beta=beta.view(shape),
        steps=steps,
        nonfinite=status == NON_FINITE,
        dims=dims,
        block_ids=tuple(ids.tolist()),
        num_steps=num_steps,
        seed=seed,
        distribution=distribution,
        reorthogonalize=tuple(modes),
        dtype=str(dtype).removeprefix("torch."),
    )
    if on_nonfinite == "raise" and result.nonfinite.any():
        raise NonFiniteError(_nonfinite_text(result), result)
    return result


def _lanczos(
    hvp: Callable[[Tensor], Tensor],
    batch: LanczosBatch,
    layout: Layout,
    symmetry: SymmetryCheck | None,
    recorder: Recorder | None,
    on_step: Callable[[int, int], None] | None,
    on_state: Callable[[State], None] | None,
) -> None:
    """Advance all recurrences to their end or to num_steps; with a recorder, replay the steps from CUDA graphs."""
    recurrences, basis, projections = batch.recurrences, batch.basis, batch.projections
    partial = recurrences.norm.new_empty(len(batch.v), layout.n_tiles)
    basis_partial = partial.new_empty(*partial.shape, len(basis) + 1)
    mark_finished = getattr(hvp, "mark_finished", None)
    tracker = completion.track(recurrences, batch.step)
    n_finished = 0
    first_step = batch.step

    def product(v: Tensor) -> Tensor:
        w = operator_checks.product(hvp, v, sample=symmetry is not None and recorder is None)
        if symmetry is not None and symmetry.is_due(batch.step):
            symmetry.compare(w, batch.v_prev)
        return w

    def advance(w: Tensor, v: Tensor, v_prev: Tensor) -> None:
        ops.lanczos_step(w, v, v_prev, recurrences, layout, partial)
        if len(basis):
            ops.reorthogonalize(
                v_prev, basis, recurrences, layout, basis_partial, projections.select(replayed=recorder is not None)
            )

    def call(v: Tensor, v_prev: Tensor, eager: bool = False) -> None:
        advance(product(v), v, v_prev)  # w is released: at most three sets of vectors exist at a time

    def count_running() -> int:
        """Return how many recurrences are running, as far as the host knows; report finished ones to the operator."""
        nonlocal n_finished
        finished = tracker.poll(batch.step)
        if mark_finished is not None and int(finished.sum()) > n_finished:
            mark_finished(finished)
            if isinstance(step, GraphedStep):
                step.restart()
        n_finished = int(finished.sum())
        return finished.numel() - n_finished

    step: Step = call
    if recorder:
        replayed = getattr(hvp, "replayed", lambda: None)
        step = graphed_step(recorder, product, advance, batch.v, _capturable(hvp), replayed)
    n_running = count_running()
    while n_running and batch.step < batch.num_steps:
        checked = symmetry is not None and symmetry.is_due(batch.step)
        step(batch.v, batch.v_prev, eager=checked)
        if symmetry is not None:
            if checked:
                symmetry.decide(batch.step)
            symmetry.refuse()
        batch.finish_step()
        batch.stopping.update()
        n_running = count_running()
        if on_step is not None:
            on_step(batch.step, n_running)
        if on_state is not None:
            state, sample = batch.state(), symmetry is not None and batch.step == first_step + 1
            with operator_checks.unchanged(state.tensors, "on_state must not change its state", sample):
                on_state(state)
    if symmetry is not None:
        if batch.step <= SymmetryCheck.STEPS[0]:
            symmetry.decide_size()
        symmetry.refuse(wait=True)


def _capturable(hvp: Callable[[Tensor], Tensor]) -> bool:
    return getattr(hvp, "capturable", False) is True


def reorthogonalization_modes(
    mode: str | Sequence[str], dims: Sequence[int], num_steps: int, bytes_per_element: int
) -> list[str]:
    """Return the mode of every block. "auto" is resolved from these arguments alone, never from free memory."""
    if not isinstance(mode, str):
        return list(mode)
    if mode != "auto":
        return [mode] * len(dims)
    modes = ["none"] * len(dims)
    room = AUTO_BASIS_BYTES
    for l in sorted(range(len(dims)), key=lambda l: dims[l]):
        room -= dims[l] * num_steps * bytes_per_element
        if room >= 0 and dims[l] <= AUTO_DIMS_PER_STEP * num_steps:
            modes[l] = "full"
    return modes


def _nonfinite_text(result: Quadrature) -> str:
    failed = result.nonfinite.nonzero().tolist()
    p, l = failed[0]
    more = f", and in {len(failed) - 1} more recurrences" if len(failed) > 1 else ""
    return (
        f"batched_slq: hvp must return finite values, got NaN, inf or magnitudes outside 1e-120 ... 1e120 in "
        f"block {l} at step {result.steps[p, l].item() + 1} of probe {p}{more}; the error's .partial holds the result"
    )
