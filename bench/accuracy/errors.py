"""Measure errors of densities against the number of Hessian-vector products, and the coverage of error bars.

    python -m bench.accuracy.errors [--json PATH] [--text PATH] [--plot PATH] [--quick | --show PATH]     # 7 minutes

The eigenvalues are known: six synthetic densities, and exact Hessians of small blocks (`bench.harness.known_spectra`).

**Errors.** Five probes, the same for all: this package without and with reorthogonalization, and the recurrences
(without the smoothing) of the paper's code, PyHessian and curvlinops, see `rival_recurrences.py`. The errors are the L1
error of the density with sigma = 1 % of the range, and the Wasserstein-1 distance, which needs no sigma.

**Coverage.** 200 runs of 5 probes. The statistical 95 % band should contain the expectation at the same number of steps
90 to 99 % of the time, and the total band the true value at least 90 %. Coverage is the mean over the points of a grid;
for the bands also that of the worst point is given. Widths are given next to the errors. The bias of JS0 is compared
with its jackknife estimate.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.accuracy.coverage import (
    CONFIDENCE,
    Operator,
    as_spectra,
    coverage_table,
    diagonal,
    measure_bands,
    sample,
    spectra_of_run,
)
from bench.accuracy.rival_recurrences import RECURRENCES
from bench.harness import command
from bench.harness.environment import describe, one_line
from bench.harness.known_spectra import hessians, synthetic
from blockhess._text import format_table
from blockhess.analysis.axes import Axis
from blockhess.analysis.density import node_grid, smooth
from blockhess.analysis.distances import distance_matrix
from blockhess_ext import batched_slq, ops

PROBES, STEPS = 5, (10, 20, 40, 80)
RELATIVE_SIGMA = 0.01


def unit_probes(n_probes: int, n: int, seed: int) -> Tensor:
    """Return random unit vectors (n_probes, n) float64."""
    v = torch.randn(n_probes, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm(dim=1, keepdim=True)


def dense(matrix: Tensor) -> Operator:
    """Return the operator of a dense matrix."""
    single = matrix.float()
    return lambda v: v @ (single if v.dtype == torch.float32 else matrix)


def errors(alpha: Tensor, beta: Tensor, eigenvalues: Tensor) -> tuple[float, float]:
    """Return the L1 error of the density and the Wasserstein-1 error / range; infinite if the result is not finite."""
    if not bool(alpha.isfinite().all() and beta.isfinite().all()):
        return math.inf, math.inf
    steps = torch.full((len(alpha),), alpha.shape[1])
    nodes, weights = ops.tridiag_quadrature(alpha.contiguous(), beta.contiguous(), steps)
    span = float(eigenvalues.max() - eigenvalues.min())
    ours = nodes.flatten(), weights.flatten() / len(nodes)
    truth = eigenvalues, torch.full_like(eigenvalues, 1 / len(eigenvalues))
    size = max(len(part[0]) for part in (ours, truth))
    x, w = (torch.stack([pad(part[i], (0, size - len(part[i]))) for part in (ours, truth)]) for i in (0, 1))
    sigma = RELATIVE_SIGMA * span
    grid = node_grid(x, sigma)
    density = smooth(x, w, grid, sigma)
    l1 = float(torch.trapezoid((density[0] - density[1]).abs(), grid))
    return l1, float(distance_matrix(x, w)[0, 1]) / span


def measure_errors(operators: dict[str, tuple[Operator, Tensor]], seeds: int) -> list[dict[str, Any]]:
    """Return the median over seeds of the errors of every operator, recurrence and number of steps."""
    rows = []
    for name, (hvp, eigenvalues) in operators.items():
        start = time.perf_counter()
        n = len(eigenvalues)
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for seed in range(seeds):
            v = unit_probes(PROBES, n, seed)
            for rival, recurrence in RECURRENCES.items():
                alpha, beta = recurrence(hvp, v, min(max(STEPS), n))
                for m in STEPS:
                    m = min(m, n)
                    found.setdefault((rival, m), []).append(errors(alpha[:, :m], beta[:, :m], eigenvalues))
        for (rival, m), values in found.items():
            l1, w1 = (statistics.median(column) for column in zip(*values))
            failed = sum(math.isinf(value[0]) for value in values)
            finite = {"l1": None, "w1": None} if math.isinf(l1) else {"l1": l1, "w1": w1}
            row = {"operator": name, "dim": n, "recurrence": rival, "steps": m, "hvps": PROBES * m}
            rows.append({**row, **finite, "failed": failed})
        print(f"  {name} ({n}): {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def measure_coverage(name: str, hvp: Operator, eigenvalues: Tensor, m: int, runs: int) -> dict[str, Any]:
    """Return the coverage of the bands of PROBES probes and m steps over `runs` runs."""
    n = len(eigenvalues)
    q = sample(hvp, n, m, runs * PROBES)
    found = measure_bands(q, eigenvalues, Axis(), runs, PROBES)
    trace, true_trace = as_spectra(q).trace()[0][0], eigenvalues.sum()
    for run in range(runs):
        one = spectra_of_run(q, run, PROBES)
        interval = one.trace_interval(CONFIDENCE)
        found.add("trace", *interval, trace)
        found.add("trace total", *interval, true_trace)
    return {
        "operator": name,
        "dim": n,
        "steps": m,
        "probes": PROBES,
        "runs": runs,
        **found.summary(),
    }


def measure_js0(n: int, m: int, runs: int, probes: int) -> dict[str, Any]:
    """Return the bias of JS0 of the six synthetic spectra, its jackknife estimate, and the coverage of the interval."""
    kinds = synthetic(n)
    hvp = diagonal(torch.cat([x / x.abs().max() for x in kinds.values()]))
    q = batched_slq(hvp, [n] * len(kinds), num_probes=runs * probes, num_steps=m, reorthogonalize="none")
    truth = as_spectra(q).js0(axis="linear", sigma=0.02).value
    found = [
        spectra_of_run(q, run, probes).js0(axis="linear", sigma=0.02, confidence=CONFIDENCE) for run in range(runs)
    ]
    intervals = [js0.probes_interval for js0 in found if js0.probes_interval]
    inside = [lower <= truth <= upper for lower, upper, _ in intervals]
    return {
        "blocks": len(kinds),
        "dim": n,
        "steps": m,
        "probes": probes,
        "runs": runs,
        "of all probes": truth,
        "bias": statistics.mean(js0.value for js0 in found) - truth,
        "bias, estimated": statistics.mean(js0.bias or 0.0 for js0 in found),
        "coverage": statistics.mean(inside),
        "width": statistics.mean(upper - lower for lower, upper, _ in intervals),
    }


def _cell(row: dict[str, Any]) -> str:
    return "failed" if row["l1"] is None else f"{row['l1']:.3f} / {row['w1']:.1e}"


def error_table(rows: list[dict[str, Any]]) -> str:
    """Return the table of errors, L1 / Wasserstein-1."""
    header = ["operator", "dim", "HVPs", *RECURRENCES]
    lines = []
    for name in dict.fromkeys(row["operator"] for row in rows):
        own = [row for row in rows if row["operator"] == name]
        for hvps in sorted({row["hvps"] for row in own}):
            cells = {row["recurrence"]: row for row in own if row["hvps"] == hvps}
            lines.append([name, str(own[0]["dim"]), str(hvps)] + [_cell(cells[rival]) for rival in RECURRENCES])
    return format_table(header, lines)


def bias_lines(js0: list[dict[str, Any]]) -> list[str]:
    """Return the lines on the bias of JS0."""
    return [
        "JS0 of the six synthetic spectra with all probes, and its bias with fewer:",
        *(
            f"  {r['dim']} elements, {r['steps']} steps, {r['probes']} probes: {r['of all probes']:.4f} "
            f"{r['bias']:+.4f}, estimated {r['bias, estimated']:+.4f}; coverage at this number of steps "
            f"{100 * r['coverage']:.1f} % in {r['runs']} runs, width {r['width']:.4f}"
            for r in js0
        ),
    ]


def text(result: dict[str, Any]) -> str:
    """Return the tables of a result."""
    runs = result["coverage"][0]["runs"]
    return "\n".join(
        [
            f"Errors with {PROBES} probes: L1 of the density, sigma 1 % of the range / Wasserstein-1 over the range.",
            f"Medians of {result['error_seeds']} seeds; failed: the result was not finite.",
            "",
            error_table(result["errors"]),
            "",
            "Coverage in percent of the 95 % bands: of the expectation at the same number of steps, and (total) of the",
            f"true value. {runs} runs of {PROBES} probes, sigma 2 % of the range. Worst: the point with the lowest",
            "coverage. Widths and errors: means over points and runs, those of densities times the range.",
            "",
            coverage_table(result["coverage"]),
            "",
            *bias_lines(result["js0"]),
            "",
            one_line(result["environment"]),
        ]
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot the Wasserstein-1 errors against the number of products into an image file."""
    from matplotlib.figure import Figure

    rows = result["errors"]
    names = list(dict.fromkeys(row["operator"] for row in rows))
    columns = 5
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3 * columns, 2.6 * lines), layout="constrained", dpi=110)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    colors, markers = ("#08519c", "#6baed6", "#d94801", "#7a0177", "#555555"), ("o-", "s--", "^:", "v-.", "x:")
    styles = dict(zip(RECURRENCES, zip(colors, markers)))
    for panel, name in zip(panels, names):
        for rival, (color, style) in styles.items():
            own = [row for row in rows if row["operator"] == name and row["recurrence"] == rival and row["w1"]]
            hvps, w1 = [row["hvps"] for row in own], [row["w1"] for row in own]
            panel.loglog(hvps, w1, style, color=color, label=rival, ms=4, lw=1)
        panel.set_title(name, fontsize="small")
        panel.set_xticks([PROBES * m for m in STEPS], [str(PROBES * m) for m in STEPS], fontsize="x-small")
        panel.minorticks_off()
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, high / 11), high)
        panel.tick_params(labelsize="x-small")
    for panel in panels[len(names) :]:
        panel.remove()
    panels[0].legend(fontsize="x-small")
    figure.supxlabel("Hessian-vector products (5 probes)")
    figure.supylabel("Wasserstein-1 error / range")
    figure.savefig(path)


