"""SpectraData: arguments and provenance."""

from __future__ import annotations

import pytest
import torch

from blockhess.spectra import Spectra
from tests.helpers.spectra_cases import random_spectra


def test_refuses_blocks_that_do_not_fit() -> None:
    spectra = random_spectra()
    with pytest.raises(ValueError, match=r"Spectra: blocks must have dims \(12, 12, 12, 12\), got \(12, 12, 12\)"):
        Spectra(spectra.blocks[:3], spectra.quadrature, {})
    with pytest.raises(ValueError, match="Spectra: blocks must have different names, got block0 more than once"):
        Spectra(spectra.blocks[:1] * 4, spectra.quadrature, {})
    with pytest.raises(TypeError, match="Spectra: provenance must hold JSON values only"):
        Spectra(spectra.blocks, spectra.quadrature, {"model": torch.nn.Linear(1, 1)})


def test_provenance_is_a_copy() -> None:
    frozen = ["a"]
    spectra = random_spectra(frozen=frozen)
    frozen.append("b")
    assert spectra.provenance == {"frozen": ["a"]}
