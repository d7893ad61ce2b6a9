"""Error against Hessian-vector products, for this package and its rivals, and whether its error bars are honest.

    python -m bench.accuracy.accuracy [--json PATH] [--text PATH] [--plot PATH] [--quick | --show PATH]

Truth is known: six synthetic densities, and exact Hessians of small blocks. README.md says what the numbers mean.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.accuracy.rival_recurrences import RECURRENCES
from bench.harness.command import arguments, result_of, tell
from bench.harness.environment import describe
from bench.harness.known_spectra import hessians, synthetic
from blockhess._text import format_table
from blockhess.analysis import distribution
from blockhess.analysis.density import node_grid, smooth
from blockhess.analysis.distances import distance_matrix
from blockhess.analysis.errors import bands
from blockhess.problem.blocks import BlockInfo
from blockhess.spectra import Spectra
from blockhess_ext import Quadrature, batched_slq, ops

PROBES, STEPS = 5, (10, 20, 40, 80)
RELATIVE_SIGMA = 0.01
CONFIDENCE, COVERED_SIGMA, COVERED_POINTS = 0.95, 0.02, 25
# Where the density is below this share of its largest value, its expectation is made of events too rare to be seen.
LEAST_DENSITY = 1e-6

Operator = Callable[[Tensor], Tensor]


def unit_probes(n_probes: int, n: int, seed: int) -> Tensor:
    v = torch.randn(n_probes, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm(dim=1, keepdim=True)


def diagonal(eigenvalues: Tensor) -> Operator:
    return lambda v: v * eigenvalues.to(v.dtype)


def dense(matrix: Tensor) -> Operator:
    single = matrix.float()
    return lambda v: v @ (single if v.dtype == torch.float32 else matrix)


# --- error against HVPs ---------------------------------------------------------------------------------------


def errors(alpha: Tensor, beta: Tensor, eigenvalues: Tensor) -> tuple[float, float]:
    """L1 error of the density at RELATIVE_SIGMA and Wasserstein error over the range; infinite for a broken result."""
    if not bool(alpha.isfinite().all() and beta.isfinite().all()):
        return math.inf, math.inf
    steps = torch.full((len(alpha),), alpha.shape[1])
    nodes, weights = ops.tridiag_quadrature(alpha.contiguous(), beta.contiguous(), steps)
    span = float(eigenvalues.max() - eigenvalues.min())
    ours = nodes.flatten(), weights.flatten() / len(nodes)
    truth = eigenvalues, torch.full_like(eigenvalues, 1 / len(eigenvalues))
    size = max(len(part[0]) for part in (ours, truth))
    x, w = (
        torch.stack([torch.nn.functional.pad(part[i], (0, size - len(part[i])), value=0.0) for part in (ours, truth)])
        for i in (0, 1)
    )
    sigma = RELATIVE_SIGMA * span
    grid = node_grid(x, sigma)
    density = smooth(x, w, grid, sigma)
    l1 = float(torch.trapezoid((density[0] - density[1]).abs(), grid))
    return l1, float(distance_matrix(x, w)[0, 1]) / span


def measure_errors(operators: dict[str, tuple[Operator, Tensor]], seeds: int) -> list[dict[str, Any]]:
    """Medians over seeds of the errors of every operator, recurrence and number of steps."""
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


# --- honesty of the error bars --------------------------------------------------------------------------------


def as_spectra(q: Quadrature) -> Spectra:
    return Spectra([BlockInfo(str(i), (dim,), dim, (str(i),)) for i, dim in enumerate(q.dims)], q, {})


def hold(
    held: dict[str, list[Tensor]], widths: dict[str, list[float]], what: str, band: bands.Band,
    mean: Tensor, true: Tensor, where: Tensor, unit: float,
) -> None:  # fmt: skip
    """Note where a band holds the expectation, and the total band the truth, and how wide they are."""
    inside = ((band.lower[0] <= mean) & (mean <= band.upper[0]))[where]
    total = ((band.total_lower[0] <= true) & (true <= band.total_upper[0]))[where]
    held.setdefault(what, []).append(inside.double())
    held.setdefault(f"{what} total", []).append(total.double())
    for key, a, b in ((what, band.lower, band.upper), (f"{what} total", band.total_lower, band.total_upper)):
        widths.setdefault(key, []).append(float((b - a).mean()) * unit)
    widths.setdefault(f"{what} error", []).append(float((band.value[0] - true).abs().mean()) * unit)


def summary(held: dict[str, list[Tensor]], widths: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "coverage": {key: float(torch.stack(parts).mean()) for key, parts in held.items()},
        "worst point": {key: float(torch.stack(parts).mean(0).min()) for key, parts in held.items()},
        "width": {key: statistics.mean(parts) for key, parts in widths.items()},
    }


def measure_coverage(name: str, hvp: Operator, eigenvalues: Tensor, m: int, seeds: int, probes: int) -> dict[str, Any]:
    """How often the bands of `probes` probes hold the expectation at m steps, and the truth, over `seeds` runs."""
    n = len(eigenvalues)
    q = batched_slq(hvp, [n], num_probes=seeds * probes, num_steps=m, reorthogonalize="none")
    everything = as_spectra(q)
    low, high = float(eigenvalues.min()), float(eigenvalues.max())
    sigma = COVERED_SIGMA * (high - low)
    grid = torch.linspace(low, high, COVERED_POINTS + 2, dtype=torch.float64)[1:-1]
    truth = torch.full((1, n), 1 / n, dtype=torch.float64)
    density = everything.density(sigma, grid)[1][0], smooth(eigenvalues[None].contiguous(), truth, grid, sigma)[0]
    cdf = everything.cdf(grid)[1][0], distribution.cdf(eigenvalues[None], truth, grid)[0]
    trace = everything.trace()[0][0], eigenvalues.sum()
    seen = density[0] > LEAST_DENSITY * density[0].max()

    held: dict[str, list[Tensor]] = {}
    widths: dict[str, list[float]] = {}
    tops: list[tuple[float, float]] = []
    for run in range(seeds):
        one = as_spectra(q.of_probes(slice(run * probes, (run + 1) * probes)))
        for what, band, (mean, true), where, unit in (
            ("density", one.density_band(sigma, grid, CONFIDENCE), density, seen, high - low),
            ("cdf", one.cdf_band(grid, CONFIDENCE), cdf, torch.ones_like(seen), 1.0),
        ):
            hold(held, widths, what, band, mean, true, where, unit)
        lower, upper = one.trace_interval(CONFIDENCE)
        held.setdefault("trace", []).append(((lower <= trace[0]) & (trace[0] <= upper)).double())
        held.setdefault("trace total", []).append(((lower <= trace[1]) & (trace[1] <= upper)).double())
        (_, _), (bias, _) = one.range_error()
        tops.append((float(one.eigenvalue_range()[1][0]) - high, float(bias[0])))
    span = high - low
    return {
        "operator": name,
        "dim": n,
        "steps": m,
        "probes": probes,
        "runs": seeds,
        **summary(held, widths),
        "lambda_max bias": statistics.mean(top[0] for top in tops) / span,
        "lambda_max bias, estimated": statistics.mean(top[1] for top in tops) / span,
    }


def measure_js0(n: int, m: int, seeds: int, probes: int) -> dict[str, Any]:
    """Bias of JS0 over the six synthetic spectra, the jackknife's estimate of it, and how often the interval holds."""
    kinds = synthetic(n)
    hvp = diagonal(torch.cat([x / x.abs().max() for x in kinds.values()]))
    q = batched_slq(hvp, [n] * len(kinds), num_probes=seeds * probes, num_steps=m, reorthogonalize="none")
    truth = as_spectra(q).js0(sigma=0.02).value
    found = [
        as_spectra(q.of_probes(slice(run * probes, (run + 1) * probes))).js0(sigma=0.02, confidence=CONFIDENCE)
        for run in range(seeds)
    ]
    inside = [js0.interval[0] <= truth <= js0.interval[1] for js0 in found if js0.interval]
    return {
        "blocks": len(kinds),
        "dim": n,
        "steps": m,
        "probes": probes,
        "runs": seeds,
        "of all probes": truth,
        "bias": statistics.mean(js0.value for js0 in found) - truth,
        "bias, estimated": statistics.mean(js0.bias or 0.0 for js0 in found),
        "coverage": statistics.mean(inside),
        "width": statistics.mean(js0.interval[1] - js0.interval[0] for js0 in found if js0.interval),
    }


