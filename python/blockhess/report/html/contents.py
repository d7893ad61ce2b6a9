"""What the HTML page shows, as one JSON value.

Nodes and weights go into the page as they are (float32, nodes relative to the block's largest), and the page smooths
them itself. Where that would be too much, each block's measure is condensed: nodes that are neighbours on a linear and
on a logarithmic lattice become one at their weighted mean, so mass and trace stay exact.
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
from blockhess.analysis.errors.error_bars import resolved_sigma
from blockhess.analysis.selection import comparable_blocks, weights_only
from blockhess.report.html.highlights import findings
from blockhess.report.rows import block_records
from blockhess.results.data import SpectraData
from blockhess_ext import Quadrature

# Nodes in a page, at most; about 11 bytes each.
MOST_NODES = 360_000

# Condensed blocks keep details down to this share of their spectral radius on the logarithmic lattice.
SMALLEST_SHARE = 1e-4

# Of provenance, what is long or shown elsewhere.
NOT_SHOWN = ("partial", "hvp_error", "plan", "model", "ghosts")
LONGEST_VALUE = 300

# title -> arguments of Spectra.compare
COMPARISONS: dict[str, dict[str, Any]] = {
    "linear axis": {},
    "signed-log axis": {"axis": "asinh"},
    "divided by spectral radius": {"axis": Axis(normalize="radius")},
}

Floats = NDArray[np.float64]


def page_contents(results: Sequence[SpectraData], labels: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the page's data.

    Args:
        results: one result, or checkpoints in order.
        labels: one a result; None numbers them.

    Returns:
        JSON values, NaN and infinity among them.

    Raises:
        ValueError: no result, labels of another number, or results of other blocks.
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
    """Refuse what are no checkpoints of one model; of an unfinished run, blocks may be missing."""
    sizes = [dict(zip(spectra.names, spectra.dims)) for spectra in results]
    first = max(range(len(results)), key=lambda i: len(sizes[i]))
    for i, spectra in enumerate(results):
        found, wanted = sizes[i], sizes[first]
        others = [name for name, dim in found.items() if wanted.get(name) != dim]
        missing = [] if spectra.provenance.get("partial") else [name for name in wanted if name not in found]
        for what, names in (("other blocks than", others), ("not all blocks of", missing)):
            if names:
                raise ValueError(
                    f"report: results must be of the same blocks, as checkpoints of one model are, got {labels[i]} "
                    f"with {what} {labels[first]}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}; "
                    "write a report of each"
                )


def _result(spectra: SpectraData, label: str, most: int | None) -> dict[str, Any]:
    comparisons = [comparison for title in COMPARISONS if (comparison := _comparison(spectra, title))]
    records = block_records(spectra)
    widths, weights = resolved_sigma(spectra).tolist(), set(weights_only(spectra))
    blocks: list[dict[str, Any]] = []
    nodes, shares = [], []
    for record, x, w, width in zip(records, *(part.numpy() for part in spectra.merged), widths):
        carried = w > 0
        probes = [count for count in carried.reshape(spectra.quadrature.num_probes, -1).sum(1).tolist() if count]
        x, w = x[carried], w[carried]
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
                "radius": radius,
                "rms": radius * math.sqrt(float((w * relative**2).sum())),
                "sigma": width,
                "probes": probes,
                "known": _known_variance(spectra.quadrature, len(blocks)),
                "is_weight": record["block"] in weights,
            }
        )
    return {
        "label": label,
        "step": spectra.provenance.get("step"),
        "model": str(spectra.provenance.get("model") or "a model"),
        "summary": repr(spectra),
        "unfinished": _unfinished(spectra),
        "findings": findings(spectra, records, {c["title"]: c["value"] for c in comparisons}),
        "made": _made(spectra),
        "blocks": blocks,
        "nodes": _packed(np.concatenate(nodes), "<f4"),
        "weights": _packed(np.concatenate(shares), "<f4"),
        "comparisons": comparisons,
    }


def _known_variance(q: Quadrature, block: int) -> float:
    """Variance of v^T f(H) v in units of that of f over the eigenvalues, as probe_error.variance_of_probes."""
    return 2 / (q.dims[block] + 2) if q.distribution == "gaussian" and not q.is_exact(block) else 0.0


def _unfinished(spectra: SpectraData) -> str | None:
    """What is missing in the spectra so far of a run, as runs.status.partial gives them."""
    made = spectra.provenance
    if not made.get("partial"):
        return None
    text = "This run is not finished: the page shows what it has saved so far; probes and steps differ between blocks."
    done, planned, missing = (made.get(key) for key in ("hvps", "hvps_planned", "blocks_missing"))
    if isinstance(done, int) and isinstance(planned, int):
        text += f" {done:,} of at most {planned:,} Hessian-vector products are done."
    if isinstance(missing, int) and missing > 0:
        text += f" {missing} of {missing + len(spectra)} blocks have no spectrum yet."
    return text


def condense(x: Floats, w: Floats, most: int) -> tuple[Floats, Floats]:
    """Return a measure of about `most` nodes or fewer, with the same mass and mean.

    Nodes that share a cell of a linear lattice and one of a logarithmic lattice, of most / 2 cells each, become one.

    Args:
        x, w: (K,) nodes in any order, and their positive weights.
        most: nodes to keep, at least 2.
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


def _comparison(spectra: SpectraData, title: str) -> dict[str, Any] | None:
    options = COMPARISONS[title]
    if len(comparable_blocks(spectra, options.get("axis", "linear"))) < 2:
        return None
    matrix, js0 = compare(spectra, **options)
    upper = matrix[tuple(torch.triu_indices(len(matrix), len(matrix), offset=1))].numpy()
    return {
        "title": title,
        "text": str(js0),
        "value": js0.value,
        "blocks": spectra.rows(js0.blocks),
        "order": _clustered(upper),
        "matrix": _packed(np.round(upper * 65535), "<u2"),
    }


def _clustered(distances: Floats) -> list[int]:
    """Order of the blocks that puts similar ones side by side: leaves of average linkage, neighbours closest.

    Args:
        distances: (L (L - 1) / 2,) of the pairs, row by row.

    Source: Bar-Joseph, Gifford, Jaakkola 2001 (the order of the leaves).
    """
    from scipy.cluster.hierarchy import leaves_list, linkage

    order: list[int] = leaves_list(linkage(distances, "average", optimal_ordering=True)).tolist()
    return order


def _made(spectra: SpectraData) -> list[tuple[str, str]]:
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
