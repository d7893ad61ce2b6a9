"""bench/accuracy/axes.py: measured, written and shown again."""

from __future__ import annotations

from bench.accuracy import axes


def test_a_loaded_result_prints_the_same_tables(tmp_path, monkeypatch, capsys):
    kept, tables = tmp_path / "axes.json", tmp_path / "axes.txt"
    monkeypatch.setattr("sys.argv", ["axes", "--quick", "--json", str(kept), "--text", str(tables)])
    axes.main()
    told = capsys.readouterr().out
    assert tables.read_text() == told and told.count("\n") > len(axes.AXES) * len(axes.NAMES)
    monkeypatch.setattr(axes, "measure", None)  # nothing is measured again
    monkeypatch.setattr("sys.argv", ["axes", "--show", str(kept)])
    axes.main()
    assert capsys.readouterr().out == told