# --- output ---------------------------------------------------------------------------------------------------


def _cell(row: dict[str, Any]) -> str:
    return "failed" if row["l1"] is None else f"{row['l1']:.3f} / {row['w1']:.1e}"


def error_table(rows: list[dict[str, Any]]) -> str:
    header = ["operator", "dim", "HVPs", *RECURRENCES]
    lines = []
    for name in dict.fromkeys(row["operator"] for row in rows):
        own = [row for row in rows if row["operator"] == name]
        for hvps in sorted({row["hvps"] for row in own}):
            cells = {row["recurrence"]: row for row in own if row["hvps"] == hvps}
            lines.append([name, str(own[0]["dim"]), str(hvps)] + [_cell(cells[rival]) for rival in RECURRENCES])
    return format_table(header, lines)


KINDS = ("density", "cdf", "trace", "density total", "cdf total", "trace total")


def coverage_table(rows: list[dict[str, Any]]) -> str:
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


def bias_lines(coverage: list[dict[str, Any]], js0: list[dict[str, Any]]) -> list[str]:
    lines = ["lambda_max minus the truth, share of the range (jackknife's estimate of the probes' part):"]
    lines += [
        f"  {row['operator']}, {row['steps']} steps: {row['lambda_max bias']:.1e} "
        f"({row['lambda_max bias, estimated']:.1e})"
        for row in coverage
    ]
    lines.append("JS0 of the six synthetic spectra minus that of all probes:")
    lines += [
        f"  {r['dim']} elements, {r['steps']} steps, {r['probes']} probes: {r['of all probes']:.4f} {r['bias']:+.4f}, "
        f"estimated {r['bias, estimated']:+.4f}; interval holds it in {100 * r['coverage']:.1f} % of {r['runs']} runs, "
        f"width {r['width']:.4f}"
        for r in js0
    ]
    return lines


