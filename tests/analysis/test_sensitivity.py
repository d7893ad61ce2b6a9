"""sensitivity.py: the table against single calls."""

from __future__ import annotations

import math

import pytest

from blockhess.analysis.axes import Axis
from tests.helpers.spectra_cases import make_spectra, random_spectra


def test_sensitivity_is_the_table_of_single_calls() -> None:
    result = random_spectra(batchnorm="eval", dims=[40] * 4)
    table = result.sensitivity(sigmas=[0.5, 1.0], normalizations=["none", "radius", 3], base=math.e)
    assert len(table.rows) == 2 * 2 * 3
    for row in table.rows:
        default = result.js0(base=math.e, axis=Axis(row.axis.name, row.axis.normalize))
        axis = Axis(row.axis.name, row.axis.normalize, default.scale)
        expected = result.js0(base=math.e, sigma=row.relative_sigma * default.sigma, axis=axis)
        assert row.js0 == expected and row.sigma == row.js0.sigma
    text = str(table)
    low, high = table.range()
    assert f"from {low:.2g} to {high:.2g}" in text and "base 2.71828" in text and "BatchNorm in eval mode" in text
    assert text.count("asinh") == 6 and "eigenvalue 3" in text and low < high


def test_sensitivity_of_blocks_that_cannot_be_normalized() -> None:
    result = make_spectra([[[-1.0, 1.0], [-3.0, 2.0], [0.0, 4.0]]], [[[0.5, 0.5]] * 3], dims=[2, 2, 2])
    table = result.sensitivity(sigmas=[1.0], axes=["linear"])
    by_kind = {row.axis.normalize: row for row in table.rows}
    assert by_kind["none"].js0 is not None and by_kind["trace"].js0 is None and by_kind[10].js0 is None
    assert " - " in str(table)
    with pytest.raises(ValueError, match="cannot be divided by the block's trace"):
        result.sensitivity(blocks=["block0", "block1"], normalizations=["trace"])
    with pytest.raises(ValueError, match="name must be one of"):
        result.sensitivity(axes=["log"])
