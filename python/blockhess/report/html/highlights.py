"""Highlights of a result, as sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from blockhess.analysis.comparison import compare
from blockhess.analysis.curvature_spread import curvature_spread
from blockhess.analysis.selection import comparable_blocks
from blockhess.report.text import recomputed
from blockhess.results.data import SpectraData

# Smallest share of negative eigenvalues that is reported, and largest number of names in a sentence.
NOTABLE_NEGATIVE = 0.01
MOST_NAMES = 4


def highlights(
    spectra: SpectraData, records: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return the highlights, in one or two sentences each.

    Args:
        records: rows.block_records of the result.
        comparisons: records with title, value and interval of JS0; without an interval one digit is shown.
    """
    texts = [
        _curvature(spectra),
        _heterogeneity(comparisons),
        _most_different(spectra),
        f"{note}." if (note := recomputed(spectra)) else "",
        _precision(spectra, records),
        _negative(records),
        *_problems(spectra, records),
        _batchnorm(spectra),
    ]
    return [text for text in texts if text]


def _most_different(spectra: SpectraData) -> str:
    if len(comparable_blocks(spectra)) < 2:
        return ""
    matrix, js0 = compare(spectra)
    order = matrix.sum(1).argsort(descending=True, stable=True).tolist()
    return f"Most different from the other blocks: {', '.join(js0.blocks[i] for i in order[:MOST_NAMES])}."


def _heterogeneity(comparisons: Sequence[Mapping[str, Any]]) -> str:
    if len(comparisons) < 2:
        return ""
    values = ", ".join(_with_interval(c) for c in comparisons)
    return f"The heterogeneity of the blocks depends on the comparison. JS0 is {values}: quote it with its axis."


def _with_interval(comparison: Mapping[str, Any]) -> str:
    value, interval, title = (comparison[key] for key in ("value", "interval", "title"))
    if interval is None:
        return f"~{value:.1g} ({title})"
    return f"{value:.2f} ({title}; {interval[0]:.2f} ... {interval[1]:.2f} with {100 * interval[2]:g} %)"


def _curvature(spectra: SpectraData) -> str:
    spread = curvature_spread(spectra)
    return "" if spread is None else f"{spread}."


def _precision(spectra: SpectraData, records: Sequence[Mapping[str, Any]]) -> str:
    if spectra.quadrature.num_probes == 1:
        return "With one random probe the statistical errors are unknown. Take two or more."
    known = [r for r in records if math.isfinite(r["w1_probes"])]
    return (
        "Every block was computed exactly." if known and not any(r["w1_probes"] or r["w1_steps"] for r in known) else ""
    )


def _negative(records: Sequence[Mapping[str, Any]]) -> str:
    certain = [r for r in records if r["negative_lower"] > NOTABLE_NEGATIVE]
    unresolved = [r for r in records if r["negative_lower"] <= NOTABLE_NEGATIVE < r["negative_upper"]]
    if not certain and not unresolved:
        return "No block has more than 1 % negative eigenvalues."
    texts = []
    if certain:
        most = max(certain, key=lambda r: float(r["negative_lower"]))
        texts = [
            f"{len(certain)} of {len(records)} blocks have more than 1 % negative eigenvalues, the most in "
            f"{most['block']}: at least {math.floor(100 * most['negative_lower'])} %."
        ]
    if unresolved:
        texts.append(
            f"In {len(unresolved)} of {len(records)} blocks, steps and probes leave open if more than 1 % are negative."
        )
    return " ".join(texts)


def _problems(spectra: SpectraData, records: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = {r["block"]: str(r["note"]).split("; ") for r in records}
    groups = {
        "Blocks whose Hessian-vector products were not finite": [n for n, t in notes.items() if "non-finite" in t],
        "Blocks that did not reach the tolerance": [n for n, t in notes.items() if "tolerance not reached" in t],
        "Unused blocks, on which the loss does not depend": [n for n, t in notes.items() if "unused" in t],
        "Blocks that are zero within the error of their Hessian-vector products": list(spectra.zero_blocks),
    }
    return [
        f"{what}: {', '.join(names[:MOST_NAMES])}"
        + (f" and {len(names) - MOST_NAMES} more." if len(names) > MOST_NAMES else ".")
        for what, names in groups.items()
        if names
    ]


def _batchnorm(spectra: SpectraData) -> str:
    if spectra.provenance.get("batchnorm") != "eval":
        return ""
    return (
        "BatchNorm used its running statistics. At initialization they are the identity, so this is a network without "
        'normalization; batchnorm="batch" is what training differentiates.'
    )
