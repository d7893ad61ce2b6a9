"""Records of a result, one dict per block or pair, for data frames, JSON and the HTML page."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any

import torch
from torch import Tensor

from blockhess._text import number
from blockhess.analysis import statistics
from blockhess.analysis.comparison import compare
from blockhess.analysis.errors import error_bars
from blockhess.problem.blocks import ZERO_NOTE
from blockhess.results.data import SpectraData

# Confidence of all intervals.
CONFIDENCE = 0.95

# Width of the interval of a share from which it is not printed, and below which it is one number.
MOST_UNRESOLVED, SHARE_ROUNDING = 0.5, 1e-9


def block_records(spectra: SpectraData) -> list[dict[str, Any]]:
    """Return one record per block, in order.

    Values within zero_tolerance are 0. A block that is zero within the error of its Hessian-vector products has none.

    Returns:
        records with block, shape, dim; lambda_min and lambda_max, with lambda_min_lower and lambda_max_upper of
        eigenvalue_bounds; trace and frobenius, with the ends of their intervals, as trace_lower and trace_upper; the
        ends of the intervals of the shares of negative and of zero eigenvalues, as negative_lower; w1_probes, an
        estimate, and w1_steps, a bound (wasserstein_error); steps (maximum over probes); note. All intervals have
        confidence CONFIDENCE. Unknown values are NaN, unknown bounds of them infinite.

    Example:
        >>> [(r["block"], r["lambda_max"]) for r in block_records(spectra)]
    """
    low, high = statistics.eigenvalue_range(spectra)
    columns: dict[str, Tensor] = {"lambda_min": low, "lambda_max": high, "trace": statistics.trace(spectra)[0]}
    columns["frobenius"] = statistics.frobenius_norm(spectra)[0]
    for name in ("lambda_min", "lambda_max", "trace"):
        columns[name] = torch.where(columns[name].abs() <= spectra.zero_tolerance, 0.0, columns[name])
    columns["lambda_min_lower"], columns["lambda_max_upper"] = error_bars.eigenvalue_bounds(spectra, CONFIDENCE)
    intervals = {
        "trace": error_bars.trace_interval(spectra, CONFIDENCE),
        "frobenius": error_bars.frobenius_interval(spectra, CONFIDENCE),
        **dict(zip(("negative", "zero"), error_bars.negative_and_zero_intervals(spectra, CONFIDENCE))),
    }
    for name, (lower, upper) in intervals.items():
        columns[f"{name}_lower"], columns[f"{name}_upper"] = lower, upper
    columns["w1_probes"], columns["w1_steps"] = error_bars.wasserstein_error(spectra)
    noise = torch.tensor([name in spectra.noise_blocks for name in spectra.names], device="cpu")
    values = {name: column.masked_fill(noise, math.nan).tolist() for name, column in columns.items()}
    broken = spectra.quadrature.nonfinite.any(0).tolist()
    steps = spectra.quadrature.steps.amax(0).tolist()
    return [
        {
            "block": block.name,
            "shape": "x".join(map(str, block.shape)) or "scalar",
            "dim": block.dim,
            **{name: column[row] for name, column in values.items()},
            "steps": steps[row],
            "note": _note(block.note, ZERO_NOTE if noise[row] else "", "non-finite" if broken[row] else ""),
        }
        for row, block in enumerate(spectra.blocks)
    ]


def _note(known: str, *more: str) -> str:
    notes = [note for note in known.split("; ") if note]
    return "; ".join(notes + [note for note in more if note and note not in notes])


def record_texts(record: Mapping[str, Any], tolerance: float) -> dict[str, str]:
    """Return the texts of the estimates of a block_records record, with the digits that their bounds support.

    Args:
        tolerance: zero_tolerance of the block.

    Returns:
        lambda_min, lambda_max: see bounded; negative, zero: see share; trace, frobenius, and their errors trace_error
        and frobenius_error, the larger distances to the ends of their intervals, 0 within the tolerance.
    """
    texts = {
        "lambda_min": bounded(record["lambda_min"], record["lambda_min_lower"], tolerance),
        "lambda_max": bounded(record["lambda_max"], record["lambda_max_upper"], tolerance),
    }
    for name in ("trace", "frobenius"):
        value, lower, upper = (record[f"{name}{end}"] for end in ("", "_lower", "_upper"))
        error = max(value - lower, upper - value)
        texts[name], texts[f"{name}_error"] = number(value), number(0.0 if error <= tolerance else error, 2)
    for name in ("negative", "zero"):
        texts[name] = share(record[f"{name}_lower"], record[f"{name}_upper"])
    return texts


def bounded(value: float, bound: float, tolerance: float) -> str:
    """Return an extreme eigenvalue, between value and bound, with the digits that they share: at most three.

    "~" marks an error of more than one unit of the first digit. ">=" and "<=" mark an error that exceeds
    the value, which is rounded so that they hold.

    Example:
        >>> bounded(1.234, 1.2341, 0.0), bounded(1.234, 1.26, 0.0), bounded(1.2, 2.3, 0.0), bounded(0.01, -2.0, 0.0)
        ('1.23e+00', '1.2e+00', '~1e+00', '<=1.0e-02')
    """
    error = abs(bound - value)
    if not error > 2 * tolerance:
        return number(value)
    if not error <= abs(value):
        if error != error:
            return "-"
        sign, rounding = (">=", ROUND_FLOOR) if bound > value else ("<=", ROUND_CEILING)
        return sign + number(float(Context(prec=2, rounding=rounding).create_decimal(repr(value))), 2)
    digits = math.floor(math.log10(abs(value))) + 1 - math.ceil(math.log10(error))
    return f"{'' if digits else '~'}{number(value, min(max(digits, 1), 3))}"


def share(lower: float, upper: float) -> str:
    """Return the interval of a share, rounded outwards; "unresolved" if it covers more than half.

    Example:
        >>> share(0.123, 0.1299), share(0.25, 0.25), share(0.1, 0.8)
        ('0.12..0.13', '0.25', 'unresolved')
    """
    if lower != lower:
        return "-"
    if upper - lower > MOST_UNRESOLVED:
        return "unresolved"
    if upper - lower < SHARE_ROUNDING:
        return f"{upper:.4g}"
    low, high = math.floor(100 * lower + SHARE_ROUNDING) / 100, math.ceil(100 * upper - SHARE_ROUNDING) / 100
    return f"{low:.2f}..{high:.2f}"


def pair_records(spectra: SpectraData, **comparison: Any) -> list[dict[str, Any]]:
    """Return one record per pair of compared blocks, with the value of js_matrix.

    Args:
        comparison: arguments of js_matrix, by name.

    Returns:
        records with block_a, block_b and the value, whose key is the kind ("distance" by default).

    Example:
        >>> most_different = max(pair_records(spectra), key=lambda r: r["distance"])
    """
    matrix, js0 = compare(spectra, **comparison)
    rows = matrix.tolist()
    return [
        {"block_a": a, "block_b": b, js0.kind: rows[i][j]}
        for (i, a), (j, b) in itertools.combinations(enumerate(js0.blocks), 2)
    ]


def finite(value: Any) -> Any:
    """Return a JSON value with NaN and infinity replaced by None.

    Example:
        >>> finite({"a": [1.0, float("nan")]})
        {'a': [1.0, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any) -> str:
    """Return a value as indented ASCII JSON, with NaN and infinity replaced by null."""
    return json.dumps(finite(value), indent=1, allow_nan=False)
