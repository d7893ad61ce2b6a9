"""bench/harness/rows.py: medians of ratios, and verdicts on targets."""

from __future__ import annotations

from bench.harness.rows import Row, Target, verdict
from bench.harness.timing import Entry


def test_a_row_has_the_median_of_the_ratios_of_its_rounds():
    entries = {
        "blockhess": Entry(error=1e-7, seconds=[1.0, 2.0, 4.0]),
        "slow": Entry(error=0.0, seconds=[3.0, 10.0, 8.0]),
        "peer": Entry("absent (no)"),
    }
    row = Row.of(entries)
    assert row.measured == {"times faster than slow": 3.0} and row.error == 1e-7
    assert row.times["blockhess"]["median_ms"] == 2000 and row.times["peer"] == {
        "failure": "absent (no)",
        "error": None,
    }


def test_verdicts_on_targets():
    target = Target(">= 2 x peer", "times faster than peer", 2.0, True)
    row = {"measured": {"times faster than peer": 1.9}, "times": {}}
    assert verdict(target, row) == ("1.9", "missed")
    assert verdict(target, {"measured": {"times faster than peer": 2.0}}) == ("2", "met")
    absent = {"measured": {}, "times": {"peer": {"failure": "absent (no module)"}}}
    assert verdict(target, absent) == ("-", "not measured: absent (no module)")
    assert verdict(target, {"skipped": "takes 9 GiB"}) == ("-", "skipped: takes 9 GiB")
    assert verdict(target, {"failure": "no"}) == ("-", "failed")
    assert verdict(Target("", "share of x", 0.8, True), {"measured": {"share of x": 0.812}})[0] == "81.2 %"
    bounded = {"measured": {"times faster than peer": 1.9, "times faster than peer, at triad bandwidth": 1.95}}
    assert verdict(target, bounded) == ("1.9 (at triad bandwidth 1.95)", "missed")
