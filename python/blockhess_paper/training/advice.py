"""SGD or Adam, as far as spectra can tell: the calibration's rule, what drives JS0, a learning rate for every block.

    rate of block l = factor / lambda_max(H_l)                                the paper's blockwise gradient descent

The decision is the rule's of blockhess_paper.training.calibration, "undecided" wherever that does not hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from blockhess._text import format_table, number
from blockhess.analysis.jensen_shannon import JS0
from blockhess.problem.blocks import partition, unwrap
from blockhess_paper.training.calibration import UNDECIDED, Calibration, shipped_calibration

if TYPE_CHECKING:
    from blockhess.spectra import Spectra

SHOWN_BLOCKS = 5


@dataclass(frozen=True)
class Advice:
    """A recommendation with its grounds; print it.

    Attributes:
        decision: "SGD fine", "Adam needed" or "undecided".
        reason: why.
        js0: what was compared with the calibration.
        drivers: (block, mean JS distance to all others), the most different first.
        rates: block -> 1 / lambda_max, None where a block has no positive eigenvalue.
        calibration: with n, its rank correlation and its leave-one-family-out errors.
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
    """Recommend an optimizer where the calibration allows it.

    Args:
        spectra: at initialisation, of every parameter tensor, as the calibration's; another partition, BatchNorm
            policy or a trained model makes another JS0, to which its thresholds do not apply.
        calibration: None means the one that ships with the package.

    Raises:
        ValueError: fewer than two blocks can be compared.

    Example:
        >>> print(advice(blockhess.load("gpt.npz")))
    """
    calibration = calibration or shipped_calibration()
    matrix, js0 = spectra.compare()
    mean = matrix.sum(1) / (len(matrix) - 1)
    drivers = sorted(zip(js0.blocks, mean.tolist()), key=lambda pair: -pair[1])
    decision, reason = UNDECIDED, calibration.broken
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
    """What makes these spectra others than the calibration's."""
    several = [block.name for block in spectra.blocks if len(block.parameters) != 1]
    if several:
        return f"its blocks are single parameter tensors, {several[0]!r} is not"
    if js0.batchnorm not in ("eval", "none"):
        return "it has BatchNorm in eval mode"
    return ""


def rates(spectra: Spectra, factor: float = 1.0) -> dict[str, float | None]:
    """Return block -> factor / lambda_max, None where that is not positive beyond rounding or unknown.

    Raises:
        ValueError: factor is not positive.

    Source: Zhang et al. 2024, the proof of Theorem 1.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"rates: factor must be positive, got {factor}")
    zero = set(spectra.zero_blocks)
    largest = zip(spectra.names, spectra.eigenvalue_range()[1].tolist())
    return {name: factor / value if value > 0 and name not in zero else None for name, value in largest}


def param_groups(spectra: Spectra, model: nn.Module, factor: float = 1.0) -> list[dict[str, Any]]:
    """Return torch param groups with a learning rate for every block: the paper's blockwise gradient descent.

    Blocks without positive curvature, and trainable parameters in no block, get the smallest of the other rates.
    1 / lambda_max holds at the point where the spectra were taken and for the batch they were taken on: with small
    batches, momentum or at initialisation, where curvature still grows, take a smaller factor.

    Args:
        spectra: of whole parameters, not of parts of them.
        model: whose parameters they are.
        factor: of all rates.

    Returns:
        One group a block with keys params, lr, name; and one more, "rest", where parameters are left.

    Raises:
        ValueError: a block is a part of a parameter, the model has no such parameter, or no block has a rate.

    Example:
        >>> optimizer = torch.optim.SGD(spectra.param_groups(model, factor=0.1), momentum=0.9)
    """
    found = rates(spectra, factor)
    known = [rate for rate in found.values() if rate is not None]
    if not known:
        raise ValueError("param_groups: one block at least must have a positive eigenvalue, got none")
    tensors = {block.info.name: block.pieces[0].tensor for block in partition(unwrap(model)).blocks}
    groups, left = [], dict(tensors)
    for block in spectra.blocks:
        unknown = [name for name in block.parameters if name not in tensors]
        if unknown:
            raise ValueError(
                f"param_groups: model must have the parameters of the spectra, got none called {unknown[0]!r}"
            )
        if block.dim != sum(tensors[name].numel() for name in block.parameters):
            raise ValueError(f"param_groups: blocks must be whole parameters, got {block.name!r}")
        params = [left.pop(name) for name in block.parameters if name in left]
        groups.append({"params": params, "lr": found[block.name] or min(known), "name": block.name})
    if left:
        groups.append({"params": list(left.values()), "lr": min(known), "name": "rest"})
    return groups
