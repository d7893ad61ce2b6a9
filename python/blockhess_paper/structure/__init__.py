"""Block-diagonal structure of Hessians: Figures 2 and 9."""
