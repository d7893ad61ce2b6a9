"""Benchmarks of blockhess: `python -m bench`; README.md in this folder describes them."""
