"""Data frames hold the numbers of the result."""

from __future__ import annotations

import numpy as np
import pytest

from blockhess.integrations import pandas
from tests.helpers.spectra_cases import random_spectra


def test_frames() -> None:
    pytest.importorskip("pandas")
    spectra = random_spectra()
    blocks = pandas.block_dataframe(spectra)
    assert list(blocks.index) == list(spectra.names) and list(blocks["dim"]) == list(spectra.dims)
    assert blocks.loc["block2", "lambda_max"] == spectra["block2"].lambda_max
    assert np.array_equal(blocks["trace_lower"], spectra.trace_interval()[0])
    pairs = pandas.pair_dataframe(spectra, axis="asinh", kind="divergence")
    assert list(pairs.columns) == ["block_a", "block_b", "divergence"] and len(pairs) == 6
    row = pairs[(pairs.block_a == "block1") & (pairs.block_b == "block3")]
    assert row["divergence"].item() == float(spectra.js_matrix("divergence", axis="asinh")[1, 3])
