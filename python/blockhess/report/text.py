"""Text reports of a result: provenance, table of the blocks, JS0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from blockhess._text import format_table, number, printable
from blockhess.analysis import comparison, statistics
from blockhess.analysis.block_rate_gain import BlockRateGain, block_rate_gain
from blockhess.analysis.curvature_spread import curvature_spread
from blockhess.analysis.errors import error_bars
from blockhess.analysis.jensen_shannon import JS0
from blockhess.analysis.selection import comparable_blocks, weights_only
from blockhess.report.rows import CONFIDENCE, block_records, record_texts
from blockhess.results.data import SpectraData
from blockhess_ext.arguments import choice

SORT_KEYS = ("order", "name", "dim", "lambda_min", "lambda_max", "trace", "negative")


def sorted_names(spectra: SpectraData, key: str) -> tuple[str, ...]:
    """Return the names of all blocks, sorted by one of SORT_KEYS; NaN comes last, and all but lambda_min descend."""
    choice("sort", key, SORT_KEYS, op="show")
    if key == "order":
        return spectra.names
    if key == "name":
        return tuple(sorted(spectra.names))
    low, high = statistics.eigenvalue_range(spectra)
    values = {
        "dim": list(map(float, spectra.dims)),
        "lambda_min": low.tolist(),
        "lambda_max": high.tolist(),
        "trace": statistics.trace(spectra)[0].tolist(),
        "negative": torch.stack(error_bars.negative_interval(spectra)).mean(0).tolist(),
    }[key]
    sign = 1.0 if key == "lambda_min" else -1.0
    ranks = [math.inf if math.isnan(value) else sign * value for value in values]
    return tuple(name for _, name in sorted(zip(ranks, spectra.names), key=lambda pair: pair[0]))


def table(spectra: SpectraData, blocks: Sequence[str] | None = None) -> str:
    """Return a plain-text table with one block per line: shape, extreme eigenvalues, trace +- its error, ...

    A table of all blocks ends with the curvature spread.

    "+-" are the larger halves of the 95 % intervals. Extreme eigenvalues have the digits that their bounds support: "~"
    is an order of magnitude, ">=" and "<=" bounds. Shares of negative and zero eigenvalues are intervals, or
    "unresolved" if the interval covers more than half. "W1 probes" is an estimate, "W1 steps" a bound: see
    wasserstein_error.

    Args:
        blocks: names, in order; None means all.
    """
    header = (
        "block,shape,dim,lambda_min,lambda_max,trace,+-,Frobenius,+-,negative,zero,W1 probes,W1 steps <=,steps,note"
    )
    records, tolerances = block_records(spectra), spectra.zero_tolerance.tolist()
    lines = []
    for row in spectra.rows(blocks):
        record, texts = records[row], record_texts(records[row], tolerances[row])
        steps = spectra.quadrature.steps[:, row]
        least, most = int(steps[steps > 0].min()) if bool(spectra.known[row]) else 0, int(steps.max())
        estimates = (
            "lambda_min",
            "lambda_max",
            "trace",
            "trace_error",
            "frobenius",
            "frobenius_error",
            "negative",
            "zero",
        )
        lines.append(
            (
                *(str(record[key]) for key in ("block", "shape", "dim")),
                *(texts[key] for key in estimates),
                *(number(record[key], 2) for key in ("w1_probes", "w1_steps")),
                str(most) if least == most else f"{least}..{most}",
                record["note"],
            )
        )
    text = format_table(header.split(","), lines)
    spread = curvature_spread(spectra) if blocks is None else None
    return text if spread is None else f"{text}\n\n{spread}"


def to_dict(spectra: SpectraData, sort: str = "order") -> dict[str, Any]:
    """Return the contents of `describe` as JSON values, NaN and infinity included."""
    names = sorted_names(spectra, sort)
    by_name = {record["block"]: record for record in block_records(spectra)}
    all_blocks, weights = _js0(spectra)
    return {
        "curvature_spread": None if (spread := curvature_spread(spectra)) is None else spread.to_dict(),
        "block_rate_gain": None if (gain := _block_rate_gain(spectra)) is None else gain.to_dict(),
        "summary": repr(spectra),
        "provenance": spectra.provenance,
        "js0": all_blocks and asdict(all_blocks),
        "js0_weights_only": weights and asdict(weights),
        "blocks": [by_name[name] for name in names],
    }


def recomputed(spectra: SpectraData) -> str:
    """Return a note on the JS0 of a result of blockhess 0.1, whose default axis was linear, else ""."""
    if spectra.provenance.get("default_axis") != "linear" or len(comparable_blocks(spectra)) < 2:
        return ""
    return (
        "Made by blockhess 0.1, whose default comparison was on the linear axis: JS0 is recomputed on the signed-log "
        '(asinh) axis; js0(axis="linear") returns the earlier value'
    )


def _block_rate_gain(spectra: SpectraData) -> BlockRateGain | None:
    """Return the gain of block rates; None for results without norms of the gradient, or blocks without a gain."""
    try:
        return block_rate_gain(spectra, confidence=CONFIDENCE)
    except ValueError:
        return None


def _js0(spectra: SpectraData) -> tuple[JS0 | None, JS0 | None]:
    """Return JS0 of all blocks and of weights_only, with intervals; None for fewer than two blocks."""
    weights = weights_only(spectra)
    has_blocks = len(comparable_blocks(spectra)) >= 2
    return (
        comparison.js0(spectra, confidence=CONFIDENCE) if has_blocks else None,
        comparison.js0(spectra, blocks=weights, confidence=CONFIDENCE) if len(weights) >= 2 else None,
    )


def describe(spectra: SpectraData, sort: str = "order") -> str:
    """Return a plain-text report of a result.

    Args:
        sort: order of the rows of the table, one of SORT_KEYS.

    Example:
        >>> print(describe(blockhess.load("gpt.npz"), sort="lambda_max"))
    """
    names = sorted_names(spectra, sort)
    p = spectra.provenance
    spread = curvature_spread(spectra)
    lines = ([] if spread is None else [str(spread), ""]) + [repr(spectra)]
    if isinstance(p.get("loss_value"), int | float):
        lines.append(f"loss {p['loss_value']:.6g} ({p.get('loss')}), BatchNorm: {p.get('batchnorm')}")
    if isinstance(p.get("hvps"), int) and isinstance(p.get("seconds"), int | float):
        versions = f"blockhess {p.get('blockhess')}, torch {p.get('torch')}"
        lines.append(f"{p['hvps']} Hessian-vector products in {p['seconds']:.1f} s, {versions}")
    if p.get("hvps_saved") and p.get("tol"):
        lines.append(f"{p['hvps_saved']} products saved by the tolerance {p['tol']:g}")
    if p.get("ghosts"):
        count = f"{sum(p['ghosts'].values())} nodes in {len(p['ghosts'])} blocks"
        lines.append(f"{count} are ghosts, as they are not reorthogonalized; ghosts do not bias densities")
    if note := recomputed(spectra):
        lines.append(note)
    lines = [*map(printable, lines), "", table(spectra, names)]

    all_blocks, weights = _js0(spectra)
    if all_blocks is not None:
        lines += ["", f"All blocks: {all_blocks}"]
    if weights is not None and len(weights.blocks) < len(spectra.names):
        lines.append(f"Weights only, no norms and biases: {weights}")
    if (gain := _block_rate_gain(spectra)) is not None:
        lines += ["", str(gain)]
    return "\n".join(lines)
