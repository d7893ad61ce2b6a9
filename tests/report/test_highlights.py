"""Highlights of the HTML page against hand-made results."""

from __future__ import annotations

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
    text = "\n".join(highlights(spectra, block_records(spectra), {"linear axis": 0.5, "signed-log axis": 0.25}))
    assert "JS0 is 0.5 (linear axis), 0.25 (signed-log axis)" in text
    assert "1 of 3 blocks have more than 1 % negative eigenvalues, the most in block0: 25 %" in text
    assert "Unused blocks, on which the loss does not depend: block1." in text
    assert "are zero within the error of their Hessian-vector products: block2" in text and 'batchnorm="batch"' in text
    one = make_spectra([[[1.0, 2.0]] * 2], [[[0.5, 0.5]] * 2])
    text = "\n".join(highlights(one, block_records(one), {}))
    assert (
        "With one random probe" in text
        and "Most different from the other blocks: block0, block1." in text
        and "No block has more than 1 % negative" in text
    )
    assert "BatchNorm" not in text
