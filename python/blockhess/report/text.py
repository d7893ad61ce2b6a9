"""A result in words: where it comes from, the table of its blocks, its JS0 with all that it depends on."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from blockhess._text import printable
from blockhess.analysis.jensen_shannon import check_choice
from blockhess.report.rows import block_records
from blockhess.spectra import Spectra

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


def weights_only(spectra: Spectra) -> tuple[str, ...]:
    """Return the blocks that comparisons take, without norm gains and biases: those of two dimensions or more.

    The paper leaves norm layers out of its comparisons, and its models have few biases.
    """
    return tuple(
        block.name for block in spectra.blocks if len(block.shape) >= 2 and block.name not in dict(spectra.left_out)
    )


def curvature_range(spectra: Spectra) -> tuple[float, float]:
    """Return the largest |eigenvalue| of the flattest and of the sharpest weight block."""
    low, high = spectra.eigenvalue_range()
    sizes = torch.maximum(low.abs(), high.abs())[spectra.rows(weights_only(spectra))]
    return float(sizes.min()), float(sizes.max())


def sorted_names(spectra: Spectra, key: str) -> tuple[str, ...]:
    """Return the names of all blocks by one column of the table; unknown values (NaN) come last.

    Args:
        spectra: a result.
        key: one of SORT_KEYS.

    Raises:
        ValueError: another key.
    """
    check_choice("show", "sort", key, SORT_KEYS)
    if key == "order":
        return spectra.names
    if key == "name":
        return tuple(sorted(spectra.names))
    low, high = spectra.eigenvalue_range()
    values = {
        "dim": list(map(float, spectra.dims)),
        "lambda_min": low.tolist(),
        "lambda_max": high.tolist(),
        "trace": spectra.trace()[0].tolist(),
        "negative": spectra.negative_mass().tolist(),
    }[key]
    sign = -1.0 if SORT_KEYS[key] else 1.0
    ranks = [math.inf if math.isnan(value) else sign * value for value in values]
    return tuple(name for _, name in sorted(zip(ranks, spectra.names), key=lambda pair: pair[0]))


def to_dict(spectra: Spectra, sort: str = "order") -> dict[str, Any]:
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
        "js0": asdict(spectra.js0()) if spectra.num_comparable() >= 2 else None,
        "js0_weights_only": asdict(spectra.js0(blocks=weights)) if len(weights) >= 2 else None,
        "blocks": [by_name[name] for name in names],
    }


def describe(spectra: Spectra, sort: str = "order") -> str:
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
            f"{sum(made['ghosts'].values())} nodes in {len(made['ghosts'])} blocks are ghosts: no reorthogonalisation "
            "there; densities lose nothing by them"
        )
    lines = [*map(printable, lines), "", spectra.table(names)]

    weights = weights_only(spectra)
    if len(spectra.names) - len(spectra.left_out) >= 2:
        lines += ["", f"All blocks: {spectra.js0()}"]
    if 2 <= len(weights) < len(spectra.names):
        lines.append(f"Weights only, no norms and biases: {spectra.js0(blocks=weights)}")
    return "\n".join(lines)
