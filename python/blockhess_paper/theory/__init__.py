"""The quadratic models of section 3: Figures 6 to 8, Table 2, Propositions 1 and 2, Theorems 1 and 2."""
