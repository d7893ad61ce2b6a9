"""Contents of the HTML page, as a JSON value.

The page smooths nodes and weights itself; they are embedded in float32, nodes relative to the largest of the block. If
there are too many, the measure of each block is condensed: nodes in the same cell of a linear and of a logarithmic
lattice are replaced by their weighted mean, so that mass and trace stay exact.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockhess._version import __version__
from blockhess.analysis.axes import Axis
from blockhess.analysis.comparison import compare
from blockhess.analysis.curvature_spread import curvature_spread
from blockhess.analysis.errors.error_bars import resolved_sigma
from blockhess.analysis.selection import comparable_blocks, weights_only
from blockhess.report.html.highlights import highlights
from blockhess.report.rows import CONFIDENCE, block_records, record_texts
from blockhess.results.data import SpectraData
from blockhess_ext import Quadrature

# Largest number of nodes in a page, about 11 bytes each.
MOST_NODES = 360_000

# Where the logarithmic lattice becomes linear, relative to the spectral radius.
SMALLEST_SHARE = 1e-4

# Entries of provenance that are long or shown elsewhere, and the largest length of a value.
NOT_SHOWN = ("partial", "hvp_error", "unchecked", "plan", "model", "ghosts", "gradient_norms", "slices")
LONGEST_VALUE = 300

# title -> arguments of comparison.compare, the default comparison first
COMPARISONS: dict[str, dict[str, Any]] = {
    "signed-log axis": {"axis": "asinh"},
    "linear axis": {"axis": "linear"},
    "divided by spectral radius": {"axis": Axis(normalize="radius")},
}

DEFAULT_COMPARISON = next(iter(COMPARISONS))

Floats = NDArray[np.float64]


def page_contents(results: Sequence[SpectraData], labels: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the contents of the page as JSON values, NaN and infinity included.

    Args:
        results: one result, or checkpoints in order.
        labels: names of the results; None numbers them.

    Raises:
        ValueError: there is no result, the numbers of labels and results differ, or the results have different blocks.
    """
    if not results:
        raise ValueError("report: results must hold at least one, got none")
    labels = [str(i) for i in range(1, len(results) + 1)] if labels is None else list(labels)
    if len(labels) != len(results):
        raise ValueError(f"report: labels must be as many as results, {len(results)}, got {len(labels)}")
    _check_same_blocks(results, labels)
    nodes = sum(int(spectra.quadrature.steps.sum()) for spectra in results)
    most = None if nodes <= MOST_NODES else MOST_NODES // sum(map(len, results))
    return {
        "blockhess": __version__,
        "condensed": most,
        "results": [_result(spectra, label, most) for spectra, label in zip(results, labels)],
    }


def _check_same_blocks(results: Sequence[SpectraData], labels: Sequence[str]) -> None:
    """Raise ValueError unless the results have the same blocks; blocks of unfinished runs may be missing."""
    sizes = [dict(zip(spectra.names, spectra.dims)) for spectra in results]
    first = max(range(len(results)), key=lambda i: len(sizes[i]))
    for i, spectra in enumerate(results):
        actual, expected = sizes[i], sizes[first]
        others = [name for name, dim in actual.items() if expected.get(name) != dim]
        missing = [] if spectra.provenance.get("partial") else [name for name in expected if name not in actual]
        for what, names in (("other blocks than", others), ("not all blocks of", missing)):
            if names:
                raise ValueError(
                    f"report: results must be of the same blocks, as checkpoints of one model are, got {labels[i]} "
                    f"with {what} {labels[first]}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}; "
                    "write a report of each"
                )


def _result(spectra: SpectraData, label: str, most: int | None) -> dict[str, Any]:
    comparisons = [
        _comparison(spectra, title, options)
        for title, options in COMPARISONS.items()
        if len(comparable_blocks(spectra, options["axis"])) >= 2
    ]
    records, spread = block_records(spectra), curvature_spread(spectra)
    widths, weights = resolved_sigma(spectra).tolist(), set(weights_only(spectra))
    blocks: list[dict[str, Any]] = []
    nodes, shares = [], []
    merged = (part.numpy() for part in spectra.merged)
    for (record, x, w), width, zero in zip(zip(records, *merged), widths, spectra.zero_tolerance.tolist()):
        positive = (w > 0) & (record["block"] not in spectra.noise_blocks)
        probes = [count for count in positive.reshape(spectra.quadrature.num_probes, -1).sum(1).tolist() if count]
        x, w = x[positive], w[positive]
        if most is not None and len(x) > most:
            x, w = condense(x, w, most)
            probes = [len(x)]
        radius = float(np.abs(x).max(initial=0.0))
        relative = x / radius if radius > 0 else x
        nodes.append(relative)
        shares.append(w)
        blocks.append(
            record
            | {
                "texts": record_texts(record, zero),
                "radius": radius,
                "rms": radius * math.sqrt(float((w * relative**2 * (np.abs(x) > zero)).sum())),
                "zero_tolerance": zero,
                "sigma": width,
                "probes": probes,
                "unit_variance": _unit_variance(spectra.quadrature, len(blocks)),
                "is_weight": record["block"] in weights,
            }
        )
    return {
        "label": label,
        "step": spectra.provenance.get("step"),
        "model": str(spectra.provenance.get("model") or "a model"),
        "summary": repr(spectra),
        "curvature_spread": None if spread is None else spread.to_dict(),
        "unfinished": _unfinished(spectra),
        "highlights": highlights(spectra, records, comparisons),
        "provenance": _provenance(spectra),
        "blocks": blocks,
        "nodes": _packed(np.concatenate(nodes), "<f4"),
        "weights": _packed(np.concatenate(shares), "<f4"),
        "comparisons": comparisons,
    }


