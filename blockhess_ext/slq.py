"""Stochastic Lanczos quadrature of many blocks and probes at once (the paper's Algorithm 5).

Every (probe, block) pair is a Lanczos recurrence of its own; all advance together, one call of the operator and one
pass of the kernels a step. A recurrence ends by itself when its Krylov space is exhausted, when it has made as many
steps as its block has elements, when its quadrature has settled, or when the operator fails it; the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blockhess_ext import arguments, completion, huge_pages, ops
from blockhess_ext.cuda_graph import Recorder, Step, recorder_of, replayed
from blockhess_ext.device import memory_explained, usable
from blockhess_ext.layout import Layout
from blockhess_ext.quadrature import Quadrature
from blockhess_ext.recurrences import NON_FINITE
from blockhess_ext.state import LanczosBatch, State

# "auto" keeps the basis of blocks so small that their Krylov space may be exhausted, smallest first, up to this size.
# Larger blocks do without: the density is sound all the same (Chen, Trogdon, Ubaru 2021).
AUTO_BASIS_BYTES = 2**28
AUTO_DIMS_PER_STEP = 8


class NonFiniteError(ValueError):
    """The operator returned NaN, inf or what is out of range. `partial` holds all else; its `nonfinite` marks these."""

    def __init__(self, message: str, partial: Quadrature) -> None:
        super().__init__(message)
        self.partial = partial


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
    cuda_graph: bool = False,
    on_step: Callable[[int, int], None] | None = None,
    state: State | None = None,
    on_state: Callable[[State], None] | None = None,
) -> Quadrature:
    """Gauss quadratures of the spectral measures of a block-diagonal symmetric operator.

    Args:
        hvp: maps v (n_probes, n) to H v, same shape, dtype and device, with n = sum(dims). Block l of the result may
            depend on block l of v only. Its result is read, never modified. Segments of v have norm 1, or are zero
            where the recurrence is finished. If it has a method `mark_finished(finished)`, that is told (n_probes,
            n_blocks) bool on the CPU whenever more recurrences are known to have finished; their part of the result is
            ignored from then on.
        dims: elements of each block.
        num_probes: random vectors a block.
        first_probe: index of the first of them; probe p of a seed is the same vector in every call.
        num_steps: most Lanczos steps; a block makes no more than it has elements.
        tol: end a recurrence once its quadrature is within this share of the range of its nodes from its limit, in
            Wasserstein-1 distance, as the change between two looks tells, twice in a row. Looks are 5 steps apart,
            later an eighth of all steps.
        sigma: with tol: measure by the L1 distance, in 0 ... 2, of densities blurred by a Gaussian of this share of the
            range.
        probes: (n_probes, n) vectors to use instead of random ones; each segment is normalised.
        block_ids: non-negative integers that key the random vectors of each block; by default the block's index.
        distribution: "gaussian" or "rademacher".
        reorthogonalize: "none", "full" (classical Gram-Schmidt twice, keeps num_steps vectors a probe), "partial"
            (keeps as many, projects only where orthogonality is about to be lost: see `orthogonality`), or "auto": full
            for blocks of at most 8 num_steps elements, as far as 256 MiB hold their basis, none for the others. Or
            "none", "full" or "partial" for each block.
        seed: of the random vectors; None takes a fresh one, recorded in the result.
        dtype: of the vectors, float32 (default) or float64.
        device: of the vectors; by default that of `probes`, or the CPU.
        on_nonfinite: "raise" or "report": what to do when in some recurrence hvp returned NaN, inf or, in float64, a
            size beyond 1e120, or below 1e-120 and not 0, once all others are done.
        cuda_graph: replay every step from a CUDA graph, for batches so small that launching kernels takes longer than
            running them; the results keep their bits. hvp stays outside, and its result is copied into one more set of
            vectors, unless it has an attribute `capturable` that is True. With that it promises that every call gives
            the current stream the same work on the same addresses, whatever `mark_finished` told it, that no call
            waits for the device, and that it keeps no tensor made in a call. Two captures wait for the device.
        on_step: called after every step with the number of steps made and of recurrences still running, as far as the
            host knows: on a GPU it learns a few steps late that one has finished.
        state: go on from here instead of from the first step, to the same bits as without the stop. All other arguments
            are those of the run that it came from, but for num_steps, which may be larger, and reorthogonalize="auto",
            which then takes that run's words. num_steps = state.step makes the quadrature of what the state holds.
        on_state: called after every step with the state, whose tensors the next step changes: what is to be kept must
            be copied (`State.copy`). That of the last step stays as it is.

    Returns:
        Quadrature with nodes and weights (n_probes, n_blocks, min(num_steps, max(dims))) float64.

    Raises:
        ValueError, TypeError: an argument, or what hvp returns, is not as described.
        RuntimeError: hvp says that it is capturable and is not.
        NonFiniteError: see on_nonfinite; `.partial` is the result of everything else.

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
    arguments.choice("on_nonfinite", on_nonfinite, ("raise", "report"))
    arguments.choice("cuda_graph", cuda_graph, (True, False))
    if device is None:
        device = probes.device if isinstance(probes, Tensor) else "cpu"
    device = usable(device)
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
        num_probes, dtype = arguments.given_probes(probes, layout, dtype)

    row_bytes = num_probes * dtype.itemsize
    if state is None:
        words = reorthogonalized_blocks(reorthogonalize, dims, num_steps, bytes_each=row_bytes)
    else:
        words = arguments.resolved_modes(state.reorthogonalize, reorthogonalize, len(dims))
        arguments.integer("num_steps", num_steps, state.step)
    layout = layout.with_basis([word != "none" for word in words])
    basis_bytes = layout.n_basis * min(num_steps, layout.n) * row_bytes
    sets = 4 if cuda_graph and not _capturable(hvp) else 3
    with memory_explained(sets, layout.n * row_bytes, basis_bytes):
        v = huge_pages.zeros(num_probes, layout.n, dtype=dtype, device=device)
        if state is None and probes is not None:
            v.copy_(arguments.unit_probes(probes, layout))
        elif state is None:
            assert seed is not None
            v.copy_(ops.random_probes(
                layout, num_probes, seed=seed, block_ids=ids, first_probe=first_probe, distribution=distribution,
                dtype=dtype,
            ))  # fmt: skip
        flight = LanczosBatch(v, layout, num_steps, words, tol, sigma, 0 if state is None else state.step)
        if state is not None:
            flight.load(state)
        _lanczos(hvp, flight, layout, recorder, on_step, on_state)

    recurrences, m = flight.recurrences, flight.num_steps
    alpha, beta = (table[:m].permute(1, 2, 0).contiguous() for table in (recurrences.alpha, recurrences.beta))
    nodes, weights = ops.tridiag_quadrature(alpha.flatten(0, 1), beta.flatten(0, 1), recurrences.steps.flatten())
    result = Quadrature(
        nodes=nodes.view_as(alpha),
        weights=weights.view_as(alpha),
        alpha=alpha,
        beta=beta,
        steps=recurrences.steps,
        nonfinite=recurrences.status == NON_FINITE,
        dims=dims,
        block_ids=tuple(ids.tolist()),
        num_steps=num_steps,
        seed=seed,
        distribution=distribution,
        reorthogonalize=tuple(words),
        dtype=str(dtype).removeprefix("torch."),
    )
    if on_nonfinite == "raise" and result.nonfinite.any():
        raise NonFiniteError(_nonfinite_text(result), result)
    return result


