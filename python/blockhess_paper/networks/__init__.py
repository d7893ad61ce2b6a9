"""The paper's six networks at initialization: block spectra, Figures 3 and 4, Table 1, cost at full size."""
