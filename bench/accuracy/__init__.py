"""Errors of densities, coverage of error bars, and adaptive stopping, on known spectra."""
