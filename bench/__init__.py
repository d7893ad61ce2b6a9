"""Benchmarks of blockhess: `python -m bench`; see README.md beside this file."""
