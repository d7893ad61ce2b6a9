"""The paper's networks, quadratic models, MLP and theory, checked: one file per figure, table and theorem.

    section 2.3   hessian.py, structure.py, figure2.py      block-diagonal structure (Figures 2 and 9), also of models
                                                            too large for an exact Hessian (left open in appendix C.2)
                  networks.py, initial_spectra.py           the six networks and their spectra at initialisation
                  figure3.py, figure4.py, table1.py         how their blocks differ
                  sources.py, recipes.py, plan.py           at the paper's size: data, trainings, what a job takes
    section 2.2   figure1.py                                spectra along training
    section 2.1   architectures.py, training_runs.py        small networks, trained at their best rates
                  figure10.py, figure11.py, calibrate.py    AdamW against SGD; whether JS0 tells which is needed
    section 2.4   mlp.py, figure5.py, table3.py             the MLP with scaled layers
    section 3.2   block_spectra.py, quadratics.py           the four cases
                  figure6.py, figure7.py                    their spectra
                  optimizers.py, figure8.py                 GD, blockwise GD and Adam on them
    section 3.3   bounds.py, proposition1.py, theorems.py   Proposition 1, Theorems 1 and 2, at every iteration
                  section33.py, table2.py                   the numbers of the text, complexities
                  proposition2.py                           the limit cycle of Adam

Each experiment is a function `run` that returns a Result (results.py): claims with verdicts, numbers, a picture.
commands.py makes them commands, runner.py runs them. What holds: docs/theory.md, docs/findings.md.

Source: Zhang et al. 2024, https://arxiv.org/abs/2402.16788.
"""
