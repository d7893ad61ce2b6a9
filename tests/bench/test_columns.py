"""bench/accuracy/columns.py: the printed intervals contain the truth, and quadrature alone does not."""

from __future__ import annotations

import pytest
import torch

from bench.accuracy import columns
from bench.harness.known_spectra import synthetic
from blockhess.analysis.errors import bands, error_bars

BLOCKS = {name: synthetic(150)[name].sort().values for name in ("semicircle", "spikes and bulk", "power law")}
RUNS = 20
# With 95 % at most 4 of 20 miss with a probability of 0.997; each quantity has three blocks.
LEAST = 0.8


@pytest.mark.parametrize(("probes", "steps"), [(2, 10), (6, 20)])
def test_the_truth_is_inside(probes, steps):
    found = columns.measure_model(BLOCKS, probes, steps, RUNS)
    assert {"lambda_min", "lambda_max", "trace", "frobenius", "negative", "zero", "10th", "JS0 of two"} <= set(found)
    for key, row in found.items():
        assert row["coverage"] >= LEAST, (key, row)


def test_nodes_and_weights_alone_miss_it(monkeypatch):
    def nodes_only(q, block, confidence):
        low, high = q.select_blocks([block]).extremes()
        return float(low), float(high)

    def weights_only(q, block, x, confidence):
        share = bands.cdf_band(q, [block], x, confidence).value[0]
        return share, share

    monkeypatch.setattr(error_bars, "extreme_bounds", nodes_only)
    monkeypatch.setattr(bands, "share_bounds", weights_only)
    found = columns.measure_model(BLOCKS, 2, 10, RUNS)
    assert all(found[key]["coverage"] == 0 for key in ("lambda_min", "lambda_max", "negative"))


def test_the_tables_show_what_was_measured():
    row = {"coverage": 0.935, "block": "w", "width": 0.25}
    rows = [{"model": "net", "probes": p, "steps": 20, "numbers": {"trace": row}} for p in (10, 2)]
    text = columns.text({"environment": columns.describe(), "runs": 200, "rows": rows})
    lines = [line.split() for line in text.splitlines() if line.startswith("net")]
    assert lines == [["net", str(p), "x", "20", value] for value in ("93.5", "0.25") for p in (2, 10)]


def test_all_models_have_all_their_eigenvalues(monkeypatch):
    seen = {}
    monkeypatch.setattr(columns, "measure_model", lambda blocks, *_: seen.update(blocks) or {"x": {"coverage": 1.0}})
    rows = columns.measure(quick=True)["rows"]
    assert len(rows) == 8
    for name, x in seen.items():
        assert bool((x.diff() >= 0).all()) and x.dtype == torch.float64, name
