"""Coverage of the confidence bands of densities and distribution functions, on operators with known eigenvalues."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blockhess._text import format_table
from blockhess.analysis import distribution
from blockhess.analysis.axes import Axis, divisors
from blockhess.analysis.density import smooth
from blockhess.analysis.errors import bands
from blockhess.problem.blocks import BlockInfo
from blockhess.spectra import Spectra
from blockhess_ext import Quadrature, batched_slq

CONFIDENCE, RELATIVE_SIGMA, POINTS = 0.95, 0.02, 25
# Points with a density below this share of the largest are excluded: their expectation is made of very rare events.
LEAST_DENSITY = 1e-6

Operator = Callable[[Tensor], Tensor]


def diagonal(eigenvalues: Tensor) -> Operator:
    """Return the diagonal operator with these eigenvalues."""
    return lambda v: v * eigenvalues.to(v.dtype)


def as_spectra(q: Quadrature) -> Spectra:
    """Return spectra with numbers as block names."""
    return Spectra([BlockInfo(str(i), (dim,), dim, (str(i),)) for i, dim in enumerate(q.dims)], q, {})


def spectra_of_run(q: Quadrature, run: int, probes: int) -> Spectra:
    """Return the spectra of the probes of one of several runs that were made together."""
    return as_spectra(q.of_probes(slice(run * probes, (run + 1) * probes)))


@dataclass
class Coverage:
    """Outcomes of runs: whether each band contains its value at each point, and widths and errors.

    The band `what` should contain the expectation at the same number of steps, `what total` the true value.
    """

    inside: dict[str, list[Tensor]] = field(default_factory=dict)
    widths: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, lower: Tensor, upper: Tensor, value: Tensor) -> None:
        """Add the outcome of one band of one run."""
        self.inside.setdefault(what, []).append(((lower <= value) & (value <= upper)).double())

    def add_band(self, what: str, band: bands.Band, mean: Tensor, true: Tensor, where: Tensor, unit: float) -> None:
        """Add the outcomes of both bands of one run at the points in `where`; widths are multiplied by `unit`."""
        self.add(what, band.lower[0][where], band.upper[0][where], mean[where])
        self.add(f"{what} total", band.total_lower[0][where], band.total_upper[0][where], true[where])
        for key, width in (
            (what, band.upper - band.lower),
            (f"{what} total", band.total_upper - band.total_lower),
            (f"{what} error", (band.value[0] - true).abs()),
        ):
            self.widths.setdefault(key, []).append(float(width.mean()) * unit)

    def summary(self) -> dict[str, Any]:
        """Return mean coverage, coverage at the worst point, and mean widths."""
        return {
            "coverage": {key: float(torch.stack(parts).mean()) for key, parts in self.inside.items()},
            "worst point": {key: float(torch.stack(parts).mean(0).min()) for key, parts in self.inside.items()},
            "width": {key: statistics.mean(parts) for key, parts in self.widths.items()},
        }


def sample(hvp: Operator, n: int, m: int, probes: int) -> Quadrature:
    """Return the quadrature of m steps of an operator with n rows."""
    return batched_slq(hvp, [n], num_probes=probes, num_steps=m, reorthogonalize="none")


def measure_bands(q: Quadrature, eigenvalues: Tensor, axis: Axis, runs: int, probes: int) -> Coverage:
    """Measure the coverage of the bands of `runs` runs of `probes` probes each, on an axis."""
    n = len(eigenvalues)
    everything, exact = as_spectra(q), torch.full((1, n), 1 / n, dtype=torch.float64)
    placed = axis.of_block(float(divisors(eigenvalues[None], exact, [n], axis.normalize))).place(eigenvalues)
    low, high = float(placed.min()), float(placed.max())
    sigma = RELATIVE_SIGMA * (high - low)
    grid = torch.linspace(low, high, POINTS + 2, dtype=torch.float64)[1:-1]
    (divisor,) = divisors(*everything.merged, [n], axis.normalize).tolist()
    density = everything.density(sigma, grid, axis)[1][0], smooth(placed[None], exact, grid, sigma)[0]
    mean_cdf = everything.cdf(axis.of_block(divisor).invert(grid))[1][0]
    cdf = mean_cdf, distribution.cdf(placed[None], exact, grid)[0]
    seen = density[0] > LEAST_DENSITY * density[0].max()
    found = Coverage()
    for run in range(runs):
        one = spectra_of_run(q, run, probes)
        found.add_band("density", one.density_band(sigma, grid, CONFIDENCE, axis=axis), *density, seen, high - low)
        found.add_band("cdf", one.cdf_band(grid, CONFIDENCE, axis=axis), *cdf, torch.ones_like(seen), 1.0)
    return found


KINDS = ("density", "cdf", "trace", "density total", "cdf total", "trace total")


def coverage_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of coverage in percent, and of widths and errors."""
    kinds = [kind for kind in KINDS if kind in rows[0]["coverage"]]
    leading = ["operator", "steps"] + (["axis"] if "axis" in rows[0] else [])
    worst = ["worst density", "cdf"]
    header = [*leading, *kinds, *worst, "width density", "total", "error", "cdf", "total", "error"]
    lines = []
    for row in rows:
        width = row["width"]
        lines.append(
            [str(row[name]) for name in leading]
            + [f"{100 * row['coverage'][kind]:.1f}" for kind in kinds]
            + [f"{100 * row['worst point'][kind]:.1f}" for kind in ("density", "cdf")]
            + [f"{width[key]:.3f}" for key in ("density", "density total", "density error")]
            + [f"{width[key]:.4f}" for key in ("cdf", "cdf total", "cdf error")]
        )
    return format_table(header, lines, left=len(leading))
