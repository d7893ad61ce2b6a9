"""Tests of blockhess, in the rooms of the sources they test."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
