"""Time of whole jobs: spectra of a network, distributed runs, checkpoints, imports and reports."""
