"""Fuzzing of the files that are read: mutated ones must be refused by one clear error, or hold what they promise.

python -m tests.fuzz --inputs 100000 --out fuzz.json
"""
