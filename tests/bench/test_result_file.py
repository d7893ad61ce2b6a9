"""bench/harness/result_file.py: files are checked and compared."""

from __future__ import annotations

import sys

import pytest

from bench import __main__ as command
from bench.harness import result_file
from bench.harness.timing import Entry
from tests.bench.cases import result_of, row_of


def test_comparison_shows_ratios_and_missing_rows():
    old = result_of({"a": row_of(blockhess=2.0, peer=3.0), "gone": row_of(blockhess=1.0)})
    new = result_of({"a": row_of(blockhess=5.0, peer=3.0), "new": row_of(blockhess=1.0)})
    new["rows"]["a"]["times"]["peer"] = Entry("absent (no)").summary()
    new["environment"] = {**new["environment"], "threads": 2}
    lines = result_file.comparison(old, new).splitlines()
    assert "| a | blockhess | 2 | 5 | 2.50 | slower |" in lines
    assert "| a | peer | | | | old: timed; new: absent (no) |" in lines
    assert "| gone | blockhess | | | | old: timed; new: not measured |" in lines
    assert lines[-1] == "Different threads: 1, now 2."
    assert "slower" not in result_file.comparison(old, old)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"must be a JSON file of `python -m bench`, got Expecting"),
        ("[]", r"must have the schema 'blockhess-bench/1', got None"),
        ('{"schema": "blockhess-bench/0"}', r"must have the schema 'blockhess-bench/1', got 'blockhess-bench/0'"),
        (None, r"must be a JSON file of `python -m bench`, got .*No such file"),
    ],
)
def test_invalid_files(content, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        result_file.read(path)
    monkeypatch.setattr(sys, "argv", ["bench", "--compare", str(path)])
    assert command.main() == 2
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1
