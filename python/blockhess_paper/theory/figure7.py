"""Figure 7: eigenvalues of the four blocks of case 2, drawn from measured spectra of a CNN; as Figure 6 for case 1."""

from __future__ import annotations

from blockhess_paper.results import Result
from blockhess_paper.theory.figure6 import histograms


def run(*, seed: int = 0, quick: bool = False) -> Result:
    """Draw case 2 and say how homogeneous its blocks are. Args: see figure6.run."""
    return histograms(2, seed=seed, num_trials=2 if quick else 20)
