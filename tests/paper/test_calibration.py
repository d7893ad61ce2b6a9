"""Calibration and advice: gap arithmetic, rank correlation against scipy, planted calibrations, resumed trainings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import blockhess
from blockhess.cli.demo import one_thread
from blockhess_paper.training import calibrate, figure1, figure10, training_runs
from blockhess_paper.training.advice import advice
from blockhess_paper.training.architectures import ARCHITECTURES
from blockhess_paper.training.calibration import (
    ADAM_NEEDED,
    SGD_FINE,
    UNDECIDED,
    Calibration,
    Rule,
    Subject,
    chance_of_best,
    gap,
    rank_correlation,
    shipped_calibration,
)
from blockhess_paper.training.training_runs import QUICK, Settings, find_best, load_or_train
from tests.helpers.spectra_cases import make_spectra


def test_gap() -> None:
    assert gap(4.0, 2.0, 1.0) == pytest.approx(1 / 3)
    assert gap(4.0, 1.0, 1.0) == 0.0 and gap(4.0, 0.0, 1.0) < 0
    with pytest.raises(ValueError, match="below the initial"):
        gap(1.0, 0.5, 1.0)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipys(ties: bool) -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=12)
    y = x + generator.normal(size=12)
    if ties:
        x, y = x.round(), y.round()
    found = rank_correlation(x, y, [str(i) for i in range(12)], resamples=50)
    assert found.value == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert found.lower < found.value < found.upper


def test_bootstrap_draws_families() -> None:
    """Of two families with opposite trends a resample holds one, the other or both."""
    x, y = [0.0, 1, 2, 10, 11, 12], [0.0, 1, 2, 2, 1, 0]
    families = ["a"] * 3 + ["b"] * 3
    found = rank_correlation(x, y, families, resamples=400)
    assert (found.lower, found.upper) == (pytest.approx(-1), pytest.approx(1))
    assert found.value == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    again = rank_correlation(x, y, families, resamples=400)
    assert again == found
    with pytest.raises(ValueError, match="two families"):
        rank_correlation(x, y, ["a"] * 6)


def test_the_best_of_many_is_worth_less() -> None:
    """Of 4 values in order, 1 of 24 orders correlates as well; with the reverse among the predictors 2 of 24 do."""
    up = [1.0, 2.0, 3.0, 4.0]
    assert chance_of_best([up], up) == pytest.approx(1 / 24, abs=0.01)
    assert chance_of_best([up, up[::-1]], up) == pytest.approx(2 / 24, abs=0.01)
    noise = np.random.default_rng(0).normal(size=(200, 12))
    assert chance_of_best(noise, np.arange(12), shuffles=2000) > 0.02


def planted(js0s: list[float], gaps: list[float]) -> Calibration:
    """Families of two."""
    subjects = [Subject(f"net{k}", f"family{k // 2}", g, j) for k, (g, j) in enumerate(zip(gaps, js0s))]
    return Calibration(tuple(subjects), {"num_steps": 1})


JS0S = [0.05 * k for k in range(1, 13)]
SEPARABLE = planted(JS0S, [0.01 * k for k in range(1, 7)] + [0.3 + 0.01 * k for k in range(6)])
HOPELESS = planted(JS0S, [0.3, 0.0] * 6)
REVERSED = planted(JS0S[::-1], [0.01 * k for k in range(1, 7)] + [0.3 + 0.01 * k for k in range(6)])


def test_separable_calibration_has_a_rule() -> None:
    assert SEPARABLE.failure == "" and SEPARABLE.num_wrong == 0 and SEPARABLE.num_decided >= 8
    assert SEPARABLE.rule == Rule(pytest.approx(0.35), pytest.approx(0.30))
    assert SEPARABLE.correlation.value == pytest.approx(1.0)


def test_rule_decides_outside_the_doubtful_zone() -> None:
    overlapping = Rule(fine_below=0.2, needed_above=0.4)
    assert [overlapping.decide(x) for x in (0.1, 0.2, 0.3, 0.4, 0.5)] == [
        SGD_FINE,
        UNDECIDED,
        UNDECIDED,
        UNDECIDED,
        ADAM_NEEDED,
    ]
    apart = Rule(fine_below=0.4, needed_above=0.2)
    assert [apart.decide(x) for x in (0.1, 0.2, 0.3, 0.4, 0.5)] == [
        SGD_FINE,
        SGD_FINE,
        UNDECIDED,
        ADAM_NEEDED,
        ADAM_NEEDED,
    ]


@pytest.mark.parametrize("calibration", [HOPELESS, REVERSED])
def test_hopeless_calibrations_are_told(calibration: Calibration) -> None:
    assert "rank correlation" in calibration.failure
    assert advice(spectra_apart(1e-9), calibration).decision == UNDECIDED
    assert advice(spectra_apart(1.0), calibration).decision == UNDECIDED


def test_calibration_of_one_kind_tells_nothing() -> None:
    alike = planted(JS0S, [0.01 * k for k in range(12)][::-1])
    alike = Calibration(tuple(s for s in alike.subjects if not s.needs_adam), {})
    assert "does without Adam" in alike.failure
    assert Rule.of(alike.subjects).decide(0.9) == UNDECIDED


def test_leaving_a_family_out_uses_the_others_alone() -> None:
    said, needs = HOPELESS.leave_one_out["net0"]
    others = [s for s in HOPELESS.subjects if s.family != "family0"]
    assert said == Rule.of(others).decide(JS0S[0]) and needs
    assert REVERSED.num_wrong > 0


def test_calibration_round_trip() -> None:
    again = Calibration.from_json(SEPARABLE.to_json())
    assert again.subjects == SEPARABLE.subjects and again.rule == SEPARABLE.rule


def spectra_apart(distance: float, **provenance):
    """Two blocks at the same place and one at a distance from them."""
    nodes = [[[0.0, 1.0], [0.0, 1.0], [distance, 1.0 + 9 * distance]]]
    provenance = {"batchnorm": "none", **provenance}
    return make_spectra(nodes, [[[0.5, 0.5]] * 3], names=["a", "b", "odd"], **provenance)


def test_advice_on_a_separable_calibration() -> None:
    fine, needed = advice(spectra_apart(1e-9), SEPARABLE), advice(spectra_apart(1.0), SEPARABLE)
    assert (fine.decision, needed.decision) == (SGD_FINE, ADAM_NEEDED)
    assert needed.js0.value > 0.35 and needed.drivers[0][0] == "odd"
    text = str(needed)
    assert "n = 12 architectures of 6 families" in text and "wrong about 0" in text and "odd" in text
    assert "%" not in text.split("\n")[0]


def test_advice_refuses_what_was_not_calibrated() -> None:
    other = advice(spectra_apart(1.0, batchnorm="batch"), SEPARABLE)
    assert other.decision == UNDECIDED and "eval mode" in other.reason


def test_shipped_advice_says_what_the_calibration_allows() -> None:
    shipped = shipped_calibration()
    found = advice(spectra_apart(1.0))
    assert len(shipped.subjects) >= 12 and len({s.family for s in shipped.subjects}) >= 6
    assert found.calibration is shipped
    assert (found.decision == UNDECIDED) >= bool(shipped.failure)


TINY = Settings(4, 1, seeds=(0, 1), grids={"SGD": (0.1,), "AdamW": (1e-3, 1e-2)}, most_added=2)


def test_an_interrupted_search_goes_on_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_thread():
        whole = find_best(tmp_path / "whole", "cnn", "AdamW", TINY)
        calls = []

        def broken(*arguments, **options):
            calls.append(options["rate"])
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        real = training_runs.train
        monkeypatch.setattr(training_runs, "train", broken)
        with pytest.raises(KeyboardInterrupt):
            find_best(tmp_path / "cut", "cnn", "AdamW", TINY)
        assert len(list((tmp_path / "cut").rglob("*.json"))) == 2
        resumed = find_best(tmp_path / "cut", "cnn", "AdamW", TINY)
        done = len(calls)
        assert resumed == whole and done == 3 + len(list((tmp_path / "cut").rglob("*.json"))) - 2
        assert find_best(tmp_path / "cut", "cnn", "AdamW", TINY) == whole and len(calls) == done
        other = load_or_train(tmp_path / "cut", "cnn", "AdamW", 1e-2, 0, Settings(3, 1))
        assert other.num_steps == 3 and len(calls) == done + 1  # other settings are no hit


def test_the_grid_grows_until_the_best_rate_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted_train(*_, rate: float, num_steps: int, **options):
        final = None if rate > 4 else abs(math.log10(rate) - 0.25)
        return training_runs.Training((1.0,) * num_steps, 9.0, final, final is None, num_steps)

    monkeypatch.setattr(training_runs, "train", planted_train)
    settings = Settings(1, 0, grids={"SGD": (0.1, 0.3)}, most_added=4)
    found = find_best(tmp_path, "cnn", "SGD", settings)
    assert not found.at_edge and found.rate == pytest.approx(3.0)
    assert None in found.tried.values()
    few = find_best(tmp_path, "cnn", "SGD", Settings(1, 0, grids={"SGD": (0.01, 0.03)}, most_added=1))
    assert few.at_edge


def test_every_architecture_can_be_trained() -> None:
    with one_thread():
        for name, architecture in ARCHITECTURES.items():
            (batch,) = architecture.batches(1, 0, batch_size=4)
            model = architecture.model(0)
            loss = blockhess.problem.losses.make_loss(architecture.loss_fn)(model, batch)[0]
            loss.backward()
            assert all(p.grad is not None for p in model.parameters()), name
            scaled = name in ("mlp-c4", "mlp-c8", "bert-2")
            assert scaled or abs(loss.item() - architecture.chance) < 0.35, name
            again = architecture.model(0)
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


@pytest.mark.slow
def test_quick_calibration(tmp_path: Path) -> None:
    with one_thread():
        result = calibrate.run(quick=True, folder=tmp_path)
    numbers = result.numbers
    assert set(numbers["architectures"]) == set(calibrate.QUICK_NAMES)
    record = numbers["architectures"]["cnn"]
    expected = [
        (s - a) / (i - a)
        for i, s, a in zip(record["AdamW"]["initial"], record["SGD"]["final"], record["AdamW"]["final"])
    ]
    assert record["gaps"] == pytest.approx(expected)
    spectra = blockhess.load(tmp_path / "spectra" / "cnn-none.npz")
    place = list(calibrate.QUICK_NAMES).index("cnn")
    assert numbers["JS0"][str(calibrate.DEFAULT)][place] == pytest.approx(spectra.js0(axis="linear").value)
    whole = str(calibrate.Definition(mean="matrix"))
    assert numbers["JS0"][whole][place] == pytest.approx(float(spectra.js_matrix(axis="linear").mean()))
    assert len(result.claims) == 3 and all(c.verdict for c in result.claims)
    json.dumps(numbers)
    assert Calibration.from_json(json.dumps(numbers["calibration"])).subjects[0].name == "cnn"


@pytest.mark.slow
def test_quick_figures(tmp_path: Path) -> None:
    with one_thread():
        evolution = figure1.run(quick=True, folder=tmp_path)
        again = figure1.run(quick=True, folder=tmp_path)
        cnns = figure10.run(quick=True, folder=tmp_path)
    assert evolution.text == again.text and len(evolution.claims) == 3
    kept = [path.suffix for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(kept) == [*[".json"] * 2, *[".pt"] * 4]  # how each training ended, and its checkpoints
    assert cnns.arrays["resnet SGD"].shape == (2, QUICK.num_steps)


def test_a_claim_about_a_gap_follows_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finals = {"SGD": 1.5, "AdamW": 1.0}

    def planted_train(*_, optimizer: str, num_steps: int, **options):
        return training_runs.Training((2.0,) * num_steps, 2.0, finals[optimizer], False, num_steps)

    monkeypatch.setattr(training_runs, "train", planted_train)
    verdicts = [
        figure10.compare("x", "Figure: x", {"cnn": "CNN"}, similar, {"cnn": QUICK}, tmp_path).claims[0].verdict
        for similar in (True, False)
    ]
    assert verdicts == ["not reproduced", "reproduced"]
