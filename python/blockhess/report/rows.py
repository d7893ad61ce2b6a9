"""Records of a result, one dict per block or pair, for data frames, JSON and the HTML page."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

from blockhess.analysis import statistics
from blockhess.analysis.comparison import compare
from blockhess.analysis.errors import error_bars
from blockhess.results.data import SpectraData


def block_records(spectra: SpectraData) -> list[dict[str, Any]]:
    """Return one record per block, in order.

    Returns:
        records with block, shape, dim; lambda_min, lambda_max and their standard errors (range_error); trace and
        frobenius with standard errors; negative and zero (shares of eigenvalues); w1_probes and w1_steps
        (wasserstein_error); steps (maximum over probes); note. Unknown values are NaN, unknown errors inf.

    Example:
        >>> [(r["block"], r["lambda_max"]) for r in block_records(spectra)]
    """
    low, high = statistics.eigenvalue_range(spectra)
    (_, low_error), (_, high_error) = error_bars.range_error(spectra)
    trace, trace_error = statistics.trace(spectra)
    norm, norm_error = statistics.frobenius_norm(spectra)
    from_probes, from_steps = error_bars.wasserstein_error(spectra)
    columns = {
        "lambda_min": low,
        "lambda_min_error": low_error,
        "lambda_max": high,
        "lambda_max_error": high_error,
        "trace": trace,
        "trace_error": trace_error,
        "frobenius": norm,
        "frobenius_error": norm_error,
        "negative": statistics.negative_mass(spectra),
        "zero": statistics.zero_mass(spectra),
        "w1_probes": from_probes,
        "w1_steps": from_steps,
    }
    broken = spectra.quadrature.nonfinite.any(0).tolist()
    steps = spectra.quadrature.steps.amax(0).tolist()
    values = {name: column.tolist() for name, column in columns.items()}
    return [
        {
            "block": block.name,
            "shape": "x".join(map(str, block.shape)) or "scalar",
            "dim": block.dim,
            **{name: column[row] for name, column in values.items()},
            "steps": steps[row],
            "note": "; ".join(filter(None, (block.note, "non-finite" if broken[row] else ""))),
        }
        for row, block in enumerate(spectra.blocks)
    ]


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
