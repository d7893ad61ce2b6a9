"""The paper's quadratic models, MLP, exact Hessians and theory, checked: one file per figure, table and theorem.

    section 2.3   hessian.py, structure.py, figure2.py       block-diagonal structure (Figures 2 and 9)
    section 2.4   mlp.py, figure5.py, table3.py              the MLP with scaled layers (Figure 5, Table 3)
    section 3.2   block_spectra.py, quadratics.py            the four cases
                  optimizers.py, figure6.py, figure8.py      Figures 6, 7, 8
    section 3.3   bounds.py, proposition1.py, theorems.py    Proposition 1, Theorems 1 and 2, the claims of the text
                  proposition2.py, table2.py                 Proposition 2, Table 2
    appendix C.2  structure.py                               block structure of models too large for an exact Hessian

Zhang et al. 2024, https://arxiv.org/abs/2402.16788; `blockhess paper --help` runs them. What holds: docs/theory.md.
"""
