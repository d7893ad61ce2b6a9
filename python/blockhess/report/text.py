"""A result in words: where it comes from, the table of its blocks, its JS0 with all that it depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from blockhess._text import format_table, number, printable
from blockhess.analysis import comparison, statistics
from blockhess.analysis.errors import error_bars
from blockhess.analysis.selection import comparable_blocks, weights_only
from blockhess.report.rows import block_records
from blockhess.results.data import SpectraData
from blockhess_ext.arguments import choice

# sort key -> whether the largest value comes first.
SORT_KEYS = {
    "order": False,
    "name": False,
    "dim": True,
    "lambda_min": False,
    "lambda_max": True,
    "trace": True,
    "negative": True,
}


def sorted_names(spectra: SpectraData, key: str) -> tuple[str, ...]:
    """Return the names of all blocks by one column of the table; unknown values (NaN) come last.

    Args:
        spectra: a result.
        key: one of SORT_KEYS.

    Raises:
        ValueError: another key.
    """
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
        "negative": statistics.negative_mass(spectra).tolist(),
    }[key]
    sign = -1.0 if SORT_KEYS[key] else 1.0
    ranks = [math.inf if math.isnan(value) else sign * value for value in values]
    return tuple(name for _, name in sorted(zip(ranks, spectra.names), key=lambda pair: pair[0]))


def table(spectra: SpectraData, blocks: Sequence[str] | None = None) -> str:
    """Return a plain-text table, one block a line: shape, extreme eigenvalues, trace +- its error, ...

    "W1 probes" and "W1 steps" are wasserstein_error(): how far the random probes, and at most the steps, may have
    left the spectrum from the truth. Where the first is larger, more probes help, else more steps.

    Args:
        blocks: names, in the order wanted; None means all, in the order of the model.
    """
    header = "block,shape,dim,lambda_min,lambda_max,trace,+-,Frobenius,negative,zero,W1 probes,W1 steps,steps,note"
    zero, (from_probes, from_steps) = statistics.zero_mass(spectra).tolist(), error_bars.wasserstein_error(spectra)
    low, high = statistics.eigenvalue_range(spectra)
    columns = (
        low,
        high,
        *statistics.trace(spectra),
        statistics.frobenius_norm(spectra)[0],
        statistics.negative_mass(spectra),
    )
    values = torch.stack(columns, 1).tolist()
    lines = []
    for row in spectra.rows(blocks):
        block, steps = spectra.blocks[row], spectra.quadrature.steps[:, row]
        low, high, trace, stderr, norm, negative = values[row]
        least, most = int(steps[steps > 0].min()) if bool(spectra.known[row]) else 0, int(steps.max())
        broken = "non-finite" if bool(spectra.quadrature.nonfinite[:, row].any()) else ""
        lines.append(
            (
                block.name,
                "x".join(map(str, block.shape)) or "scalar",
                str(block.dim),
                number(low),
                number(high),
                number(trace),
                number(stderr, 2),
                number(norm),
                "-" if math.isnan(negative) else f"{negative:.4f}",
                "-" if math.isnan(zero[row]) else f"{zero[row]:.4f}",
                number(float(from_probes[row]), 2),
                number(float(from_steps[row]), 2),
                str(most) if least == most else f"{least}..{most}",
                "; ".join(filter(None, (block.note, broken))),
            )
        )
    return format_table(header.split(","), lines)


def to_dict(spectra: SpectraData, sort: str = "order") -> dict[str, Any]:
    """Return what `describe` tells as a JSON value, NaN and infinity among its numbers.

    Args:
        spectra: a result.
        sort: order of the blocks, one of SORT_KEYS.

    Raises:
        ValueError: another sort.
    """
    names = sorted_names(spectra, sort)
    by_name = {record["block"]: record for record in block_records(spectra)}
    weights = weights_only(spectra)
    return {
        "summary": repr(spectra),
        "provenance": spectra.provenance,
        "js0": asdict(comparison.js0(spectra)) if len(comparable_blocks(spectra)) >= 2 else None,
        "js0_weights_only": asdict(comparison.js0(spectra, blocks=weights)) if len(weights) >= 2 else None,
        "blocks": [by_name[name] for name in names],
    }


def describe(spectra: SpectraData, sort: str = "order") -> str:
    """Return the whole report of one result as plain text.

    Args:
        spectra: a result.
        sort: order of the table's rows, one of SORT_KEYS.

    Raises:
        ValueError: another sort.

    Example:
        >>> print(describe(blockhess.load("gpt.npz"), sort="lambda_max"))
    """
    names = sorted_names(spectra, sort)
    made = spectra.provenance
    lines = [repr(spectra)]
    if isinstance(made.get("loss_value"), int | float):
        lines.append(f"loss {made['loss_value']:.6g} ({made.get('loss')}), BatchNorm: {made.get('batchnorm')}")
    if isinstance(made.get("hvps"), int) and isinstance(made.get("seconds"), int | float):
        lines.append(
            f"{made['hvps']} Hessian-vector products in {made['seconds']:.1f} s, "
            f"blockhess {made.get('blockhess')}, torch {made.get('torch')}"
        )
    if made.get("hvps_saved") and made.get("tol"):
        lines.append(f"{made['hvps_saved']} products saved by the tolerance {made['tol']:g}")
    if made.get("ghosts"):
        lines.append(
            f"{sum(made['ghosts'].values())} nodes in {len(made['ghosts'])} blocks are ghosts: no reorthogonalization "
            "there; densities lose nothing by them"
        )
    lines = [*map(printable, lines), "", table(spectra, names)]

    weights = weights_only(spectra)
    if len(comparable_blocks(spectra)) >= 2:
        lines += ["", f"All blocks: {comparison.js0(spectra)}"]
    if 2 <= len(weights) < len(spectra.names):
        lines.append(f"Weights only, no norms and biases: {comparison.js0(spectra, blocks=weights)}")
    return "\n".join(lines)
