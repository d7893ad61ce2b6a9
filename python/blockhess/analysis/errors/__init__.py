"""Errors of random probes and finite Lanczos steps."""
