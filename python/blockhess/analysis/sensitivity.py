"""Sensitivity of JS0 to sigma, axis and normalization."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from blockhess._text import format_table
from blockhess.analysis.axes import Axis
from blockhess.analysis.comparison import js0
from blockhess.analysis.jensen_shannon import BATCHNORM_POLICIES, JS0, KINDS
from blockhess.analysis.selection import comparable_blocks
from blockhess.results.data import SpectraData

SIGMAS = (1 / 3, 1.0, 3.0)
NORMALIZATIONS: tuple[str | int, ...] = ("none", "radius", 10, "trace")


@dataclass(frozen=True)
class Row:
    """JS0 for one axis and sigma.

    Attributes:
        axis: with its normalization and scale.
        sigma: standard deviation of the Gaussian on the axis.
        relative_sigma: sigma divided by the default sigma of the axis.
        js0: None if fewer than two blocks can be compared.
    """

    axis: Axis
    sigma: float
    relative_sigma: float
    js0: JS0 | None


@dataclass(frozen=True)
class Sensitivity:
    """A table of JS0, printed by str().

    Attributes:
        rows: one per combination, grouped by axis.
    """

    rows: tuple[Row, ...]

    def range(self) -> tuple[float, float]:
        """Return the smallest and the largest JS0 of the table."""
        values = [row.js0.value for row in self.rows if row.js0 is not None]
        return min(values), max(values)

    def __str__(self) -> str:
        header = ["axis", "divided by", "scale", "sigma", "of default", "JS0", "blocks", "excluded"]
        lines = [
            [
                row.axis.name,
                f"eigenvalue {row.axis.normalize}" if isinstance(row.axis.normalize, int) else row.axis.normalize,
                "" if row.axis.scale is None else f"{row.axis.scale:.3g}",
                f"{row.sigma:.3g}",
                f"{row.relative_sigma:.3g}",
                f"{row.js0.value:.2g}" if row.js0 else "-",
                str(len(row.js0.blocks)) if row.js0 else "-",
                str(len(row.js0.excluded)) if row.js0 and row.js0.excluded else "",
            ]
            for row in self.rows
        ]
        known = [row.js0 for row in self.rows if row.js0]
        if not known:
            return format_table(header, lines, left=2)
        low, high = self.range()
        policy = BATCHNORM_POLICIES.get(known[0].batchnorm, "BatchNorm policy not recorded")
        title = f"JS0: {KINDS[known[0].kind]}, base {known[0].base:.6g}; {policy}; from {low:.2g} to {high:.2g}"
        return f"{title}\n\n{format_table(header, lines, left=2)}"


def sensitivity(
    spectra: SpectraData,
    sigmas: Sequence[float] = SIGMAS,
    axes: Sequence[str] = ("linear", "asinh"),
    normalizations: Sequence[str | int] = NORMALIZATIONS,
    kind: str = "distance",
    base: float = 2.0,
    blocks: Sequence[str] | None = None,
) -> Sensitivity:
    """Tabulate JS0 over sigma, axis and normalization, with two digits; js0(confidence=) has the error.

    Args:
        sigmas: multiples of the default sigma of each axis.
        axes, normalizations: names and normalizations of axes, see Axis.
        kind, base, blocks: see js_matrix.

    Example:
        >>> table = spectra.sensitivity(sigmas=[0.5, 1.0], axes=["linear"], normalizations=["none", "radius"])
        >>> print(table)
    """
    rows = []
    for axis in itertools.starmap(Axis, itertools.product(axes, normalizations)):
        if blocks is None and len(comparable_blocks(spectra, axis)) < 2:
            rows.append(Row(axis, float("nan"), float("nan"), None))
            continue
        default = js0(spectra, kind, base, axis=axis, blocks=blocks)
        resolved = replace(axis, scale=default.scale)
        for multiple in sigmas:
            value = default if multiple == 1 else js0(spectra, kind, base, multiple * default.sigma, resolved, blocks)
            rows.append(Row(resolved, value.sigma, float(multiple), value))
    return Sensitivity(tuple(rows))
