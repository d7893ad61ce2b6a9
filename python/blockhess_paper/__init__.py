"""The experiments of the paper, one file per figure, table and theorem, each with a verdict on what the paper claims.

    structure/   sections 2.3, C.2   hessian, pair_norms, figure2 (2, 9)       block-diagonal structure of Hessians
    networks/    sections 2.3, 2.5   networks, sources, initial_spectra        the six networks, data and spectra
                                     figure3, figure4, table1                  how their blocks differ
                                     reconstructed_js, batchnorm, cost         the paper's JS0; BatchNorm; cost
    training/    sections 2.1, 2.2   loop, optimizers, saved_state             a training, resumable
                                     architectures, recipes, training_runs     what is trained, and how
                                     figure1, figure10 (10, 11)                spectra along training; AdamW against SGD
                                     races, calibration, calibrate             what predicts how far SGD falls behind
    scaled_mlp/  section 2.4         mlp, figure5, table3                      the MLP with scaled layers
    theory/      sections 3.2, 3.3   block_spectra, quadratics, figure6 (6, 7) the four quadratic cases
                                     descent, figure8                          GD, blockwise GD and Adam on them
                                     bounds, proposition1, theorems            bounds, checked at every iteration
                                     section33, table2, proposition2           numbers of the text; complexities
    models/      BERT, VGG, ViT, small networks, and a registry of all models by name
    datasets/    images and text from files of the user

results.py defines Claim and Result. Every experiment is a function `run` that returns a Result; commands.py makes it a
command and experiments.py runs it. The findings are in docs/theory.md, docs/findings.md and docs/calibration.md.

Source: Zhang et al. 2024, https://arxiv.org/abs/2402.16788.
"""
