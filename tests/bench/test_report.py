"""bench/harness/report.py: tables show every rival, and whether other programs ran."""

from __future__ import annotations

from bench.harness import report
from bench.harness.timing import Entry
from bench.ops import rows
from tests.bench.cases import result_of, row_of


def test_tables_show_all_rivals():
    name = next(iter(rows.ROWS))
    row = row_of(blockhess=1.0, **{"PyTorch by block": 4.0})
    row["times"]["torch._foreach"] = Entry("absent (no)").summary()
    other = next(name for name in report.ROWS if name != name[0] and "huge" in name)
    skipped = {"skipped": "takes 9 GiB of memory, 1 GiB are free", "load": [1.0, 1.0]}
    text = report.report(result_of({name: row, other: skipped}))
    assert "| >= 3.5 x PyTorch by block | 4 | met |" in text
    assert "|  | torch._foreach | not timed: absent (no) | | | | - |" in text
    assert f"| {other} | skipped: takes 9 GiB of memory, 1 GiB are free |" in text
    assert "|  | PyTorch by block | 4 (4 - 4) | 4.00 |" in text
    assert "met" not in report.report(result_of({name: row}, "quick")).replace("not judged", "")


def test_the_report_says_whether_other_programs_ran():
    row = row_of(blockhess=1.0)
    assert report.load(result_of({"a": row})).startswith("load average 1.0 ... 2.0: other programs were running")
    row["load"] = [0.9, 1.2]
    assert report.load(result_of({"a": row})) == "load average 0.9 ... 1.2"
    assert report.report(result_of({"a": row})).endswith("\n\nLoad average 0.9 ... 1.2.")
