"""Table 1: JS0 of the six networks at initialization, in every definition, under both BatchNorm policies.

The paper's JS0 "denotes the average JS distance ... of each pair of parameter blocks", "the averaged value in each
heatmap of Figure 4". Its numbers reach 286, but Jensen-Shannon distances are bounded. Tried here: the definitions of
table3.py with sigma up to 1, all in nats. The mean over the whole heatmap, with its zero diagonal, is (n - 1) / n times
the mean over pairs.

A definition is judged as in table3.py: by the root mean square factor between its six numbers and the paper's, before
and after multiplication by one common factor, and by the rank correlation; also by the ratio of the least heterogeneous
Transformer to the most heterogeneous CNN, which is at least 140 in the paper.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blockhess._text import format_table
from blockhess_paper.networks.initial_spectra import POLICIES, Subject, measure_networks, spectra_settings
from blockhess_paper.networks.networks import NETWORKS, Selection
from blockhess_paper.results import Claim, Result, new_figure, verdict
from blockhess_paper.scaled_mlp.table3 import (
    ALIKE,
    CLOSE,
    DEFINITIONS,
    ORDERED,
    PAPER_SIGMA,
    SMALLEST,
    Definition,
    distance_to_paper,
    format_definition,
    format_sigma,
    js0,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = tuple(value for _, value, _ in NETWORKS.values())
PAPER_RATIO = 140.0

# Number of definitions in the printed table. The first are the default of `Spectra.js0`, the sigma of the paper's code,
# and the normalization of its figures.
SHOWN = 12
ALWAYS: tuple[Definition, ...] = (
    ("distance", "none", None),
    ("distance", "none", PAPER_SIGMA),
    ("distance", "10th largest", None),
)

# The eigenvalues of the CNNs are smaller than this, so a wider Gaussian would hide their spectra.
WIDEST = 1.0
TRIED = tuple(key for key in DEFINITIONS if key[2] is None or key[2] <= WIDEST)


def ratio(values: Mapping[str, float]) -> float:
    """Return JS0 of the least heterogeneous Transformer over that of the most heterogeneous CNN.

    Args:
        values: name of every network -> JS0.

    Example:
        >>> round(ratio({name: value for name, (_, value, _) in NETWORKS.items()}), 1)
        149.3
    """
    least = min(values[name] for name, (_, _, transformer) in NETWORKS.items() if transformer)
    most = max(values[name] for name, (_, _, transformer) in NETWORKS.items() if not transformer)
    return least / max(most, SMALLEST)


def by_policy(subjects: Sequence[Subject]) -> dict[str, list[Subject]]:
    """Return BatchNorm policy -> networks; those without BatchNorm are under every policy."""
    return {policy: [s for s in subjects if s.policy in (policy, "none")] for policy in POLICIES}


def run(*, seed: int = 0, quick: bool = False, folder: Path, selection: Selection | None = None) -> Result:
    """Compare JS0 of the networks, in every definition, with the paper's six numbers.

    Args:
        seed: seed of weights, data and probes.
        quick: few probes, steps, samples and definitions.
        folder: holds the spectra: those computed before are reused.
        selection: the networks, by default CPU-sized versions of the paper's six. Claims are judged only if all six
            are selected.
    """
    selection = selection or Selection()
    subjects = measure_networks(folder, selection, seed=seed, quick=quick)
    definitions = TRIED[1::8] if quick else TRIED
    values = {key: {s.title: js0(s.spectra, key) for s in subjects} for key in definitions}
    intervals = {s.title: s.spectra.js0(axis="linear", confidence=0.95) for s in subjects}

    complete = {s.name for s in subjects} == set(NETWORKS)
    judged: dict[str, dict[Definition, tuple[float, float, float]]] = {}
    ratios: dict[str, dict[Definition, float]] = {}
    if complete:
        for policy, chosen in by_policy(subjects).items():
            found = {key: {s.name: values[key][s.title] for s in chosen} for key in definitions}
            judged[policy] = {key: distance_to_paper(list(row.values()), PAPER) for key, row in found.items()}
            ratios[policy] = {key: ratio(row) for key, row in found.items()}
    numbers = {
        "js0": {format_definition(key): row for key, row in values.items()},
        "with the diagonal": {s.title: (len(s.spectra) - 1) / len(s.spectra) for s in subjects},
        "default": {title: str(found) for title, found in intervals.items()},
        "judged": {p: {format_definition(key): v for key, v in row.items()} for p, row in judged.items()},
        "ratio": {p: {format_definition(key): v for key, v in row.items()} for p, row in ratios.items()},
    }
    return Result(
        "table1",
        f"Table 1: JS0 of the networks at initialization, scale {selection.scale!r}",
        spectra_settings(subjects, seed, selection),
        _claims(judged, ratios) if complete else (),
        _text(subjects, values, judged, ratios) + "\n" + "\n".join(f"{t}: {j}" for t, j in intervals.items()),
        numbers,
        figure=_draw(subjects, values, judged),
    )


def _claims(
    judged: Mapping[str, Mapping[Definition, tuple[float, float, float]]],
    ratios: Mapping[str, Mapping[Definition, float]],
) -> tuple[Claim, ...]:
    best = {policy: min(row, key=lambda key: row[key][0]) for policy, row in judged.items()}
    alike = {policy: min(row, key=lambda key: (row[key][2] <= ORDERED, row[key][1])) for policy, row in judged.items()}
    close = [judged[policy][key] for policy, key in best.items()]
    similar = [judged[policy][key] for policy, key in alike.items()]
    values = Claim(
        "Table 1: JS0 is " + ", ".join(f"{value} ({title})" for title, value, _ in NETWORKS.values()) + ".",
        "; ".join(
            f"BatchNorm {policy}: closest of {len(row)} definitions is {format_definition(best[policy])}, within a "
            f"factor {row[best[policy]][0]:.3g} on root mean square; most alike up to one factor "
            f"{format_definition(alike[policy])}, {row[alike[policy]][1]:.3g} with rank correlation "
            f"{row[alike[policy]][2]:.2f}"
            for policy, row in judged.items()
        )
        + ".",
        verdict(min(c[0] for c in close) < CLOSE, any(s[1] < ALIKE and s[2] > ORDERED for s in similar)),
    )

    def counted(least: float) -> str:
        return " and ".join(
            f"in {sum(r >= least for r in row.values())} of {len(row)} definitions with BatchNorm {policy}"
            for policy, row in ratios.items()
        )

    every = [r for row in ratios.values() for r in row.values()]
    ranges = ", ".join(
        f"{min(row.values()):.2g} ... {max(row.values()):.2g}, median {statistics.median(row.values()):.2g} ({policy})"
        for policy, row in ratios.items()
    )
    return (
        values,
        Claim(
            "Table 1: JS0 on CNNs is at least 140 times smaller than on Transformers.",
            f"the least Transformer over the greatest CNN reaches 140 {counted(PAPER_RATIO)}; it is {ranges}.",
            verdict(min(every) >= PAPER_RATIO, max(every) >= PAPER_RATIO),
        ),
        Claim(
            "Section 2.5: JS0 sets CNNs apart from Transformers (every CNN's is below every Transformer's).",
            f"so {counted(1.0)}.",
            verdict(min(every) > 1, max(every) > 1),
        ),
    )


def _text(
    subjects: Sequence[Subject],
    values: Mapping[Definition, Mapping[str, float]],
    judged: Mapping[str, Mapping[Definition, tuple[float, float, float]]],
    ratios: Mapping[str, Mapping[Definition, float]],
) -> str:
    order = list(values)
    if judged:
        order.sort(key=lambda key: min(row[key][1] for row in judged.values()))
    first = [key for key in ALWAYS if key in values]
    shown = [*first, *(key for key in order if key not in first)][:SHOWN]
    header = ["kind", "normalized by", "sigma", *(s.title for s in subjects)]
    header += [f"{what}, {policy}" for policy in judged for what in ("factor", "scaled", "rank", "ratio")]
    paper = [f"{NETWORKS[s.name][1]:g}" if s.name in NETWORKS else "" for s in subjects]
    rows = [["Table 1", "", "", *paper, *(["", "", "", f"{PAPER_RATIO:g}"] * len(judged))]]
    for key in shown:
        row = [*key[:2], format_sigma(key), *(f"{values[key][s.title]:.2g}" for s in subjects)]
        for policy in judged:
            factor, scaled, rank = judged[policy][key]
            row += [f"{factor:.2g}", f"{scaled:.2g}", f"{rank:.2f}", f"{ratios[policy][key]:.2g}"]
        rows.append(row)
    return (
        f"JS0 in nats, mean over pairs of different blocks; {len(first)} definitions of use, then those most alike\n"
        "factor: root mean square factor to the paper's; scaled: after one common factor; rank: correlation;\n"
        "ratio: least Transformer over greatest CNN. A mean with the diagonal is (n - 1) / n of these: "
        + ", ".join(f"{(len(s.spectra) - 1) / len(s.spectra):.2f} ({s.title})" for s in subjects)
        + "\n"
        + format_table(header, rows, left=3)
        + "\n"
    )


def _draw(
    subjects: Sequence[Subject],
    values: Mapping[Definition, Mapping[str, float]],
    judged: Mapping[str, Mapping[Definition, tuple[float, float, float]]],
) -> Figure:
    """Plot the paper's numbers and, for every kind, the definition closest to them up to a common factor."""
    figure = new_figure(9.0, 5.0)
    panel = figure.subplots()
    titles = [s.title for s in subjects]
    known = [(s.title, NETWORKS[s.name][1]) for s in subjects if s.name in NETWORKS]
    panel.plot([t for t, _ in known], [value for _, value in known], "k*", markersize=11, label="Table 1")
    for kind, mark in zip(dict.fromkeys(key[0] for key in values), "os^v"):
        keys = [key for key in values if key[0] == kind]
        if judged:
            keys.sort(key=lambda key: min(row[key][1] for row in judged.values()))
        found = values[keys[0]]
        panel.plot(titles, [max(found[t], SMALLEST) for t in titles], mark, label=format_definition(keys[0]))
    panel.set(yscale="log", ylabel="JS0, nats")
    panel.tick_params(axis="x", rotation=20)
    figure.legend(loc="outside lower center", frameon=False, fontsize="small", ncols=2)
    return figure
