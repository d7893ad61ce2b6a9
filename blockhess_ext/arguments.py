"""What a user may get wrong in a call of `batched_slq`, said once, before any work."""

from __future__ import annotations

import operator
import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockhess_ext.layout import Layout

VECTOR_DTYPES = (torch.float32, torch.float64)
REORTHOGONALIZE = ("none", "full", "partial", "auto")

# No memory holds as many of anything; sizes below it do not overflow.
LIMIT = 2**40


def integer(name: str, value: Any, minimum: int, maximum: int | None = None, op: str = "batched_slq") -> int:
    """The value as an int within its bounds; LIMIT is the largest where none is given."""
    rule = f"at least {minimum}" if maximum is None else f"in {minimum} ... {maximum}"
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError):  # a tensor's own error is of the second kind
        raise TypeError(f"{op}: {name} must be an integer {rule}, got {value!r}") from None
    if maximum is None and number > LIMIT:
        raise ValueError(f"{op}: {name} must be at most {LIMIT}, got {value!r}")
    if isinstance(value, bool) or number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{op}: {name} must be an integer {rule}, got {value!r}")
    return number


def tolerance(tol: Any, sigma: Any, op: str = "batched_slq") -> tuple[float | None, float | None]:
    """tol above 0, and sigma in (0, 1], which means something only beside it; or None.

    tol is a share of the spectrum's range, so at most 1; with sigma an L1 distance of densities, so at most 2.
    """
    share = " (a share of the spectrum's range)"
    of_tol = (2, " (an L1 distance of densities)") if sigma is not None else (1, share)
    for name, value, (most, meaning) in (("tol", tol, of_tol), ("sigma", sigma, (1, share))):
        if value is None:
            continue
        rule = f"above 0 and at most {most}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{op}: {name} must be None or a number {rule}, got {value!r}")
        if not 0 < value <= most:
            raise ValueError(f"{op}: {name} must be {rule}{meaning}, got {value!r}")
    if sigma is not None and tol is None:
        raise ValueError(f"{op}: tol must be given with sigma, got sigma={sigma!r} alone")
    return tol, sigma


def choice(name: str, value: Any, choices: Sequence[Any], op: str = "batched_slq") -> Any:
    """The value, one of the choices and of its type: 1 is not True, and arrays are not compared."""
    if not any(type(value) is type(c) and value == c for c in choices):
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    return value


def reorthogonalization(wish: str | Sequence[str], n_blocks: int) -> str | Sequence[str]:
    """One word for all blocks, or one for each."""
    if isinstance(wish, str):
        return choice("reorthogonalize", wish, REORTHOGONALIZE)  # type: ignore[no-any-return]
    if not isinstance(wish, Sequence):
        raise TypeError(f"batched_slq: reorthogonalize must be a word, or one for each block, got {wish!r}")
    each = [choice(f"reorthogonalize[{l}]", word, REORTHOGONALIZE[:-1]) for l, word in enumerate(wish)]
    if len(each) != n_blocks:
        raise ValueError(
            f"batched_slq: reorthogonalize must have a word for each of {n_blocks} blocks, got {len(each)}"
        )
    return each


def resolved_modes(made: Sequence[str], wish: str | Sequence[str], n_blocks: int) -> list[str]:
    """The words of a state, which the wish must allow."""
    if wish != "auto" and list(made) != ([wish] * n_blocks if isinstance(wish, str) else list(wish)):
        raise ValueError(f"batched_slq: reorthogonalize must be that of state, {', '.join(made)}, got {wish!r}")
    return list(made)


def block_dims(dims: Sequence[int]) -> tuple[int, ...]:
    """The sizes of the blocks: at least one block, each of at least one element."""
    try:
        sizes = tuple(integer(f"dims[{l}]", dim, 1) for l, dim in enumerate(dims))
    except TypeError as error:
        if "batched_slq" in str(error):
            raise
        raise TypeError(f"batched_slq: dims must be a sequence of integers, got {dims!r}") from None
    if not sizes:
        raise ValueError("batched_slq: dims must name at least one block, got none")
    return sizes


def probe_seed(seed: int | None) -> int:
    """The seed, or a fresh one where None is given."""
    return secrets.randbits(63) if seed is None else integer("seed", seed, 0, 2**63 - 1)


def block_id_tensor(block_ids: Sequence[int] | None, n_blocks: int) -> Tensor:
    """The ids that key the probes, by default the blocks' indices: (n_blocks,) int64."""
    try:
        ids = list(range(n_blocks)) if block_ids is None else list(block_ids)
    except TypeError:
        raise TypeError(f"batched_slq: block_ids must be a sequence of integers, got {block_ids!r}") from None
    if len(ids) != n_blocks:
        raise ValueError(f"batched_slq: block_ids must hold n_blocks = {n_blocks} ids, got {len(ids)}")
    return torch.tensor([integer(f"block_ids[{l}]", i, 0, 2**63 - 1) for l, i in enumerate(ids)])


def given_probes(probes: Tensor, layout: Layout, dtype: torch.dtype | None) -> tuple[int, torch.dtype]:
    """How many probes the user gives, and their dtype."""
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
    """A copy of the user's probes with every segment brought to norm 1."""
    unit = probes.detach().clone(memory_format=torch.contiguous_format)
    for l in range(layout.n_blocks):
        segment = unit[:, layout.columns(l)]
        norm = segment.norm(dim=1, keepdim=True, dtype=torch.float64)
        bad = ~((norm > 0) & norm.isfinite())
        if bad.any():
            p = int(bad.nonzero()[0, 0])
            raise ValueError(
                f"batched_slq: probes must be finite and not zero in every block, got norm {norm[p].item()} "
                f"in block {l} of probe {p}"
            )
        segment /= norm.to(segment.dtype)
    return unit


def hvp_result(w: Any, v: Tensor) -> Tensor:
    """The operator's result, of the shape, dtype and device of its argument; contiguous."""
    if not isinstance(w, Tensor):
        raise TypeError(f"batched_slq: hvp(v) must return a tensor, got {type(w).__name__}")
    for what in ("shape", "dtype", "device"):
        wanted, got = getattr(v, what), getattr(w, what)
        if wanted != got:
            if what == "shape":
                wanted, got = f"(n_probes, n) = {tuple(wanted)}", tuple(got)
            raise ValueError(f"batched_slq: hvp(v) must return {what} {wanted}, got {got}")
    return w.detach().contiguous()
