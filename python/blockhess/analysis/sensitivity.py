"""JS0 over sigma, axis and normalization in one table: a number that depends on them should be shown with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """JS0 on one axis under one sigma.

    Attributes:
        axis: with its normalization and scale.
        sigma: width on that axis.
        relative_sigma: the same in units of the default sigma of that axis.
        js0: the value with all it depends on, or None where fewer than two blocks can be compared.
    """

    axis: Axis
    sigma: float
    relative_sigma: float
    js0: JS0 | None


@dataclass(frozen=True)
class Sensitivity:
    """A table of JS0; print it, or take its rows.

    Attributes:
        rows: one a combination, axis by axis.
    """

    rows: tuple[Row, ...]

    def range(self) -> tuple[float, float]:
        """Return the smallest and the largest JS0 of the table."""
        values = [row.js0.value for row in self.rows if row.js0 is not None]
        return min(values), max(values)

    def __str__(self) -> str:
        header = ["axis", "divided by", "scale", "sigma", "of default", "JS0", "blocks", "excluded"]
        lines = []
        for row in self.rows:
            excluded = len(row.js0.excluded) if row.js0 else 0
            lines.append(
                [
                    row.axis.name,
                    f"eigenvalue {row.axis.normalize}" if isinstance(row.axis.normalize, int) else row.axis.normalize,
                    "" if row.axis.scale is None else f"{row.axis.scale:.3g}",
                    f"{row.sigma:.3g}",
                    f"{row.relative_sigma:.3g}",
                    f"{row.js0.value:.4g}" if row.js0 else "-",
                    str(len(row.js0.blocks)) if row.js0 else "-",
                    str(excluded) if excluded else "",
                ]
            )
        known = [row.js0 for row in self.rows if row.js0]
        if not known:
            return format_table(header, lines, left=2)
        low, high = self.range()
        policy = BATCHNORM_POLICIES.get(known[0].batchnorm, "BatchNorm policy not recorded")
        title = f"JS0: {KINDS[known[0].kind]}, base {known[0].base:.6g}; {policy}; from {low:.4g} to {high:.4g}"
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
    """Tabulate JS0 over sigma, axis and normalization, as it depends on them.

    Args:
        spectra: what to compare.
        sigmas: widths, as multiples of the default sigma of each axis.
        axes, normalizations: see Spectra.js_matrix.
        kind, base: as of Spectra.js_matrix.
        blocks: names; None means every block that is used and finite, and can be normalized.

    Raises:
        ValueError: an argument breaks its rule, or a named block cannot be normalized.

    Example:
        >>> table = spectra.sensitivity(sigmas=[0.5, 1.0], axes=["linear"], normalizations=["none", "radius"])
        >>> print(table)
    """
    rows = []
    for axis in axes:
        for normalize in normalizations:
            where = Axis(axis, normalize)
            if blocks is None and len(comparable_blocks(spectra, where)) < 2:
                rows.append(Row(where, float("nan"), float("nan"), None))
                continue
            default = js0(spectra, kind, base, axis=where, blocks=blocks)
            where = Axis(axis, normalize, default.scale)
            for multiple in sigmas:
                value = default if multiple == 1 else js0(spectra, kind, base, multiple * default.sigma, where, blocks)
                rows.append(Row(where, value.sigma, float(multiple), value))
    return Sensitivity(tuple(rows))
