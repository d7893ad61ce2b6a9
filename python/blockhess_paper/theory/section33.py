"""The numbers in the text of section 3.3: r, preconditioned condition numbers, and kappa over max kappa_l.

    r = max_l (C_{l,2} / C_{l,1})^2,    kappa(D^{-1} H_l) / kappa_l,  D = diag |H w^0|,    kappa / max_l kappa_l

kappa(D^{-1} H_l) has no finite expectation over random initial points: it grows like 1 / |g| with the smallest gradient
entry g, whose density at 0 is positive, so E 1/|g| is infinite and means over 1,000 trials do not settle. Medians and
quantiles are well defined. The range of the means of many batches of 1,000 trials shows what a single batch, such as
the paper's, may give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockhess._text import format_table, number
from blockhess_paper.results import Claim, Result, quantiles, verdict
from blockhess_paper.theory.quadratics import CASE_3, TITLES, Quadratics, case, make_quadratics
from blockhess_paper.theory.theorems import constants

# The paper's numbers for the three blocks of case 3, "averaged over 1000 trials".
PAPER_RATIOS = (3.9, 14.1, 4.2)

BATCH = 1000
SHARES = (0.1, 0.5, 0.9)

# The paper's kappa / max kappa_l.
PAPER_GAPS = {1: 20.0, 3: 2000.0}


def preconditioned_ratio(problems: Quadratics) -> Tensor:
    """Return kappa(D^{-1} H_l) / kappa_l from eigenvalues, (n_trials, L).

    D^{-1} H_l has the eigenvalues of the symmetric D^{-1/2} H_l D^{-1/2}.

    Example:
        >>> preconditioned_ratio(case(3, num_trials=4)).shape
        torch.Size([4, 3])
    """
    root = (problems.hessian @ problems.start[..., None]).abs().sqrt()
    eigenvalues = torch.linalg.eigvalsh(problems.hessian / (root * root.mT))
    ratio: Tensor = eigenvalues[..., -1] / eigenvalues[..., 0] / problems.block_kappa
    return ratio


def run(*, seed: int = 0, quick: bool = False) -> Result:
    """Compute r and the preconditioned condition numbers of case 3, and kappa / max kappa_l of all cases.

    Args:
        seed: seed of the trials.
        quick: fewer trials.
    """
    batches, batch = (4, 50) if quick else (100, BATCH)
    trials = batches * batch
    found: dict[str, dict[str, Any]] = {}
    rows, plausible = [], {}
    for rotation in ("orthogonal", "gaussian"):
        problems = make_quadratics(CASE_3, num_trials=trials, seed=seed, rotation=rotation)
        known = constants(problems)
        share = float((known.r <= 100).double().mean())
        per_block = ((known.c2 / known.c1) ** 2 <= 100).double().mean(0).tolist()
        ratios = preconditioned_ratio(problems)
        means = ratios.view(batches, batch, 3).mean(1)  # one per batch and block
        for block, paper in enumerate(PAPER_RATIOS):
            low, high = means[:, block].min().item(), means[:, block].max().item()
            plausible[rotation, block] = low <= paper <= high
            rows.append(
                [
                    rotation,
                    f"{block + 1}",
                    f"{paper:g}",
                    *(f"{value:.3g}" for value in quantiles(ratios[:, block], SHARES)),
                    f"{low:.3g} .. {high:.3g}",
                ]
            )
        found[rotation] = {
            "P(r <= 100)": share,
            "P(r <= 100) per block": per_block,
            "r quantiles": quantiles(known.r, SHARES),
            "ratio quantiles": [quantiles(ratios[:, block], SHARES) for block in range(3)],
            "means of batches, quantiles": [quantiles(means[:, block], (0.0, *SHARES, 1.0)) for block in range(3)],
        }
    gaps = {
        n: quantiles((p := case(n, num_trials=4 if quick else 200, seed=seed)).kappa / p.block_kappa.amax(1), SHARES)
        for n in TITLES
    }
    orthogonal = found["orthogonal"]
    share, literal = orthogonal["P(r <= 100)"], found["gaussian"]["P(r <= 100)"]
    fits = {rotation: [block + 1 for block in range(3) if plausible[rotation, block]] for rotation in found}
    claims = (
        Claim(
            "Section 3.3: in case 3, r <= 100 with probability >= 2/3.",
            f"probability {share:.3f} over {trials:,} trials with orthogonal Q (10%, 50%, 90% quantiles of r: "
            f"{', '.join(f'{value:.3g}' for value in orthogonal['r quantiles'])}), {literal:.3f} with Gaussian Q. For "
            f"one block alone: {', '.join(f'{value:.2f}' for value in orthogonal['P(r <= 100) per block'])}.",
            verdict(share >= 2 / 3),
        ),
        Claim(
            "Section 3.3: kappa(D^{-1} H_l) is 3.9, 14.1, 4.2 times kappa_l on average over 1000 trials.",
            f"with orthogonal Q, {batches} batches of {batch} trials have means that include the paper's in blocks "
            f"{fits['orthogonal'] or 'none'}; with Gaussian Q (the paper's words, H_l then has another spectrum) in "
            f"blocks {fits['gaussian'] or 'none'}. The expectation is infinite, so any mean is an accident of its "
            f"trials; medians with orthogonal Q: {', '.join(f'{q[1]:.2g}' for q in orthogonal['ratio quantiles'])}.",
            verdict(len(fits["orthogonal"]) == 3, len(fits["orthogonal"]) + len(fits["gaussian"]) > 0),
        ),
        *(
            Claim(
                f"Section 3.3: in case {n}, max kappa_l is about {paper:g} times smaller than kappa.",
                f"{gaps[n][1]:.3g} times (median; 10% and 90% quantiles {gaps[n][0]:.3g}, {gaps[n][2]:.3g})"
                + ("; block {1, 2, 3} has condition number 3." if n == 3 else " with the stand-in spectra."),
                verdict(0.5 <= gaps[n][1] / paper <= 2, gaps[n][1] >= 10),
            )
            for n, paper in PAPER_GAPS.items()
        ),
    )
    header = ["Q", "block", "paper", "10%", "median", "90%", f"means of {batch} trials"]
    gap_rows = [[TITLES[n], *(number(value) for value in values)] for n, values in gaps.items()]
    return Result(
        "section33",
        "Section 3.3: the constant r and condition numbers",
        {"seed": seed, "batches": batches, "trials_per_batch": batch},
        claims,
        "kappa(D^{-1} H_l) / kappa_l in case 3\n"
        + format_table(header, rows)
        + "\n\nkappa / max kappa_l\n"
        + format_table(["case", "10%", "median", "90%"], gap_rows),
        {**found, "kappa / max kappa_l quantiles": gaps},
    )
