"""What all benchmarks share: timing, machine limits, result files, tables, and operators with known spectra."""