def _lanczos(
    hvp: Callable[[Tensor], Tensor],
    flight: LanczosBatch,
    layout: Layout,
    recorder: Recorder | None,
    on_step: Callable[[int, int], None] | None,
    on_state: Callable[[State], None] | None,
) -> None:
    """Runs all recurrences to their end, or to the most steps; replays the steps where there is a recorder."""
    recurrences, basis, projections = flight.recurrences, flight.basis, flight.projections
    partial = recurrences.norm.new_empty(len(flight.v), layout.n_tiles)
    basis_partial = partial.new_empty(*partial.shape, len(basis) + 1)
    mark_finished = getattr(hvp, "mark_finished", None)
    watch = completion.watch(recurrences)
    n_finished = 0

    def product(v: Tensor) -> Tensor:
        version = v._version
        w = arguments.hvp_result(hvp(v), v)
        if v._version != version:
            raise ValueError("batched_slq: hvp must not change its argument in place, got a changed v")
        return w

    def advance(w: Tensor, v: Tensor, v_prev: Tensor) -> None:
        ops.lanczos_step(w, v, v_prev, recurrences, layout, partial)
        if len(basis):
            ops.reorthogonalize(v_prev, basis, recurrences, layout, basis_partial, projections.due())

    def plain(v: Tensor, v_prev: Tensor) -> None:
        advance(product(v), v, v_prev)  # w is not kept: no more than three sets of vectors are ever held

    def running() -> int:
        """How many recurrences are, as far as the host knows; the operator is told what is not."""
        nonlocal n_finished
        known = watch.look()
        if mark_finished is not None and int(known.sum()) > n_finished:
            mark_finished(known)
        n_finished = int(known.sum())
        return known.numel() - n_finished

    step: Step = plain
    if recorder:
        step = replayed(recorder, product, advance, flight.v, _capturable(hvp))
    left = running()
    while left and flight.step < flight.num_steps:
        step(flight.v, flight.v_prev)
        flight.turn()
        flight.settled.look()
        left = running()
        if on_step is not None:
            on_step(flight.step, left)
        if on_state is not None:
            on_state(flight.state())


def _capturable(hvp: Callable[[Tensor], Tensor]) -> bool:
    return getattr(hvp, "capturable", False) is True


def reorthogonalized_blocks(
    wish: str | Sequence[str], dims: Sequence[int], num_steps: int, bytes_each: int
) -> list[str]:
    """The word of every block; decided from the problem alone, never from free memory."""
    if not isinstance(wish, str):
        return list(wish)
    if wish != "auto":
        return [wish] * len(dims)
    words = ["none"] * len(dims)
    room = AUTO_BASIS_BYTES
    for l in sorted(range(len(dims)), key=lambda l: dims[l]):
        room -= dims[l] * num_steps * bytes_each
        if room >= 0 and dims[l] <= AUTO_DIMS_PER_STEP * num_steps:
            words[l] = "full"
    return words


def _nonfinite_text(result: Quadrature) -> str:
    failed = result.nonfinite.nonzero().tolist()
    p, l = failed[0]
    more = f", and in {len(failed) - 1} more recurrences" if len(failed) > 1 else ""
    return (
        f"batched_slq: hvp must return finite values, got NaN, inf or sizes out of range (1e-120 ... 1e120) in "
        f"block {l} at step {result.steps[p, l].item() + 1} of probe {p}{more}; the error's .partial holds the others"
    )
