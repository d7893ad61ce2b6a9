"""SGD or Adam? What JS0 at initialization says by the calibrated rule, and which blocks raise it.

The rule is that of calibration.py; where it does not hold, the decision is "undecided".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockhess._text import format_table, number
from blockhess.analysis.jensen_shannon import JS0
from blockhess.analysis.learning_rates import rates
from blockhess_paper.training.calibration import UNDECIDED, Calibration, shipped_calibration

if TYPE_CHECKING:
    from blockhess.spectra import Spectra

SHOWN_BLOCKS = 5


@dataclass(frozen=True)
class Advice:
    """A recommendation with its reasons; print it.

    Attributes:
        decision: "SGD fine", "Adam needed" or "undecided".
        reason: why.
        js0: the value that was compared with the thresholds of the calibration.
        drivers: (block, mean JS distance to all others), largest first.
        rates: block -> 1 / lambda_max, None where a block has no positive eigenvalue.
        calibration: the calibration behind the decision.
    """

    decision: str
    reason: str
    js0: JS0
    drivers: tuple[tuple[str, float], ...]
    rates: dict[str, float | None]
    calibration: Calibration

    def __str__(self) -> str:
        rows = [
            [name, f"{distance:.3f}", "-" if self.rates[name] is None else number(self.rates[name] or 0.0)]
            for name, distance in self.drivers[:SHOWN_BLOCKS]
        ]
        known = [rate for rate in self.rates.values() if rate is not None]
        spread = f"; 1 / lambda_max spans a factor of {number(max(known) / min(known))}" if known else ""
        return "\n".join(
            [
                f"{self.decision}: {self.reason}",
                str(self.js0),
                str(self.calibration),
                f"blocks that differ most from the others{spread}:",
                format_table(["block", "mean JS distance", "1 / lambda_max"], rows),
            ]
        )


def advice(spectra: Spectra, calibration: Calibration | None = None) -> Advice:
    """Recommend SGD or Adam where the calibration allows it, else say "undecided" and why.

    Args:
        spectra: block spectra at initialization, one block per parameter tensor, as in the calibration. The thresholds
            do not apply to the JS0 of another partition, of another BatchNorm policy or of a trained model.
        calibration: None means the calibration that ships with the package.

    Raises:
        ValueError: fewer than two blocks can be compared.

    Example:
        >>> print(advice(blockhess.load("gpt.npz")))
    """
    calibration = calibration or shipped_calibration()
    matrix, js0 = spectra.compare(axis="linear")  # as in the calibration
    mean = matrix.sum(1) / (len(matrix) - 1)
    drivers = sorted(zip(js0.blocks, mean.tolist()), key=lambda pair: -pair[1])
    decision, reason = UNDECIDED, calibration.failure
    unlike = _unlike(spectra, js0)
    if reason:
        reason = f"JS0 does not tell in the calibration: {reason}"
    elif unlike:
        reason = f"not comparable with the calibration: {unlike}"
    else:
        rule = calibration.rule
        decision = rule.decide(js0.value)
        zone = f"SGD fine below {rule.fine_below:.3g}, Adam needed above {rule.needed_above:.3g}"
        reason = f"JS0 = {js0.value:.3g}, calibrated thresholds: {zone}"
    return Advice(decision, reason, js0, tuple(drivers), rates(spectra), calibration)


def _unlike(spectra: Spectra, js0: JS0) -> str:
    """Return how these spectra differ from those of the calibration, or ""."""
    several = [block.name for block in spectra.blocks if len(block.parameters) != 1]
    if several:
        return f"its blocks are single parameter tensors, {several[0]!r} is not"
    if js0.batchnorm not in ("eval", "none"):
        return "it has BatchNorm in eval mode"
    return ""
