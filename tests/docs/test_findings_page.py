"""docs/findings.md is what docs/results says."""

from __future__ import annotations

import re

import pytest

from blockhess_paper.commands import NETWORK_EXPERIMENTS
from blockhess_paper.networks.batchnorm import SEEDS
from docs._generate import findings_page
from docs._generate.findings_page import MEASURES


@pytest.mark.slow
def test_measured_parts_are_up_to_date() -> None:
    text = findings_page.PAGE.read_text()
    assert findings_page.page(text) == text


def test_results_are_of_full_runs() -> None:
    for name in NETWORK_EXPERIMENTS:
        content = findings_page.result(name)
        assert content["quick"] is False and content["environment"]["commit"] != "unknown"


def test_the_default_measures_order_the_networks_in_every_mode() -> None:
    """As heading, result and conclusions of section 1, and README say."""
    assert len(findings_page.gpt_is_above()) == len(SEEDS) * (len(findings_page.NETWORKS) - 1)


@pytest.mark.slow
def test_typed_words_of_section_1_follow_from_the_numbers() -> None:
    words = findings_page.against_gpt()
    for seed in SEEDS:
        in_eval_mode, in_batch_mode = words["resnet18_eval", seed], words["resnet18_batch", seed]
        # "more homogeneous in eval mode in most measures, and with batch statistics in none; ... the order is reversed"
        assert in_eval_mode.count("less") > len(MEASURES) / 2 and "more" not in in_eval_mode
        assert "less" not in in_batch_mode[:-1] and in_batch_mode[-1] == "less" and "more" in in_batch_mode
    assert any(set(both) == {"more"} for both in zip(*(words["resnet18_batch", seed] for seed in SEEDS)))
    # "those of a tenth or less", "those near a half"
    shares = {m: [findings_page.frozen_share(m, seed) for seed in SEEDS] for m in MEASURES}
    assert any(max(values) <= 0.1 for values in shares.values())
    assert any(abs(value - 0.5) < 0.1 for values in shares.values() for value in values)
    text = findings_page.PAGE.read_text()
    assert "one seed there" not in text and f"{len(SEEDS)} seeds there" in text


def test_typed_words_about_the_small_relatives_follow_from_the_numbers() -> None:
    by_range, by_sigma, by_radius, by_tenth, on_asinh = findings_page.small_summary().values()
    for factor, _, _ in (by_range, by_sigma, by_radius):
        assert 0.9 < factor < 1.1
    assert on_asinh[0] > 1.5
    assert by_tenth[0] < 0.9 and by_range[1].count(True) < 3
    assert all(0.99 < ratio < 1.25 for ratio in by_sigma[2])
    assert max(by_tenth[2]) < 1 and max(on_asinh[2]) < 1


def test_typed_words_of_section_2_follow_from_the_numbers() -> None:
    judged = findings_page.result("table1")["numbers"]["judged"]
    ordered = {policy: [key for key, found in judged[policy].items() if found[2] > 0.9] for policy in ("eval", "batch")}
    assert ordered["eval"] and all("normalization none" in key and "%" not in key for key in ordered["eval"])
    assert not ordered["batch"]
    closest = [found[0] for found in [*judged["eval"].values(), *judged["batch"].values(),
               *findings_page.result("table3")["numbers"]["judged"].values()]]  # fmt: skip
    assert min(closest) > 2


def test_what_is_missed_is_said() -> None:
    works = [findings_page.JobCost(**{k: v for k, v in job.items() if k in findings_page.JobCost.__dataclass_fields__})
             for job in findings_page.result("plan")["jobs"]]  # fmt: skip
    missed, met = findings_page.wanted(works).split(" and met by ")
    assert "GPT2 in TF32 (4.1 hours against 3), GPT2 in float32 (30 hours against 14)" in missed
    assert "No step was timed on an H100" in missed and met.count("hours against") == 5
    slow = [name for name in ("table1", "fig1") if findings_page.result(name)["seconds"] > findings_page.MOST_SECONDS]
    assert re.findall(r"missed by (\w+) \(", findings_page.times_part()) == slow
    # What takes others' results took next to nothing itself.
    for name in findings_page.REUSED:
        assert 20 * findings_page.result(name)["cpu_seconds"] < findings_page.result("table1")["cpu_seconds"]


def test_words_follow_from_the_intervals() -> None:
    from blockhess.analysis.jensen_shannon import JS0

    def found(low: float, high: float) -> JS0:
        return JS0(0.5, "distance", 2.0, "linear", 0.1, ("a", "b"), probes_interval=(low, high, 0.95))

    assert findings_page.compare(found(0.4, 0.5), found(0.1, 0.3)) == "more"
    assert findings_page.compare(found(0.1, 0.3), found(0.4, 0.5)) == "less"
    assert findings_page.compare(found(0.1, 0.45), found(0.4, 0.5)) == "undecided"
