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


def highlights(spectra: SpectraData, records: Sequence[Mapping[str, Any]], js0: Mapping[str, float]) -> list[str]:
    """Return the highlights, in one or two sentences each.

    Args:
        records: rows.block_records of the result.
        js0: title of a comparison -> JS0, the default comparison first.
    """
    texts = [
        _curvature(spectra),
        _heterogeneity(js0),
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


def _heterogeneity(js0: Mapping[str, float]) -> str:
    if len(js0) < 2:
        return ""
    values = ", ".join(f"{value:.3g} ({title})" for title, value in js0.items())
    return f"The heterogeneity of the blocks depends on the comparison. JS0 is {values}: quote it with its axis."


def _curvature(spectra: SpectraData) -> str:
    spread = curvature_spread(spectra)
    return "" if spread is None else f"{spread}."


def _precision(spectra: SpectraData, records: Sequence[Mapping[str, Any]]) -> str:
    if spectra.quadrature.num_probes == 1:
        return "With one random probe the statistical errors are unknown. Take two or more."
    known = [r for r in records if math.isfinite(r["w1_probes"]) and math.isfinite(r["w1_steps"])]
    estimated = [r for r in known if r["w1_probes"] > 0 or r["w1_steps"] > 0]
    if not estimated:
        return "Every block was computed exactly." if known else ""
    by_steps = sum(r["w1_steps"] > r["w1_probes"] for r in estimated)
    advice = "more steps help most" if 2 * by_steps > len(estimated) else "more probes help most"
    if not by_steps:
        return f"In every block the error of the random probes exceeds that of the finite number of steps: {advice}."
    blocks = f"{by_steps} of {len(estimated)} estimated blocks"
    return f"The error of the finite number of steps may exceed that of the random probes in {blocks}: {advice}."


def _negative(records: Sequence[Mapping[str, Any]]) -> str:
    notable = [r for r in records if r["negative"] > NOTABLE_NEGATIVE]
    if not notable:
        return "No block has more than 1 % negative eigenvalues."
    most = max(notable, key=lambda r: float(r["negative"]))
    return (
        f"{len(notable)} of {len(records)} blocks have more than 1 % negative eigenvalues, the most in "
        f"{most['block']}: {100 * most['negative']:.0f} %."
    )


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
