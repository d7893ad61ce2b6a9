"""Checks that an operator is symmetric, block-diagonal, of a size that its dtype resolves, and changes no argument.

    <H v_j, v_{j-1}> = <v_j, H v_{j-1}> = beta_{j-1}     if H is symmetric
    (H u)_l = 0 where u_l = 0                            if H is block-diagonal

The first identity is tested on products of the recurrence itself, at the cost of two dot products per run; the second
needs one more product. Neither changes a bit of the result.

An error delta of the products relative to |H| changes <H v_1, v_0> by delta |H v_0| at most, and by delta |H v_1| times
|cos| of the angle between the error and v_0, which for a random v_0 is about 1 / sqrt(dim). Later steps
amplify errors by |T| / min(beta) at most. TOLERANCE is about five times the rounding error of a bfloat16 product.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from blockhess_ext import arguments
from blockhess_ext.completion import Event
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import NON_FINITE, RUNNING, Recurrences

TOLERANCE = 0.02
# Blocks below this share of the largest |T| are not judged: they may be zero but for rounding.
FLAT = 1e-4
# Standard deviations by which the cosine between a random vector and an error may exceed 0.
DEVIATIONS = 4
SAMPLE = 2**12  # elements compared to find out whether a tensor was changed
_EXPLAINED = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError,
)  # fmt: skip

# The default pays at most 1 / CHEAP of the products for the check of blocks.
CHEAP = 50
_checked: weakref.WeakValueDictionary[tuple[int, tuple[int, ...]], object] = weakref.WeakValueDictionary()


def product(hvp: Callable[[Tensor], Tensor], v: Tensor, sample: bool = False) -> Tensor:
    """Return hvp(v), contiguous.

    Args:
        hvp: the operator.
        v: (n_probes, n).
        sample: also detect changes of v on the CPU that torch does not count, such as those by NumPy.

    Raises:
        ValueError, TypeError: the result does not fit v, or v was changed.
        RuntimeError, TypeError, ValueError: hvp raised an exception of Python, torch or NumPy, which is the cause.
            Exceptions of other classes pass, such as those that end a run.
    """
    try:
        with unchanged({"v": v}, "hvp must not change its argument in place", sample):
            w = hvp(v)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except _EXPLAINED as error:
        text = next(iter(str(error).strip().splitlines()), "no message")
        if text.startswith(("batched_slq:", "spectrum:")):
            raise
        if "can't allocate memory" in text:  # on the CPU, a RuntimeError
            raise torch.OutOfMemoryError(text) from error
        kind = next((kind for kind in (RuntimeError, TypeError) if isinstance(error, kind)), ValueError)
        raise kind(
            f"batched_slq: hvp must multiply a tensor of shape (n_probes, n) = {tuple(v.shape)} in {v.dtype} on "
            f"{v.device}, got {type(error).__name__}: {text}; try hvp(torch.zeros{tuple(v.shape)}) alone"
        ) from error
    return arguments.hvp_result(w, v)


@contextlib.contextmanager
def unchanged(tensors: Mapping[str, Tensor], rule: str, sample: bool) -> Iterator[None]:
    """Check that none of the tensors, contiguous ones, is changed within the context.

    Args:
        tensors: by name.
        rule: what the message says.
        sample: also detect changes on the CPU that torch does not count, such as those by NumPy.
    """
    versions = {name: tensor._version for name, tensor in tensors.items()}
    parts = {name: t.flatten()[:: 1 + t.numel() // SAMPLE] for name, t in tensors.items() if sample and not t.is_cuda}
    before = {name: part.clone() for name, part in parts.items()}
    yield
    for name, tensor in tensors.items():
        if tensor._version != versions[name] or (name in parts and not torch.equal(parts[name], before[name])):
            raise ValueError(f"batched_slq: {rule}, got a changed {name}")


def least_size(dims: Sequence[int], dtype: torch.dtype) -> float:
    """Return the norm below which most elements of a product with the largest block are subnormal and lack digits."""
    return float(torch.finfo(dtype).tiny * max(dims) ** 0.5)


class SymmetryCheck:
    """Compares <H v_j, v_{j-1}> with beta_{j-1} at two steps j; the host does not wait for the device.

    Args:
        recurrences: the recurrences, which are only read.
        layout: the blocks.
        random: whether the first vectors are random.
        dtype: of the products. Where all of them are so small that most elements are subnormal, they lack digits.
    """

    STEPS = (1, 3)

    def __init__(self, recurrences: Recurrences, layout: Layout, random: bool, dtype: torch.dtype) -> None:
        self._recurrences, self._layout, self._dtype = recurrences, layout, dtype
        self._least = least_size(layout.dims, dtype)
        share = DEVIATIONS / torch.tensor(layout.dims, dtype=torch.float64, device="cpu").sqrt()
        self._share = (share.clamp(max=1) if random else torch.ones_like(share)).to(recurrences.norm.device)
        on_gpu = recurrences.status.is_cuda
        self._pinned = [
            torch.empty(recurrences.status.shape, dtype=torch.bool, pin_memory=on_gpu, device="cpu")
            for _ in range(len(self.STEPS) + 1)  # of symmetry, and of size
        ]
        self._before: tuple[Tensor, Tensor, Tensor] | None = None
        # Recurrences that fail, the event after which that is known, and the rule with what was got.
        self._pending: list[tuple[Tensor, Event | None, Callable[[int, int], str]]] = []

    def is_due(self, step: int) -> bool:
        """Return whether step j is one of those tested."""
        return step in self.STEPS

    def compare(self, w: Tensor, v_prev: Tensor) -> None:
        """Compute the products <w, v_prev> of a step that is due, before `lanczos_step`."""
        r = self._recurrences
        self._before = self._layout.dots(w, v_prev), r.norm.clone(), r.status == RUNNING

    def decide(self, step: int) -> None:
        """Judge a step that was due, after it was made."""
        assert self._before is not None
        r, (dot, norm, running) = self._recurrences, self._before
        beta = r.beta[step - 1].clone()
        scale = norm + self._share * r.norm if step == 1 else r.norm**2 / r.beta[:step].amin(0)
        judged = running & (r.status != NON_FINITE) & dot.isfinite() & (r.norm > FLAT * r.norm.max())
        bad = judged & ((dot - beta).abs() > TOLERANCE * scale)

        def asymmetric(p: int, l: int) -> str:
            return (
                f"be symmetric and the same in every call, got <H v, u> = {dot[p, l].item():.6g} where <v, H u> = "
                f"{beta[p, l].item():.6g} in block {l} of probe {p}; check=False skips this check, as for a block that "
                "is zero but for rounding"
            )

        self._pending.append((*self._to_host(bad), asymmetric))
        self._before = None
        if step == self.STEPS[0]:
            self.decide_size()

    def decide_size(self) -> None:
        """Judge the size of the products made so far."""
        norm, size = self._recurrences.norm, self._recurrences.norm.max()
        self._pending.append((*self._to_host((norm == size) & (size > 0) & (size < self._least)), self._too_small))

    def _too_small(self, p: int, l: int) -> str:
        got = self._recurrences.norm[p, l].item()
        return (
            f"return products of size {self._least:.2g} at least in {self._dtype}, got {got:.2g}, whose elements are "
            "subnormal and lack digits; multiply the operator by a constant, or pass dtype=torch.float64"
        )

    def _to_host(self, bad: Tensor) -> tuple[Tensor, Event | None]:
        """Return bad on the CPU, and the event after which it is there."""
        if not bad.is_cuda:
            return bad, None
        return self._pinned.pop().copy_(bad, non_blocking=True), torch.cuda.current_stream(bad.device).record_event()

    def refuse(self, wait: bool = False) -> None:
        """Raise ValueError if a recurrence is known to have failed the test.

        Args:
            wait: wait for the device.
        """
        while self._pending:
            bad, event, text = self._pending[0]
            if event is not None:
                if not (wait or event.query()):
                    return
                event.synchronize()
            del self._pending[0]
            if bad.any():
                p, l = bad.nonzero()[0].tolist()
                raise ValueError(f"batched_slq: hvp must {text(p, l)}")


def check_blocks(
    hvp: Callable[[Tensor], Tensor], layout: Layout, u: Tensor, run: Callable[[Callable[[], None]], None]
) -> None:
    """Check that blocks of H u are zero where those of u are, with one product.

    Row p of u is zero in the blocks l in which a bit of l is 0, or 1 in later rows, so that ceil(log2(n_blocks)) rows
    tell every two blocks apart.

    Args:
        hvp: the operator.
        layout: the blocks.
        u: (n_probes, n) zeros; used as scratch.
        run: calls a function on the stream of the products.

    Raises:
        ValueError: a block depends on another one.
    """
    bits = (layout.n_blocks - 1).bit_length()
    row, block = torch.arange(len(u), device="cpu")[:, None], torch.arange(layout.n_blocks, device="cpu")
    given = (block >> row % bits) % 2 != row // bits % 2
    scales = (given * (torch.tensor(layout.dims, device="cpu") / 3) ** -0.5).to(u)
    u.uniform_(-1, 1, generator=torch.Generator(u.device).manual_seed(0))
    for columns, blocks, lengths in layout.pieces(u):
        u[:, columns] *= scales[:, blocks].repeat_interleave(lengths, 1, output_size=columns.stop - columns.start)
    sizes: list[Tensor] = []

    def multiply() -> None:
        w = product(hvp, u, sample=True)
        sizes.append(layout.dots(w, w).sqrt())

    run(multiply)
    u.zero_()
    size = sizes[0].cpu()
    size = torch.where(size.isfinite(), size, 0.0)
    own = torch.where(given.any(0), torch.where(given, size, 0.0).amax(0), size.max())
    leak = torch.where(given | (size <= TOLERANCE * own) | (size <= FLAT * size.max()), 0.0, size)
    if leak.any():
        p, l = divmod(int(leak.argmax()), layout.n_blocks)
        raise ValueError(
            f"batched_slq: hvp must keep blocks apart, got |H v| = {leak[p, l].item():.3g} in block {l} for a vector "
            f"that is zero there; dims must be the sizes of the blocks of a block-diagonal operator"
        )


def is_block_check_due(check: bool | None, hvp: object, dims: Sequence[int], steps: int) -> bool:
    """Return whether to call `check_blocks`.

    Args:
        check: see `batched_slq`.
        hvp: the operator.
        dims: its block sizes.
        steps: number of steps to be made.
    """
    if len(dims) == 1 or steps == 0 or check is False:
        return False
    return check is True or (steps >= CHEAP and (id(hvp), tuple(dims)) not in _checked)


def remember(hvp: object, dims: Sequence[int]) -> None:
    """Remember that an operator keeps these blocks apart, as long as it lives."""
    with contextlib.suppress(TypeError):  # it cannot be referenced weakly
        _checked[id(hvp), tuple(dims)] = hvp
