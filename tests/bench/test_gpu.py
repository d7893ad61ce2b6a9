"""bench/ops/gpu.py, as far as it runs without a GPU."""

from __future__ import annotations

import json

from bench.ops import gpu
from blockhess_ext import ops
from tests import ROOT


def test_a_wrong_result_is_not_timed(tmp_path, monkeypatch):
    right = ops.gaussian_density
    monkeypatch.setattr(ops, "gaussian_density", lambda *arguments: right(*arguments) * (1 + 1e-9))
    monkeypatch.setattr("sys.argv", ["gpu", "--cpu", "--out", str(tmp_path)])
    assert gpu.main() == 1
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    failures = [row["failure"] for row in rows.values() if "failure" in row]
    assert len(failures) == 1 and "gaussian_density differs by 1e-09" in failures[0]
    assert "times" not in next(row for row in rows.values() if "failure" in row)


def test_targets_are_judged_at_full_size():
    rows = {
        name: {"measured": {t.quantity: t.value for t in targets}, "times": {}, "error": 0.0}
        for name, (_, targets) in gpu.ROWS.items()
    }
    results = {"size": "full", "environment": {"device": "a GPU"}, "copy_bandwidth": 3e12, "rows": rows}
    assert sum(line.endswith("| met |") for line in gpu.report(results).splitlines()) == 13
    next(iter(rows.values()))["measured"]["share of copy bandwidth"] = 0.89
    assert gpu.table(results).splitlines()[2].endswith("| 89.0 % | missed |")


def test_the_committed_table_is_up_to_date(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--unproven"])
    assert gpu.main() == 0
    assert (ROOT / "bench/results/targets.md").read_text() == capsys.readouterr().out
