"""Table 3: JS0 between the layers of the scaled MLP at initialisation, c = 1 ... 15, in every definition.

The paper's numbers reach 353, so they are no Jensen-Shannon distance; nor does it say on what grid, with which sigma,
or after which normalisation they were taken, and for c >= 9 they are NaN "due to the division of near-zero values".
Tried here: every kind of divergence.KINDS, spectra as they are or divided by a number of their own (their 10th largest
eigenvalue, as the paper's pictures are; their largest; their trace, which may be near zero), with its code's sigma^2 =
1e-5 or 1% of the range of all.

A definition is judged by the logarithms of its eight numbers for c = 1 ... 8: the root mean square of their distance to
the paper's, as it is and after one factor common to all eight (units, base of the logarithm), and the rank correlation.
For comparison, so is the best that says nothing: one number for all c, the mean of the paper's logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import blockhess
from blockhess.density import DEFAULT_RELATIVE_SIGMA, smallest_sigma
from blockhess.divergence import KINDS, js_matrix
from blockhess.measures import quantiles
from blockhess.paper.mlp import BATCH_SIZE, SCALES, WIDTHS, load_images, scaled_mlp
from blockhess.paper.pictures import new_figure
from blockhess.paper.results import Claim, Result, verdict
from blockhess.spectra import Spectra
from blockhess.table import format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Table 3 for c = 1 ... 8.
PAPER = (1e-3, 1.61, 33.99, 65.32, 260.77, 298.39, 351.69, 353.48)

PAPER_SIGMA = 1e-5**0.5

NUM_PROBES, NUM_STEPS = 2, 40

# A definition reproduces the table if its numbers are within this factor of it, on root mean square.
CLOSE = 2.0

# Values below are taken as this in logarithms.
SMALLEST = 1e-12


def layer_spectra(scale: float, batch: tuple[Tensor, Tensor], *, num_probes: int, num_steps: int, seed: int) -> Spectra:
    """Return the spectra of the four layers, weight and bias together, of the MLP at initialisation."""
    layers = {f"layer {l + 1}": [f"{3 * l}.weight", f"{3 * l}.bias"] for l in range(len(WIDTHS) - 1)}
    return blockhess.spectrum(
        scaled_mlp(scale, seed),
        batch,
        nn.CrossEntropyLoss(),
        blocks=layers,
        num_probes=num_probes,
        num_steps=num_steps,
        seed=seed,
        progress=False,
    )


def _tenth_largest(spectra: Spectra) -> Tensor:
    nodes, weights = spectra.merged
    shares = torch.tensor([1 - 10 / dim for dim in spectra.dims], dtype=torch.float64)
    return quantiles(nodes, weights, shares).diagonal()


def _largest(spectra: Spectra) -> Tensor:
    return spectra.merged[0].abs().amax(1)


# What every block's eigenvalues are divided by.
NORMALISATIONS: Mapping[str, Callable[[Spectra], Tensor]] = {
    "none": lambda spectra: torch.ones(len(spectra), dtype=torch.float64),
    "10th largest": _tenth_largest,
    "largest": _largest,
    "trace": lambda spectra: spectra.trace()[0],
}

SIGMAS = ("sqrt(1e-5)", "1% of range")


def js0(spectra: Spectra, kind: str, normalisation: str, sigma: str) -> float:
    """Return the mean over pairs of layers in one definition, in nats.

    A fixed sigma is raised to what float64 resolves next to the largest eigenvalue. A normalisation by zero, where a
    block has no curvature at all, leaves that block as it is.

    Example:
        >>> js0(layer_spectra(1.0, batch, num_probes=1, num_steps=5, seed=0), "distance", "none", "1% of range") < 1
        True
    """
    nodes, weights = spectra.merged
    scale = NORMALISATIONS[normalisation](spectra)
    nodes = nodes / torch.where(scale == 0, 1.0, scale)[:, None]
    smallest = smallest_sigma(nodes)
    width = DEFAULT_RELATIVE_SIGMA * float(nodes.max() - nodes.min()) if sigma == SIGMAS[1] else PAPER_SIGMA
    matrix = js_matrix(nodes, weights, kind=kind, base=math.e, sigma=max(width, smallest))
    return float(matrix.sum()) / (len(nodes) * (len(nodes) - 1))


def distance_to_paper(values: Sequence[float]) -> tuple[float, float, float]:
    """Return how far the eight numbers of c = 1 ... 8 are from Table 3.

    Returns:
        Root mean square factor; the same after the best common factor; rank correlation.

    Example:
        >>> distance_to_paper([2 * value for value in PAPER])
        (2.0, 1.0, 1.0)
    """
    found = torch.tensor([max(value, SMALLEST) for value in values], dtype=torch.float64).log()
    gap = found - torch.tensor(PAPER, dtype=torch.float64).log()
    plain, scaled = gap.square().mean().sqrt(), (gap - gap.mean()).square().mean().sqrt()
    constant = bool((found == found[0]).all())
    rank = 0.0 if constant else float(spearmanr(values, PAPER).statistic)
    return round(float(plain.exp()), 10), round(float(scaled.exp()), 10), rank


def run(*, seed: int = 0, quick: bool = False, data: str | PathLike[str] | None = None) -> Result:
    """Compute JS0 for every scale and definition and compare.

    Args:
        seed: of weights and probes.
        quick: few probes and steps, and the kinds and sigma that are quickest.
        data: folder with idx files, instead of the shipped subset of Fashion-MNIST.
    """
    images = load_images(data)
    batch = images.train[0][:BATCH_SIZE], images.train[1][:BATCH_SIZE]
    num_probes, num_steps = (1, 4) if quick else (NUM_PROBES, NUM_STEPS)
    spectra = {c: layer_spectra(c, batch, num_probes=num_probes, num_steps=num_steps, seed=seed) for c in SCALES}
    values = {
        (kind, normalisation, sigma): [js0(spectra[c], kind, normalisation, sigma) for c in SCALES]
        for kind in KINDS
        for normalisation in NORMALISATIONS
        for sigma in SIGMAS
    }
    judged = {key: distance_to_paper(found[: len(PAPER)]) for key, found in values.items()}
    nothing = distance_to_paper([math.exp(sum(map(math.log, PAPER)) / len(PAPER))] * len(PAPER))[0]
    closest = min(judged, key=lambda key: judged[key][0])
    alike = min(judged, key=lambda key: judged[key][1])
    bad = sum(not math.isfinite(value) for found in values.values() for value in found)
    rising = [key for key, (_, _, rank) in judged.items() if rank > 0.9]

    def named(key: tuple[str, str, str]) -> str:
        return f"{key[0]}, normalisation {key[1]}, sigma {key[2]}"

    low, high = (
        torch.stack([ends[side] for ends in (s.eigenvalue_range() for s in spectra.values())]) for side in (0, 1)
    )
    largest = torch.maximum(low.abs(), high.abs())  # (n_scales, 4)
    peak = largest.amax(1)
    ratios = peak / largest.amin(1)
    distance = values["distance", "none", "1% of range"]
    claims = (
        Claim(
            "Table 3: JS0 is 1e-3, 1.61, 33.99, 65.32, 260.77, 298.39, 351.69, 353.48 for c = 1 ... 8.",
            f"closest of {len(values)} definitions: {named(closest)}, within a factor {judged[closest][0]:.3g} on "
            f"root mean square; up to one common factor: {named(alike)}, {judged[alike][1]:.3g}. A constant gets "
            f"{nothing:.3g}.",
            verdict(judged[closest][0] < CLOSE, judged[alike][1] < CLOSE),
        ),
        Claim(
            "Table 3: JS0 grows with c.",
            f"rank correlation above 0.9 over c = 1 ... 8 in {len(rising)} of {len(values)} definitions"
            + (f" ({'; '.join(map(named, rising))})" if rising else "")
            + f". The distance at 1% of the range goes from {distance[0]:.3g} to {distance[7]:.3g} (c = 8) and "
            f"{distance[-1]:.3g} (c = 15).",
            verdict(len(rising) == len(values), len(rising) > 0),
        ),
        Claim(
            "Table 3: for c >= 9 the distance is NaN.",
            f"{bad} of {sum(map(len, values.values()))} values are not finite, up to c = 15: NaN is a fault of a "
            "formula that divides near-zero densities, not of the spectra.",
            verdict(bad > 0),
        ),
        Claim(
            "Section 2.4: c is the degree of heterogeneity between the layers.",
            f"largest |eigenvalue| of the sharpest over the flattest layer: {ratios[0]:.3g} at c = 1, {ratios[7]:.3g} "
            f"at c = 8, {ratios[-1]:.3g} at c = 15; the sharpest layer's is {peak[0]:.2g}, {peak[7]:.2g} and "
            f"{peak[-1]:.2g} there.",
            verdict(bool(ratios[7] > 10 * ratios[0]), bool(ratios[7] > 2 * ratios[0])),
        ),
    )
    header = ["kind", "normalised by", "sigma", *map(str, SCALES[:8]), "15", "factor", "scaled", "rank"]
    rows = [
        [
            *key,
            *(f"{value:.2g}" for value in (*values[key][:8], values[key][-1])),
            f"{judged[key][0]:.2g}",
            f"{judged[key][1]:.2g}",
            f"{judged[key][2]:.2f}",
        ]
        for key in sorted(values, key=lambda key: judged[key][0])
    ]
    rows.insert(0, ["Table 3", "", "", *(f"{value:g}" for value in PAPER), "NaN", "", "", ""])
    return Result(
        "table3",
        f"Table 3: JS0 of the scaled MLP, {images.name}",
        {"seed": seed, "data": images.name, "num_probes": num_probes, "num_steps": num_steps, "images": BATCH_SIZE},
        claims,
        "JS0 in nats; factor: root mean square factor to the paper; scaled: after one common factor\n"
        + format_table(header, rows, left=3),
        {
            "js0": {", ".join(key): found for key, found in values.items()},
            "judged": {", ".join(key): found for key, found in judged.items()},
            "constant": nothing,
            "sharpest over flattest": ratios.tolist(),
        },
        {"largest": largest},
        _draw(values, judged),
    )


def _draw(values: Mapping[tuple[str, str, str], list[float]], judged: Mapping[tuple[str, str, str], object]) -> Figure:
    """The paper's numbers and, of every kind, the definition closest to them."""
    figure = new_figure(7.0, 5.2)
    axes = figure.subplots()
    for kind, style in zip(KINDS, ("o-", "s-", "^-", "v-")):
        key = min((key for key in values if key[0] == kind), key=lambda key: judged[key])  # type: ignore[arg-type, return-value]
        label = f"{key[0]} (normalised by: {key[1]}; sigma {key[2]})"
        axes.plot(SCALES, [max(value, SMALLEST) for value in values[key]], style, label=label, markersize=4)
    axes.plot(SCALES[:8], PAPER, "k*--", label="Table 3 (NaN for c > 8)")
    axes.set(yscale="log", xlabel="c", ylabel="JS0 between the layers, nats", ylim=(1e-4, None))
    figure.legend(loc="outside lower center", frameon=False, fontsize="small")
    return figure