def text_of(result: dict[str, Any]) -> str:
    runs = result["coverage"][0]["runs"]
    return "\n".join(
        [
            f"Error of {PROBES} probes: L1 of the density at sigma = 1 % of the range / Wasserstein-1 over the range.",
            f"Medians of {result['error_seeds']} seeds; failed: the result was not finite.",
            "",
            error_table(result["errors"]),
            "",
            "How often, in per cent, the 95 % bands hold the expectation at the same steps, and the total bands the",
            f"truth; {runs} runs of {PROBES} probes, sigma 2 % of the range. Worst: the point covered least often.",
            "Widths and errors are means over points and runs, those of densities times the range.",
            "",
            coverage_table(result["coverage"]),
            "",
            *bias_lines(result["coverage"], result["js0"]),
            "",
            ", ".join(f"{key} {value}" for key, value in result["environment"].items()),
        ]
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["operator"] for row in rows))
    columns = 5
    figure = Figure(figsize=(3 * columns, 2.6 * -(-len(names) // columns)), layout="constrained", dpi=110)
    panels = figure.subplots(-(-len(names) // columns), columns, squeeze=False, sharex=True).flatten()
    styles = dict(
        zip(
            RECURRENCES,
            (("#08519c", "o-"), ("#6baed6", "s--"), ("#d94801", "^:"), ("#7a0177", "v-."), ("#555555", "x:")),
        )
    )
    for panel, name in zip(panels, names):
        for rival, (color, style) in styles.items():
            own = [row for row in rows if row["operator"] == name and row["recurrence"] == rival and row["w1"]]
            panel.loglog(
                [row["hvps"] for row in own], [row["w1"] for row in own], style, color=color, label=rival, ms=4, lw=1
            )
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
    """Everything that the tables and the picture show."""
    environment = describe()
    error_seeds, seeds = (2, 10) if quick else (3, 200)
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
            coverage.append(measure_coverage(name, hvp, eigenvalues, m, seeds, PROBES))
            print(f"  coverage, {name}, {m} steps: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    js0 = [measure_js0(n_covered, 30, seeds // (2 if probes == PROBES else 5), probes) for probes in (PROBES, 20)]
    return {
        "environment": environment,
        "error_seeds": error_seeds,
        "errors": error_rows,
        "coverage": coverage,
        "js0": js0,
    }


def main() -> None:
    parser = arguments(__doc__, "tiny sizes: that it runs, not numbers worth quoting")
    parser.add_argument("--plot", type=Path, help="draw the errors into this picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = result_of(options, measure)
    tell(options, result, text_of(result))
    if options.plot:
        plot(result["errors"], options.plot)


if __name__ == "__main__":
    main()
