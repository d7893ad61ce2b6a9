"""Fuzzing: damaged files must be refused by one clear error or hold what they promise; a failed write loses nothing.

python -m tests.fuzz --inputs 100000 --out fuzz.json
"""
