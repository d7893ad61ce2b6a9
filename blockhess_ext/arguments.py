"""Validation of the arguments of `batched_slq`, before any computation."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from blockhess_ext.layout import Layout

VECTOR_DTYPES = (torch.float32, torch.float64)
REORTHOGONALIZE = ("none", "full", "partial", "auto")

# Upper bound of every count: larger than any memory, and products with item sizes fit in int64.
LIMIT = 2**40


def integer(name: str, value: Any, minimum: int, maximum: int | None = None, op: str = "batched_slq") -> int:
    """Return value as an int, checked to be in [minimum, maximum]; maximum defaults to LIMIT."""
    rule = f"at least {minimum}" if maximum is None else f"in {minimum} ... {maximum}"
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # tensors raise RuntimeError
        raise TypeError(f"{op}: {name} must be an integer {rule}, got {value!r}") from None
    if maximum is None and number > LIMIT:
        raise ValueError(f"{op}: {name} must be at most {LIMIT}, got {value!r}")
    if isinstance(value, bool) or number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{op}: {name} must be an integer {rule}, got {value!r}")
    return number


def tolerance(
    tol: Any, sigma: Any, op: str = "batched_slq", sigma_name: str = "sigma"
) -> tuple[float | None, float | None]:
    """Return (tol, sigma), each checked to be None or within its bounds; sigma requires tol.

    tol is a fraction of the spectral range, at most 1; with sigma it is an L1 distance of densities, at most 2.
    """
    fraction = " (a fraction of the spectral range)"
    tol_rule = (2, " (an L1 distance of densities)") if sigma is not None else (1, fraction)
    for name, value, (most, meaning) in (("tol", tol, tol_rule), (sigma_name, sigma, (1, fraction))):
        if value is None:
            continue
        rule = f"above 0 and at most {most}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{op}: {name} must be None or a number {rule}, got {value!r}")
        if not 0 < value <= most:
            raise ValueError(f"{op}: {name} must be {rule}{meaning}, got {value!r}")
    if sigma is not None and tol is None:
        raise ValueError(f"{op}: tol must be given with {sigma_name}, got {sigma_name}={sigma!r} alone")
    return tol, sigma


def choice(name: str, value: Any, choices: Collection[Any], op: str = "batched_slq") -> Any:
    """Return value, checked to be one of the choices and of the same type, so that 1 is not accepted for True."""
    if not any(type(value) is type(c) and value == c for c in choices):
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    return value


def reorthogonalization(mode: str | Sequence[str], n_blocks: int) -> str | Sequence[str]:
    """Return the checked mode: one for all blocks, or a sequence of one per block."""
    if isinstance(mode, str):
        return choice("reorthogonalize", mode, REORTHOGONALIZE)  # type: ignore[no-any-return]
    if not isinstance(mode, Sequence):
        raise TypeError(f"batched_slq: reorthogonalize must be a string or a sequence of strings, got {mode!r}")
    modes = [choice(f"reorthogonalize[{l}]", block_mode, REORTHOGONALIZE[:-1]) for l, block_mode in enumerate(mode)]
    if len(modes) != n_blocks:
        raise ValueError(f"batched_slq: reorthogonalize must have n_blocks = {n_blocks} entries, got {len(modes)}")
    return modes


def state_modes(modes: Sequence[str], mode: str | Sequence[str], n_blocks: int) -> list[str]:
    """Return the modes of a state, checked against the argument `reorthogonalize`."""
    if mode != "auto" and list(modes) != ([mode] * n_blocks if isinstance(mode, str) else list(mode)):
        raise ValueError(f"batched_slq: reorthogonalize must equal that of state, {', '.join(modes)}, got {mode!r}")
    return list(modes)


def block_dims(dims: Sequence[int]) -> tuple[int, ...]:
    """Return the block sizes, checked to be at least one block of at least one element each."""
    try:
        sizes = tuple(integer(f"dims[{l}]", dim, 1) for l, dim in enumerate(dims))
    except TypeError as error:
        if "batched_slq" in str(error):
            raise
        raise TypeError(f"batched_slq: dims must be a sequence of integers, got {dims!r}") from None
    if not sizes:
        raise ValueError("batched_slq: dims must have at least one entry, got none")
    return sizes


def probe_seed(seed: int | None) -> int:
    """Return the checked seed, or a random one for None."""
    return secrets.randbits(63) if seed is None else integer("seed", seed, 0, 2**63 - 1)


def block_id_tensor(block_ids: Sequence[int] | None, n_blocks: int) -> Tensor:
    """Return the ids that key the random probes, by default the block indices: (n_blocks,) int64."""
    if block_ids is None:
        return torch.arange(n_blocks, device="cpu")
    try:
        ids = list(block_ids)
    except TypeError:
        raise TypeError(f"batched_slq: block_ids must be a sequence of integers, got {block_ids!r}") from None
    if len(ids) != n_blocks:
        raise ValueError(f"batched_slq: block_ids must have n_blocks = {n_blocks} entries, got {len(ids)}")
    return torch.tensor([integer(f"block_ids[{l}]", i, 0, 2**63 - 1) for l, i in enumerate(ids)], device="cpu")


def check_probes(probes: Tensor, layout: Layout, dtype: torch.dtype | None) -> tuple[int, torch.dtype]:
    """Check probes supplied by the caller; return their number and dtype."""
    if not isinstance(probes, Tensor):
        raise TypeError(f"batched_slq: probes must be a tensor, got {type(probes).__name__}")
    if probes.dim() != 2 or probes.shape[0] < 1 or probes.shape[1] != layout.n:
        raise ValueError(
            f"batched_slq: probes must have shape (n_probes, n) = (n_probes, {layout.n}), got {tuple(probes.shape)}"
        )
    if dtype not in (None, probes.dtype):
        raise ValueError(f"batched_slq: dtype must be that of probes, {probes.dtype}, or None, got {dtype}")
    choice("dtype of probes", probes.dtype, VECTOR_DTYPES)
    if probes.device != layout.offsets.device:
        raise ValueError(f"batched_slq: device must be that of probes, {probes.device}, got {layout.offsets.device}")
    return len(probes), probes.dtype


def unit_probes(probes: Tensor, layout: Layout) -> Tensor:
    """Return a copy of the probes with every segment normalized."""
    unit = probes.detach().clone(memory_format=torch.contiguous_format)
    for l in range(layout.n_blocks):
        segment = unit[:, layout.columns(l)]
        largest = torch.linalg.vector_norm(segment, torch.inf, dim=1, keepdim=True)
        half = -largest.frexp().exponent // 2
        for _ in range(2):  # by halves, as 2^1073 is no float64: squares neither overflow nor underflow then
            segment *= torch.ldexp(torch.ones_like(largest), half)
        norm = segment.norm(dim=1, keepdim=True, dtype=torch.float64)
        bad = ~((norm > 0) & norm.isfinite())
        if bad.any():
            p = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"batched_slq: probes must be finite and nonzero in every block, got largest magnitude "
                f"{largest[p].item()} in block {l} of probe {p}"
            )
        segment /= norm.to(segment.dtype)
    return unit


def hvp_result(w: Any, v: Tensor) -> Tensor:
    """Return the operator's result w, contiguous, checked to have the shape, dtype and device of v."""
    if not isinstance(w, Tensor) or w.is_nested:
        kind = "a nested tensor" if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"batched_slq: hvp(v) must return a tensor, got {kind}")
    for what in ("shape", "dtype", "device", "layout"):
        expected, got = getattr(v, what), getattr(w, what)
        if expected != got:
            if what == "shape":
                expected, got = f"(n_probes, n) = {tuple(expected)}", tuple(got)
            raise ValueError(f"batched_slq: hvp(v) must return {what} {expected}, got {got}")
    return w.detach().contiguous()
