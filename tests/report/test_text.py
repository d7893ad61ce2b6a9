"""Text reports of a result."""

from __future__ import annotations

import pytest

from tests.helpers.spectra_cases import hand


def test_table() -> None:
    spectra = hand(names=["w", "one", "zero"], notes=["", "tied with x", "unused"], steps=[[3, 1, 1], [2, 1, 1]])
    *lines, empty, spread = spectra.table().splitlines()
    assert not empty and spread == str(spectra.curvature_spread()) and spread.startswith("Curvature spread = ")
    assert len(lines) == 5 and lines[0].split()[:4] == ["block", "shape", "dim", "lambda_min"]
    assert "2..3" in lines[2] and lines[3].endswith("tied with x") and lines[4].endswith("unused")
    assert len({len(line) for line in lines[1:2]} | {max(map(len, lines))}) == 1  # the rule spans all columns
    assert spectra.table(["zero", "w"]).splitlines()[2].startswith("zero")
    assert "note" not in hand().table() and "spread" not in spectra.table(["zero", "w"])
    with pytest.raises(ValueError, match="no block is called 'x'"):
        spectra.table(["x"])
