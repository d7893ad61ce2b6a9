"""Measure how often the printed intervals contain the truth, on eight models whose eigenvalues are all known.

    python -m bench.accuracy.columns [--json PATH] [--text PATH] [--quick | --show PATH]      # 6 minutes

For every number of the table and the report with an error: the share of 40 seeds in which the exact value lies in its
95 % interval, at 2 x 20, 10 x 30 and 10 x 100 probes x steps. The models are those of `known_spectra.model_spectra`.
Gaussian probes do not depend on the basis, so each Hessian is replaced by the diagonal matrix of its eigenvalues. Of
the blocks of a model the one with the lowest coverage is given, of up to three pairs of neighboring blocks for "JS0 of
two".
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.accuracy.coverage import diagonal, spectra_of_run
from bench.harness import command
from bench.harness.environment import describe, one_line
from bench.harness.known_spectra import model_spectra
from blockhess._text import format_table
from blockhess.analysis.axes import Axis
from blockhess.analysis.errors.jensen_shannon import mean_of_pairs
from blockhess.analysis.jensen_shannon import JS0, js_matrix
from blockhess.report.rows import block_records
from blockhess.spectra import Spectra
from blockhess_ext import batched_slq

SETTINGS = ((2, 20), (10, 30), (10, 100))
KTH, OUTLIERS, PAIRS = 10, 3, 3
# A Hessian whose eigenvalues are all rounding errors has no truth.
LEAST_RADIUS = 1e-12

# (quantity, block or "", interval contains the truth, width of the interval)
Outcome = tuple[str, str, bool, float]


def outcomes(spectra: Spectra, eigenvalues: list[Tensor]) -> Iterator[Outcome]:
    """Yield the outcome of every number of a result with these eigenvalues, ascending, of every block."""
    tolerances = spectra.zero_tolerance.tolist()
    kth = [part.tolist() for part in spectra.kth_eigenvalue(KTH)]
    for row, (record, exact, tolerance) in enumerate(zip(block_records(spectra), eigenvalues, tolerances)):
        name, radius = record["block"], float(exact.abs().max())
        truth = {
            "lambda_min": (record["lambda_min_lower"], record["lambda_min"] + tolerance, float(exact[0]), radius),
            "lambda_max": (record["lambda_max"] - tolerance, record["lambda_max_upper"], float(exact[-1]), radius),
        }
        for key, value, unit in (
            ("trace", exact.sum(), exact.abs().sum()),
            ("frobenius", exact.norm(), exact.norm()),
            ("negative", (exact < -tolerance).double().mean(), 1.0),
            ("zero", (exact.abs() <= tolerance).double().mean(), 1.0),
        ):
            truth[key] = record[f"{key}_lower"], record[f"{key}_upper"], float(value), float(unit)
        if len(exact) >= KTH:
            truth[f"{KTH}th"] = kth[1][row] - tolerance, kth[2][row] + tolerance, float(exact[-KTH]), radius
        for key, (lower, upper, value, unit) in truth.items():
            # Traces and norms of exact blocks have the error of float32 vectors.
            error = tolerance * len(exact) if key in ("trace", "frobenius") else 1e-9
            yield key, name, lower - error <= value <= upper + error, (upper - lower) / unit
        for outlier in spectra.outliers(name)[:OUTLIERS]:
            if outlier.multiplicity_interval is not None:
                lower, upper = outlier.multiplicity_interval
                near = max(outlier.reach, tolerance)
                count = int(((exact - outlier.value).abs() <= near).sum())
                yield "multiplicity", name, lower - 1e-6 <= count <= upper + 1e-6, upper - lower
    spread = spectra.curvature_spread()
    if spread is not None and spread.interval is not None:
        radii = torch.stack([eigenvalues[row].abs().max() for row in spectra.rows(spread.blocks)])
        lower, upper, _ = spread.interval
        yield "spread", "", lower <= float(radii.log10().std()) <= upper, upper - lower
    neighbors = itertools.islice(itertools.pairwise(spectra.comparable_blocks("asinh")), PAIRS)
    for key, axis, names in (
        ("JS0", "asinh", None),
        ("JS0 linear", "linear", None),
        *(("JS0 of two", "asinh", pair) for pair in neighbors),
    ):
        js0 = spectra.js0(axis=axis, blocks=names, confidence=0.95)
        assert js0.interval is not None
        lower, upper, _ = js0.interval
        inside = lower - 1e-6 <= true_js0(js0, spectra, eigenvalues) <= upper + 1e-6
        yield key, names[1] if names else "", inside, upper - lower


def true_js0(js0: JS0, spectra: Spectra, eigenvalues: list[Tensor]) -> float:
    """Return JS0 of the exact spectra of the blocks of js0, with its axis, scale and sigma."""
    exact = [eigenvalues[row] for row in spectra.rows(js0.blocks)]
    most = max(map(len, exact))
    nodes = torch.stack([torch.cat([x, x[-1:].expand(most - len(x))]) for x in exact])
    weights = torch.stack([torch.where(torch.arange(most) < len(x), 1 / len(x), 0.0) for x in exact])
    placed = Axis(js0.axis, js0.normalize, js0.scale).place(nodes)
    return mean_of_pairs(js_matrix(placed, weights.double(), sigma=js0.sigma, kind=js0.kind, base=js0.base))


def measure_model(blocks: dict[str, Tensor], probes: int, steps: int, runs: int) -> dict[str, Any]:
    """Return quantity -> lowest coverage over the blocks, its block, and the median width, of `runs` seeds."""
    eigenvalues = [x for x in blocks.values() if float(x.abs().max()) > LEAST_RADIUS]
    names = [name for name, x in blocks.items() if float(x.abs().max()) > LEAST_RADIUS]
    dims = [len(x) for x in eigenvalues]
    found: dict[tuple[str, str], list[bool]] = {}
    widths: dict[str, list[float]] = {}
    q = batched_slq(diagonal(torch.cat(eigenvalues)), dims, num_probes=probes * runs, num_steps=steps)
    for run in range(runs):
        for key, block, inside, width in outcomes(spectra_of_run(q, run, probes), eigenvalues):
            found.setdefault((key, names[int(block)] if block else ""), []).append(inside)
            widths.setdefault(key, []).append(width)
    rows = {}
    for key, values in widths.items():
        shares = {block: sum(inside) / len(inside) for (name, block), inside in found.items() if name == key}
        # A multiplicity that few seeds gave says little.
        known = {b: s for b, s in shares.items() if len(found[key, b]) >= runs / 2} or shares
        lowest = min(known, key=lambda block: known[block])
        width = float(torch.tensor(values, dtype=torch.float64).nanmedian())
        rows[key] = {"coverage": known[lowest], "block": lowest, "width": width if math.isfinite(width) else None}
    return rows


def measure(quick: bool) -> dict[str, Any]:
    """Return the result that the tables show."""
    runs = 3 if quick else 40
    rows = []
    for model, blocks in model_spectra().items():
        for probes, steps in SETTINGS[: 1 if quick else None]:
            start = time.perf_counter()
            rows.append(
                {
                    "model": model,
                    "probes": probes,
                    "steps": steps,
                    "numbers": measure_model(blocks, probes, steps, runs),
                }
            )
            lowest = min(row["coverage"] for row in rows[-1]["numbers"].values())
            took = f"{time.perf_counter() - start:.0f} s"
            print(f"  {model}, {probes} x {steps}: {took}, at least {100 * lowest:.1f} %", file=sys.stderr, flush=True)
    return {"environment": describe(), "runs": runs, "rows": rows}


def text(result: dict[str, Any]) -> str:
    """Return the tables of a result."""
    keys = list(dict.fromkeys(key for row in result["rows"] for key in row["numbers"]))
    lines = [
        f"Coverage of the exact value by the 95 % intervals, in percent of {result['runs']} seeds: of the block with",
        "the lowest, and of the model. Below: median widths, relative to the largest |eigenvalue| (lambda_min and max,",
        f"{KTH}th largest), to the sum of |eigenvalues| (trace), to the norm (frobenius).",
    ]
    for what, factor in (("coverage", 100), ("width", 1)):
        body = [
            [row["model"], f"{row['probes']} x {row['steps']}"]
            + [_cell(row["numbers"].get(key), what, factor) for key in keys]
            for row in sorted(result["rows"], key=lambda row: (row["probes"], row["steps"]))
        ]
        lines += ["", format_table(["model", "probes x steps", *keys], body, left=2)]
    return "\n".join([*lines, "", one_line(result["environment"])])


def _cell(number: dict[str, Any] | None, what: str, factor: float) -> str:
    if number is None or number[what] is None:
        return "-"
    return f"{factor * number[what]:.1f}" if what == "coverage" else f"{number[what]:.2g}"


def main() -> None:
    command.run(__doc__, measure, text, quick="3 seeds of 2 x 20, to check that it runs")


if __name__ == "__main__":
    main()
