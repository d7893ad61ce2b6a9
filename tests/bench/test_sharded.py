"""The kept result of products of sharded models is what its text says, and a slower one misses the targets."""

from __future__ import annotations

import json

import pytest

from bench.end_to_end import sharded
from tests import ROOT

RESULT = ROOT / "bench" / "results" / "sharded_cpu.json"


def test_the_text_is_that_of_the_result() -> None:
    result = json.loads(RESULT.read_text())
    text = sharded.text(result)
    assert RESULT.with_suffix(".txt").read_text() == text + "\n"
    assert "-dirty" not in result["environment"]["commit"]
    assert min(result["ranks"][0]["dims"]) >= 10**6


@pytest.mark.parametrize(
    ("part", "quantity"), [("product", "(product - gather) / gradient"), ("run", "share of Lanczos and gathers")]
)
def test_targets_are_judged(part: str, quantity: str) -> None:
    result = json.loads(RESULT.read_text())
    before = sharded.measured(result, "processor")[quantity]
    for rank in result["ranks"]:
        for row in rank["rows"]:
            row[part] = {clock: 2 * seconds for clock, seconds in row[part].items()}
    after = sharded.measured(result, "processor")[quantity]
    assert all(slow > fast + 0.4 for slow, fast in zip(after, before))
    (line,) = (line for line in sharded.text(result).splitlines() if line.startswith(quantity))
    assert line.endswith("missed")