def _unit_variance(q: Quadrature, block: int) -> float:
    """Return the theoretical variance of v^T f(H) v over that of f: see errors.probes.variance_of_probes."""
    return 2 / (q.dims[block] + 2) if q.distribution == "gaussian" and not q.is_exact(block) else 0.0


def _unfinished(spectra: SpectraData) -> str | None:
    """Return what an unfinished run lacks, None for a finished one."""
    provenance = spectra.provenance
    if not provenance.get("partial"):
        return None
    text = "This run is not finished: the page shows what it has saved so far; probes and steps differ between blocks."
    done, planned, missing = (provenance.get(key) for key in ("hvps", "hvps_planned", "blocks_missing"))
    if isinstance(done, int) and isinstance(planned, int):
        text += f" {done:,} of at most {planned:,} Hessian-vector products are done."
    if isinstance(missing, int) and missing > 0:
        text += f" {missing} of {missing + len(spectra)} blocks have no spectrum yet."
    return text


def condense(x: Floats, w: Floats, most: int) -> tuple[Floats, Floats]:
    """Return a measure of at most about `most` nodes, with the same mass and mean.

    Nodes in the same cells of a linear and of a logarithmic lattice, of most / 2 cells each, are merged.

    Args:
        x, w: (K,) nodes in any order, and their positive weights.
        most: number of nodes, at least 2.
    """
    order = np.argsort(x)
    x, w = x[order], w[order]
    radius = max(abs(x[0]), abs(x[-1]))
    if x[0] == x[-1] or radius == 0:
        return x[:1], w.sum(keepdims=True)
    relative = x / radius
    linear = np.floor(most / 2 * (relative - relative[0]) / (relative[-1] - relative[0]))
    logarithm = np.arcsinh(relative / SMALLEST_SHARE)
    logarithmic = np.floor(most / 2 * (logarithm - logarithm[0]) / (logarithm[-1] - logarithm[0]))
    starts = np.flatnonzero(np.diff(linear, prepend=-1) + np.diff(logarithmic, prepend=-1))
    mass = np.add.reduceat(w, starts)
    return radius * (np.add.reduceat(w * relative, starts) / mass), mass


def _comparison(spectra: SpectraData, title: str, options: dict[str, Any]) -> dict[str, Any]:
    # Intervals take n_probes + 2 more matrices each.
    confidence = CONFIDENCE if title == DEFAULT_COMPARISON else None
    matrix, mean = compare(spectra, **options, confidence=confidence)
    upper = matrix[tuple(torch.triu_indices(len(matrix), len(matrix), offset=1))].numpy()
    return {
        "title": title,
        "text": str(mean),
        "value": mean.value,
        "interval": mean.interval,
        "blocks": spectra.rows(mean.blocks),
        "order": _clustered(upper),
        "matrix": _packed(np.round(upper * 65535), "<u2"),
    }


def _clustered(distances: Floats) -> list[int]:
    """Return the order of the blocks by average linkage, with the optimal order of the leaves.

    Args:
        distances: (L (L - 1) / 2,), row by row.

    Source: Bar-Joseph, Gifford, Jaakkola 2001 (the order of the leaves).
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    order: list[int] = leaves_list(linkage(distances, "average", optimal_ordering=True)).tolist()
    return order


def _provenance(spectra: SpectraData) -> list[tuple[str, str]]:
    pairs = []
    for key, value in spectra.provenance.items():
        if key in NOT_SHOWN or value in (None, [], {}):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        text = f"{value:.6g}" if isinstance(value, float) else text
        pairs.append((key, text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + " ..."))
    return pairs


def _packed(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()
