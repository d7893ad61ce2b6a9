"""The MLP with scaled layers: Figure 5 and Table 3."""
