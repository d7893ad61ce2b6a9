"""Runs that are killed, or whose disk fails, at random moments, and resumed: the same bits as undisturbed ones.

`python -m tests.crash` is the long version; tests/crash/test_crash.py runs a short one.
"""
