"""Measure the coverage of confidence bands on other axes, where the divisor of the eigenvalues is random, too.

    python -m bench.accuracy.axes [--json PATH] [--text PATH] [--quick | --show PATH]      # 4 minutes

The divisor (spectral radius, tenth eigenvalue, trace) comes from the same five probes as the density. On average over
the points the bands have their nominal coverage. Where a few eigenvalues of a heavy tail determine divisor and density,
single points of the power law are covered less often, as the column of the worst point shows.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from bench.accuracy.coverage import coverage_table, diagonal, measure_bands, sample
from bench.harness import command
from bench.harness.environment import describe, one_line
from bench.harness.known_spectra import synthetic
from blockhess.analysis.axes import Axis, divisors

AXES: tuple[tuple[str, str | int], ...] = (
    ("asinh", "none"),
    ("linear", "radius"),
    ("asinh", "radius"),
    ("linear", 10),
    ("linear", "trace"),
)
# Spectra whose trace is not close to zero, so that all normalizations are defined.
NAMES = ("Marchenko-Pastur", "power law")
RUNS, DIM, STEPS, PROBES = 200, 1000, 30, 5


def measure(quick: bool) -> dict[str, Any]:
    """Return the result that the table shows."""
    runs, coverage = 5 if quick else RUNS, []
    exact = torch.full((1, DIM), 1 / DIM, dtype=torch.float64)
    for name in NAMES:
        unsorted = synthetic(DIM)[name]
        q, eigenvalues = sample(diagonal(unsorted), DIM, STEPS, runs * PROBES), unsorted.sort().values
        for axis, normalize in AXES:
            # The asinh axis is linear up to a tenth of the root mean square.
            divisor = float(divisors(eigenvalues[None], exact, [DIM], normalize))
            scale = None if axis == "linear" else 0.1 * float((eigenvalues**2).mean().sqrt()) / divisor
            where = Axis(axis, normalize, scale)
            about = {"operator": name, "dim": DIM, "steps": STEPS, "probes": PROBES, "runs": runs, "axis": str(where)}
            coverage.append({**about, **measure_bands(q, eigenvalues, where, runs, PROBES).summary()})
        print(f"  {name}", file=sys.stderr, flush=True)
    return {"environment": describe(), "coverage": coverage}


def text(result: dict[str, Any]) -> str:
    """Return the table of a result."""
    return "\n".join(
        [
            "Coverage in percent of the 95 % bands: of the expectation at the same number of steps, and (total) of the",
            f"true value, on axes whose divisor comes from the same {PROBES} probes. {result['coverage'][0]['runs']} "
            "runs, sigma 2 % of the range.",
            "Worst: the point with the lowest coverage. Widths and errors: means over points and runs, those of",
            "densities times the range.",
            "",
            coverage_table(result["coverage"]),
            "",
            one_line(result["environment"]),
        ]
    )


def main() -> None:
    command.run(__doc__, measure, text, quick="few runs, to check that it runs")


if __name__ == "__main__":
    main()
