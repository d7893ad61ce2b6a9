"""Statistics, error bars and comparisons of results, as functions of SpectraData."""