def measure(quick: bool) -> dict[str, Any]:
    """Return the result that the tables and the plot show."""
    error_seeds, runs = (2, 10) if quick else (3, 200)
    n, n_covered = (300, 200) if quick else (4000, 1000)
    operators: dict[str, tuple[Operator, Tensor]] = {
        name: (diagonal(x), x.sort().values) for name, x in synthetic(n).items()
    }
    start = time.perf_counter()
    exact = {name: (matrix, torch.linalg.eigvalsh(matrix)) for name, matrix in hessians(quick).items()}
    print(f"  exact Hessians: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    operators |= {name: (dense(matrix), eigenvalues) for name, (matrix, eigenvalues) in exact.items()}
    error_rows = measure_errors(operators, error_seeds)

    covered = [(name, diagonal(x), x.sort().values) for name, x in synthetic(n_covered).items()]
    covered += [(name, *operators[name]) for name in exact if len(operators[name][1]) <= 1100][:2]
    many_steps = () if quick else ("semicircle", "spikes and bulk", "power law")
    coverage = []
    for m, names in ((30, [name for name, _, _ in covered]), (100, many_steps)):
        for name, hvp, eigenvalues in covered:
            if name not in names:
                continue
            start = time.perf_counter()
            coverage.append(measure_coverage(name, hvp, eigenvalues, m, runs))
            print(f"  coverage, {name}, {m} steps: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    js0 = [measure_js0(n_covered, 30, runs // (2 if probes == PROBES else 5), probes) for probes in (PROBES, 20)]
    return {
        "environment": describe(),
        "error_seeds": error_seeds,
        "errors": error_rows,
        "coverage": coverage,
        "js0": js0,
    }


def main() -> None:
    command.run(__doc__, measure, text, quick="small sizes, to check that it runs", plot=plot)


if __name__ == "__main__":
    main()
