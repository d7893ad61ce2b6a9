"""bench/gpu, as far as it runs without a GPU."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from bench.gpu import moments, networks, report, rows
from bench.harness.machine import Machine
from bench.harness.timing import CPU, WrongResult
from blockhess_ext import ops
from tests import ROOT

TINY = Machine(CPU, "tiny", {})


def measure(group: str, folder: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    arguments = ["rows", group, "--out", str(folder), "--device", "cpu", "--size", "tiny"]
    monkeypatch.setattr(sys, "argv", arguments)
    return rows.main(), json.loads((folder / f"{group}.json").read_text())["rows"]


def test_a_row_with_a_wrong_result_is_marked_and_keeps_its_times(tmp_path, monkeypatch):
    right = ops.gaussian_density
    monkeypatch.setattr(ops, "gaussian_density", lambda *arguments: right(*arguments) * (1 + 1e-9))
    code, found = measure("ops", tmp_path, monkeypatch)
    failures = [row["failure"] for row in found.values() if "failure" in row]
    assert code == 1 and len(failures) == 1 and "gaussian_density differs by 1e-09" in failures[0]
    name, row = next((name, row) for name, row in found.items() if "failure" in row)
    assert row["times"]["gaussian_density"]["median_ms"] > 0
    made = results() | {"rows": {name: row}}
    assert report.targets(made).count("| failed |") == 2 and "**failed**: gaussian_density differs" in report.report(
        made
    )


def test_wrong_moments_are_found(tmp_path, monkeypatch):
    exact = moments.expected(TINY, networks.nano(TINY))
    name = list(exact)[3]
    monkeypatch.setattr(moments, "expected", lambda *_: exact | {name: [1.5 * x for x in exact["0.tok.weight"]]})
    code, found = measure("nano", tmp_path, monkeypatch)
    assert code == 1 and all("moments differs by" in row["failure"] for row in found.values())


def test_moments_of_other_weights_are_refused(monkeypatch):
    machine = Machine(CPU, "full", {})
    network = networks.nano(machine)
    stored = moments.expected(machine, network)
    assert len(stored) == 38 == network.n_blocks
    network.model[0].tok.weight.data[0] += 1.0
    with pytest.raises(WrongResult, match="a sum over weights or data"):
        moments.expected(machine, network)


def results(size: str = "full") -> dict[str, Any]:
    """Results of a GPU that meets all targets exactly."""
    made = {
        name: {"measured": {t.quantity: t.value for t in targets}, "times": {}, "error": 0.0, "notes": []}
        for name, (_, targets) in rows.ROWS.items()
    }
    return {"size": size, "environment": {"device": "GPU"}, "limits": {"copy": 3e12}, "rows": made, "steps": {}}


def test_targets_are_judged_at_full_size():
    found = results()
    lines = report.targets(found).splitlines()[2:]
    # A quantity with a lower and an upper bound has the value of the lower one.
    assert all(line.endswith("| met |") for line in lines)
    next(iter(found["rows"].values()))["measured"]["share of copy bandwidth"] = 0.89
    assert report.targets(found).splitlines()[2].endswith("| 89.0 % | missed |")
    assert "1 missed" in report.summary(found) and "1 missed" in report.report(found)
    assert "| met |" not in report.targets(results("quick"))


def test_the_files_of_the_documentation(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(results()))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "results.json"), "--name", "h200"])
    report.main()
    assert "0 missed" in (tmp_path / "h200.md").read_text() and "h200.md" in (tmp_path / "gpu.md").read_text()
    assert json.loads((tmp_path / "h200.json").read_text()) == results()
    (tmp_path / "results.json").write_text(json.dumps(results("tiny")))
    with pytest.raises(SystemExit):
        report.main()


def test_the_committed_table_is_up_to_date():
    assert (ROOT / "bench/results/gpu.md").read_text() == report.of_documentation(None)
