"""Whether the error bars on other axes are honest, where what eigenvalues are divided by is as random as the rest.

    python -m bench.accuracy.axes [--json PATH] [--text PATH] [--quick | --show PATH]

As the second half of bench_accuracy.py; README.md says what the numbers mean.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from bench.accuracy.accuracy import (
    CONFIDENCE,
    COVERED_POINTS,
    COVERED_SIGMA,
    LEAST_DENSITY,
    PROBES,
    Operator,
    as_spectra,
    coverage_table,
    diagonal,
    hold,
    summary,
)
from bench.harness.command import arguments, result_of, tell
from bench.harness.environment import describe
from bench.harness.known_spectra import synthetic
from blockhess.analysis import distribution
from blockhess.analysis.axes import Axis, divisors
from blockhess.analysis.density import smooth
from blockhess_ext import batched_slq

AXES: tuple[tuple[str, str | int], ...] = (
    ("asinh", "none"),
    ("linear", "radius"),
    ("asinh", "radius"),
    ("linear", 10),
    ("linear", "trace"),
)
# Spectra that can be divided by any of these: a trace near zero cannot.
NAMES = ("Marchenko-Pastur", "power law")
RUNS, DIM, STEPS = 200, 1000, 30


def measure_axis_coverage(
    name: str, hvp: Operator, eigenvalues: Tensor, m: int, seeds: int, probes: int
) -> list[dict[str, Any]]:
    """The same on other axes, where what eigenvalues are divided by is as random as the rest."""
    n = len(eigenvalues)
    q = batched_slq(hvp, [n], num_probes=seeds * probes, num_steps=m, reorthogonalize="none")
    exactly = torch.full((1, n), 1 / n, dtype=torch.float64)
    rows = []
    for axis, normalize in AXES:
        everything = as_spectra(q)
        true_divisor = float(divisors(eigenvalues[None], exactly, [n], normalize))
        # Linear up to a tenth of the root mean square.
        scale = None if axis == "linear" else 0.1 * float((eigenvalues**2).mean().sqrt()) / true_divisor
        where = Axis(axis, normalize, scale)
        placed = where.of_block(true_divisor).place(eigenvalues)
        low, high = float(placed.min()), float(placed.max())
        sigma = COVERED_SIGMA * (high - low)
        grid = torch.linspace(low, high, COVERED_POINTS + 2, dtype=torch.float64)[1:-1]
        (divisor,) = divisors(*everything.merged, [n], normalize).tolist()
        density = everything.density(sigma, grid, where)[1][0], smooth(placed[None], exactly, grid, sigma)[0]
        mean_cdf = everything.cdf(where.of_block(divisor).invert(grid))[1][0]
        cdf = mean_cdf, distribution.cdf(placed[None], exactly, grid)[0]
        seen = density[0] > LEAST_DENSITY * density[0].max()
        held: dict[str, list[Tensor]] = {}
        widths: dict[str, list[float]] = {}
        for run in range(seeds):
            one = as_spectra(q.of_probes(slice(run * probes, (run + 1) * probes)))
            for what, band, (mean, true), points, unit in (
                ("density", one.density_band(sigma, grid, CONFIDENCE, axis=where), density, seen, high - low),
                ("cdf", one.cdf_band(grid, CONFIDENCE, axis=where), cdf, torch.ones_like(seen), 1.0),
            ):
                hold(held, widths, what, band, mean, true, points, unit)
        rows.append(
            {
                "operator": name, "dim": n, "steps": m, "probes": probes, "runs": seeds, "axis": str(where),
                **summary(held, widths),
            }
        )  # fmt: skip
    return rows


def text_of(result: dict[str, Any]) -> str:
    return "\n".join(
        [
            "How often, in per cent, the 95 % bands hold the expectation at the same steps, and the total bands the",
            f"truth, on axes whose divisor comes from the same {PROBES} probes; {result['coverage'][0]['runs']} runs,",
            "sigma 2 % of the range. Worst: the point covered least often. Widths and errors are means over points and",
            "runs, those of densities times the range.",
            "",
            coverage_table(result["coverage"]),
            "",
            ", ".join(f"{key} {value}" for key, value in result["environment"].items()),
        ]
    )


def measure(quick: bool) -> dict[str, Any]:
    """Everything that the table shows."""
    kinds, runs = synthetic(DIM), 5 if quick else RUNS
    coverage: list[dict[str, Any]] = []
    result = {"environment": describe(), "coverage": coverage}
    for name in NAMES:
        eigenvalues = kinds[name]
        coverage += measure_axis_coverage(name, diagonal(eigenvalues), eigenvalues.sort().values, STEPS, runs, PROBES)
        print(f"  {name}", file=sys.stderr, flush=True)
    return result


def main() -> None:
    options = arguments(__doc__, "few runs: that it runs, not numbers worth quoting").parse_args()
    torch.set_num_threads(1)
    result = result_of(options, measure)
    tell(options, result, text_of(result))


if __name__ == "__main__":
    main()
