"""`python -m bench`: options, exit codes, and messages; no time is judged."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from bench import __main__ as command
from bench.harness import result_file
from bench.harness.command import write_json
from bench.harness.machine import Machine, TooSmall
from bench.harness.rows import Row
from bench.ops import rows
from tests.bench.cases import TINY, result_of, row_of


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Return a function that runs the command in this process; threads and environment are restored."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    threads = torch.get_num_threads()

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        return command.main()

    yield call
    torch.set_num_threads(threads)


def test_a_quick_row_is_measured_written_shown_and_compared(run, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert run("--quick", "--only", "m = 300", "--json", str(path)) == 0
    shown = capsys.readouterr().out
    data = result_file.read(path)
    assert list(data["rows"]) == ["`tridiag_quadrature`, 260 problems, m = 300"]
    assert set(data["limits"]) == {"copy", "triad", "read", "gemm"}
    assert {"cpu", "commit", "torch", "python"} <= set(data["environment"]) and "curvlinops" in data["peers"]
    assert len(next(iter(data["rows"].values()))["load"]) == 2
    assert run("--show", str(path), "--compare", str(path)) == 0
    again = capsys.readouterr().out
    assert again.startswith(shown.rstrip()) and "| 1.00 |" in again


def test_a_wrong_rival_is_reported_and_no_failure(run, monkeypatch, capsys, tmp_path):
    right = rows.quadrature_by_eigh
    calls = []

    def wrong(alpha, beta):
        calls.append(1)
        nodes, weights = right(alpha, beta)
        return nodes + (0.1 if len(calls) > 1 else 0.0), weights  # the first call is the reference

    monkeypatch.setattr(rows, "quadrature_by_eigh", wrong)
    assert run("--quick", "--only", "m = 300", "--json", str(tmp_path / "x.json")) == 0
    output = capsys.readouterr()
    assert "| torch.linalg.eigh | not timed: wrong by" in output.out
    assert "m = 300: not timed: torch.linalg.eigh, wrong by 0.0" in output.err.splitlines()[-1]
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"].values()
    assert "median_ms" in row["times"]["LAPACK sterf"] and "median_ms" not in row["times"]["torch.linalg.eigh"]


def test_our_own_wrong_result_fails_the_row(run, monkeypatch, capsys):
    right = rows.ops.gaussian_density
    monkeypatch.setattr(rows, "compile_seconds", lambda machine: 0.01)
    monkeypatch.setattr(rows.ops, "gaussian_density", lambda *arguments: right(*arguments) * (1 + 1e-9))
    assert run("--quick", "--only", "gaussian_density") == 1
    output = capsys.readouterr()
    assert "blockhess: wrong by 1e-09" in output.out
    assert output.err.splitlines()[-1].startswith("bench: `gaussian_density`") and "failed: WrongResult" in output.err


def test_a_row_is_skipped_if_memory_is_short(run, monkeypatch, capsys):
    def huge(machine: Machine) -> Row:
        machine.require(2.0**60)
        return Row(0.0)

    monkeypatch.setitem(command.ROWS, "too large", (huge, []))
    assert run("--quick", "--only", "too large") == 0
    assert "| too large | skipped: takes 1.07e+09 GiB of memory, " in capsys.readouterr().out
    with pytest.raises(TooSmall):
        TINY.require(2.0**60)


def test_invalid_arguments_are_reported_before_measuring(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "run", None)  # would be called
    path = tmp_path / "kept.json"
    write_json(result_of({"a row": row_of(blockhess=1.0)}), path)
    for arguments, message in (
        (
            ["--only", "no such row"],
            "bench: --only must be part of a row's name, got 'no such row'; rows: `lan",
        ),
        (
            ["--show", str(path), "--only", "another"],
            "bench: --only must be part of a row's name, got 'another'; rows: a row",
        ),
        (
            ["--quick", "--compare", str(path)],
            "bench: both results must be measured at one size, got 'full' and 'quick'",
        ),
        (["--json", str(tmp_path / "no" / "x")], "bench: --json must be a writable file, got [Errno 2]"),
    ):
        assert run(*arguments) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith(message) and len(output.err.splitlines()) == 1
    for arguments in (
        ["--threads", "0"],
        ["--threads", "2", "--clock", "cpu"],
        ["--show", str(path), "--json", str(path)],
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2


def test_only_selects_rows_to_show_and_compare(run, capsys, tmp_path):
    path = tmp_path / "kept.json"
    write_json(result_of({"one row": row_of(blockhess=1.0), "another": row_of(blockhess=2.0)}), path)
    assert run("--show", str(path), "--compare", str(path), "--only", "one") == 0
    shown = capsys.readouterr().out
    assert "| one row | blockhess | 1 | 1 | 1.00 |  |" in shown and "another" not in shown


def test_threads(run, monkeypatch, tmp_path):
    monkeypatch.setitem(command.ROWS, "threads in use", (lambda machine: Row(0.0, {"n": torch.get_num_threads()}), []))
    assert run("--quick", "--only", "threads in use", "--threads", "2", "--json", str(tmp_path / "x.json")) == 0
    data = result_file.read(tmp_path / "x.json")
    assert data["environment"]["threads"] == 2 and data["rows"]["threads in use"]["measured"] == {"n": 2}
