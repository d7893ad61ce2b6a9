"""_text.py: tables and numbers."""

from __future__ import annotations

import math

import pytest

from blockhess._text import format_table, number, plural


def test_format_table() -> None:
    table = format_table(["block", "dim", "empty"], [["w", "12", ""], ["layer.bias", "4", ""]])
    assert table == "block       dim\n----------  ---\nw            12\nlayer.bias    4"
    assert format_table(["a", "b"], []) == "a  b\n-  -"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (math.nan, "-"), (math.inf, "inf"), (-1.2345e-7, "-1.23e-07"), (12345.0, "1.23e+04")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_plural() -> None:
    assert [plural(n, "block") for n in (0, 1, 2, 1000)] == ["0 blocks", "1 block", "2 blocks", "1,000 blocks"]
