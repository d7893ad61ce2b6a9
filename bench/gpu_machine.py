"""What every row of the speed table shares: its target, its numbers, the machine, and the check before the timing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from device_timing import Times, copy_bandwidth
from torch import Tensor

STEP_ELEMENTS = 8  # of a Lanczos step: read w, v; read w, v, v_prev, write r; read r, write v_next


class WrongResult(RuntimeError):
    """A result differs from the reference, so its speed says nothing."""


@dataclass(frozen=True)
class Target:
    """What a row must reach: `value`, as the least or as the most."""

    text: str
    quantity: str
    value: float
    at_least: bool

    def met(self, measured: float) -> bool:
        return measured >= self.value if self.at_least else measured <= self.value


@dataclass
class Row:
    """What one row gave."""

    error: float  # largest difference from the reference, in the unit that the row says
    measured: dict[str, float] = field(default_factory=dict)  # by Target.quantity, and more
    times: dict[str, dict[str, float | int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """Where to measure, how large ("full", "quick" or "tiny"), and the copy bandwidth measured there."""

    device: torch.device
    size: str
    bandwidth: float  # bytes a second, read and written

    @staticmethod
    def measured(device: torch.device, size: str) -> Machine:
        elements = {"full": 2**29, "quick": 2**26, "tiny": 2**16}[size]
        return Machine(device, size, copy_bandwidth(device, elements))

    def pick(self, full: int, quick: int, tiny: int) -> int:
        return {"full": full, "quick": quick, "tiny": tiny}[self.size]

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def share_of_bandwidth(self, n_bytes: float, times: Times) -> float:
        return n_bytes / times.median / self.bandwidth


def check(what: str, error: float, most: float) -> float:
    """The error, if it is at most `most`.

    Raises:
        WrongResult: it is more, or NaN.
    """
    if not error <= most:
        raise WrongResult(f"{what} differs by {error:.3g}, at most {most:.3g} is right; nothing was timed")
    return error


def difference(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| over the largest |b|, by rows so that large tensors need little memory."""
    pairs = list(zip(a.reshape(len(a), -1), b.reshape(len(b), -1)))
    size = max(float(y.abs().max()) for _, y in pairs)
    return max(float((x - y).abs().max()) for x, y in pairs) / max(size, 1e-300)


def log_spaced(n: int, smallest: int, largest: int) -> list[int]:
    ratio = (largest / smallest) ** (1 / (n - 1))
    return [round(smallest * ratio**i) for i in range(n)]


def small_blocks(machine: Machine) -> list[int]:
    """The sizes of many small blocks."""
    return log_spaced(machine.pick(300, 300, 12), 64, machine.pick(65_536, 65_536, 2048))
