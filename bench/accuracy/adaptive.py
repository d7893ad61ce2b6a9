"""What `spectrum(tol=, tol_sigma=)` delivers: the error asked for, and the products it takes, on known spectra.

    python -m bench.accuracy.adaptive [--json PATH] [--text PATH] [--quick | --show PATH]

Every spectrum is a block of 100,000 parameters with a diagonal Hessian; a trial is one seed. README.md says more.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import blockhess
from bench.harness.command import arguments, result_of, tell
from bench.harness.environment import describe
from bench.harness.known_spectra import synthetic
from blockhess._text import format_table
from blockhess_ext.early_stopping import change

DIM = 100_000
# What is asked for: (tol, sigma); sigma None is Wasserstein-1 distance.
ASKED = ((0.01, None), (0.005, None), (0.02, 0.05))
TRIALS, COMPARED_TRIALS = 200, 10
# The run to beat, and in what: by no more than ALLOWED of its error, at no more than a quarter of its products.
PROBES, STEPS, ALLOWED = 10, 100, 1.25
COMPARED = (None, 0.005, 0.01)


class Diagonal(nn.Module):
    """A block for every spectrum, whose Hessian is diagonal with these eigenvalues."""

    def __init__(self, spectra: dict[str, Tensor]) -> None:
        super().__init__()
        self.eigenvalues = {name.replace(" ", "_"): values.float() for name, values in spectra.items()}
        for name, values in self.eigenvalues.items():
            self.register_parameter(name, nn.Parameter(torch.ones(len(values))))

    def forward(self, scale: Tensor) -> Tensor:
        losses = [w @ (self.eigenvalues[name] * w) for name, w in self.named_parameters()]
        return scale * torch.stack(losses).sum() / 2


def run(spectra: dict[str, Tensor], seed: int, **options: Any) -> blockhess.Spectra:
    return blockhess.spectrum(
        Diagonal(spectra), torch.ones(()), lambda model, batch: (model(batch), 1.0),
        seed=seed, engine="autograd", reorthogonalize="none", progress=False, **options,
    )  # fmt: skip


def errors(result: blockhess.Spectra, spectra: dict[str, Tensor], sigma: float | None) -> list[float]:
    """Distance of every block from its truth, as a share of its range or in L1."""
    nodes, weights = result.merged
    truths = [(values[None], torch.full((1, len(values)), 1 / len(values)).double()) for values in spectra.values()]
    rows = [(nodes[row : row + 1], weights[row : row + 1]) for row in range(len(truths))]
    return [float(change(row, truth, sigma)) for row, truth in zip(rows, truths)]


def products(result: blockhess.Spectra) -> list[int]:
    return result.quadrature.steps.sum(0).tolist()


def trial(spectra: dict[str, Tensor], tol: float, sigma: float | None, seed: int) -> list[tuple[float, int]]:
    """Error over tol, and products, of every block."""
    result = run(spectra, seed, tol=tol, tol_sigma=sigma, num_probes=20, num_steps=400)
    return [(error / tol, count) for error, count in zip(errors(result, spectra, sigma), products(result))]


def asked_for(spectra: dict[str, Tensor], trials: int) -> list[dict[str, Any]]:
    rows = []
    for tol, sigma in ASKED:
        found = list(zip(*(trial(spectra, tol, sigma, seed) for seed in range(trials))))
        for name, outcomes in zip(spectra, found):
            ratios = sorted(ratio for ratio, _ in outcomes)
            rows.append(
                {
                    "spectrum": name, "tol": tol, "sigma": sigma, "trials": trials,
                    "median_error": statistics.median(ratios) * tol,
                    "exceeded": sum(ratio > 1.1 for ratio in ratios) / trials,
                    "products": statistics.median(count for _, count in outcomes),
                }
            )  # fmt: skip
    return rows


def compared(spectra: dict[str, Tensor], trials: int) -> list[dict[str, Any]]:
    """Asked for ALLOWED times the error of the run to beat, spectrum by spectrum."""
    fixed = [run(spectra, seed, num_probes=PROBES, num_steps=STEPS) for seed in range(trials)]
    rows = []
    for sigma in COMPARED:
        reference = list(zip(*(errors(result, spectra, sigma) for result in fixed)))
        for (name, values), theirs in zip(spectra.items(), reference):
            one, to_beat = {name: values}, statistics.median(theirs)
            outcomes = [trial(one, ALLOWED * to_beat, sigma, seed)[0] for seed in range(trials)]
            ratio = ALLOWED * statistics.median(ratio for ratio, _ in outcomes)
            share = statistics.median(count for _, count in outcomes) / (PROBES * STEPS)
            rows.append(
                {"spectrum": name, "sigma": sigma, "fixed_error": to_beat, "error_ratio": ratio, "product_share": share}
            )
    return rows


def measured(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    start = time.perf_counter()
    spectra = {name: values.sort().values for name, values in synthetic(DIM).items()}
    return {
        "environment": describe(),
        "dim": DIM,
        "asked": asked_for(spectra, 2 if quick else TRIALS),
        "compared": compared(spectra, 2 if quick else COMPARED_TRIALS),
        "seconds": time.perf_counter() - start,
    }


def _distance(sigma: float | None) -> str:
    return "Wasserstein" if sigma is None else f"L1, sigma {sigma:g}"


def text(result: dict[str, Any]) -> str:
    asked = [
        (
            row["spectrum"], _distance(row["sigma"]), f"{row['tol']:g}", f"{row['median_error']:.2g}",
            f"{row['exceeded']:.1%}", f"{row['products']:.0f}", "yes" if row["exceeded"] <= 0.05 else "NO",
        )
        for row in result["asked"]
    ]  # fmt: skip
    against = [
        (
            row["spectrum"], _distance(row["sigma"]), f"{row['fixed_error']:.2g}", f"{row['error_ratio']:.2f}",
            f"{row['product_share']:.2f}",
            "yes" if row["error_ratio"] <= ALLOWED and row["product_share"] <= 0.25 else "NO",
        )
        for row in result["compared"]
    ]  # fmt: skip
    where = ", ".join(f"{key} {value}" for key, value in result["environment"].items())
    return "\n".join(
        [
            f"Blocks of {result['dim']:,} parameters; medians over {result['asked'][0]['trials']} trials, and the",
            "share of trials whose error was more than 1.1 of what was asked for, which should be 5 % at most.",
            "",
            format_table(["spectrum", "distance", "asked for", "error", "exceeded", "products", "met"], asked),
            "",
            f"Against {PROBES} probes of {STEPS} steps, asked for {ALLOWED} of their median error: the error reached,",
            "over theirs, and the share of their products that it took, which should be 0.25 at most.",
            "",
            format_table(["spectrum", "distance", "their error", "error ratio", "product share", "met"], against),
            "",
            f"{result['seconds']:.0f} s; {where}",
        ]
    )


def main() -> None:
    options = arguments(__doc__, "two trials, to see that it runs").parse_args()
    result = result_of(options, measured)
    assert all(math.isfinite(row["median_error"]) for row in result["asked"])
    tell(options, result, text(result))


if __name__ == "__main__":
    main()
