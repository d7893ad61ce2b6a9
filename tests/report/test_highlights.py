"""Highlights of the HTML page against hand-made results."""

from __future__ import annotations

import math

from blockhess.report.html.highlights import highlights
from blockhess.report.rows import block_records
from tests.helpers.spectra_cases import make_spectra


def test_highlights_follow_from_the_numbers() -> None:
    spectra = make_spectra(
        [[[-1.0, 4.0], [0.0, 0.002], [0.0, 0.0]]] * 2,
        [[[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]] * 2,
        steps=[[2, 2, 1]] * 2,
        dims=[8, 8, 8],
        notes=["", "unused", "zero within HVP error"],
        batchnorm="eval",
    )
    comparisons = [
        {"title": "linear axis", "value": 0.5, "interval": (0.25, 0.75, 0.95)},
        {"title": "signed-log axis", "value": 0.25, "interval": None},
    ]
    records = block_records(spectra)
    text = "\n".join(highlights(spectra, records, comparisons))
    assert "JS0 is 0.50 (linear axis; 0.25 ... 0.75 with 95 %), ~0.2 (signed-log axis): quote it" in text
    assert "help most" not in text
    assert records[0]["negative_lower"] > 0.01 and records[2]["negative_upper"] == 0
    share = math.floor(100 * records[0]["negative_lower"])
    assert f"1 of 3 blocks have more than 1 % negative eigenvalues, the most in block0: at least {share} %." in text
    assert "Unused blocks, on which the loss does not depend: block1." in text
    assert "are zero within the error of their Hessian-vector products: block2" in text and 'batchnorm="batch"' in text
    one = make_spectra([[[1.0, 2.0]] * 2], [[[0.5, 0.5]] * 2])
    text = "\n".join(highlights(one, block_records(one), []))
    assert (
        "With one random probe" in text
        and "Most different from the other blocks: block0, block1." in text
        and "In 2 of 2 blocks, steps and probes leave open if more than 1 % are negative." in text
    )
    assert "BatchNorm" not in text
