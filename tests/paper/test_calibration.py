"""Calibration: races against planted curves, rank correlation against scipy, a planted predictor, resumed trainings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import blockhess
from blockhess.cli.demo import one_thread
from blockhess_paper.training import calibrate, figure1, figure10, races, training_runs
from blockhess_paper.training.architectures import ARCHITECTURES, CALIBRATED, CHARACTERS, WORDS
from blockhess_paper.training.calibrate import BASELINES, PREDICTORS, STAGES, Record, named_predictor
from blockhess_paper.training.calibration import gap, heterogeneity, rank_correlation
from blockhess_paper.training.races import EVERY, MOST_RATIO, WINDOW, Conditions, climb, race, smoothed, steps_to
from blockhess_paper.training.training_runs import QUICK, Settings, find_best, load_or_train


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


def test_heterogeneity_is_the_mean_difference() -> None:
    """Gini's coefficient: mean |difference| of all pairs over twice the mean."""
    norms, dims = [3.0, 1.0, 8.0, 0.0], [9, 1, 4, 16]
    x = np.array(norms) / np.sqrt(dims)
    expected = np.abs(x[:, None] - x).mean() / (2 * x.mean())
    assert heterogeneity(norms, dims) == pytest.approx(expected, rel=1e-14)
    assert heterogeneity([1.0, 2.0], [1, 4]) == 0.0  # the sizes of the blocks count
    assert heterogeneity([0.0, 0.0, 1.0], [1, 1, 1]) == pytest.approx(2 / 3, rel=1e-14)


def test_steps_are_interpolated() -> None:
    means = smoothed([9.0, *[4.0] * WINDOW, 1.0])
    assert means == pytest.approx([4.0, (4.0 * (WINDOW - 1) + 1) / WINDOW])
    assert steps_to([3.0, 2.0, 1.0], 1.5) == EVERY * (WINDOW + 1.5)
    assert steps_to([1.0, 2.0], 1.5) == EVERY * WINDOW and steps_to([3.0, 2.0], 1.5) is None


@pytest.mark.parametrize("best", [1 / 8, 1.0, 16.0])
def test_the_search_ends_beside_the_best_rate(best: float) -> None:
    found = climb(lambda rate: (abs(math.log2(rate / best)), 0.0), 1.0)
    assert min(found, key=lambda rate: found[rate]) == best
    assert {best / 2, best * 2} <= set(found)
    assert len(found) <= abs(math.log2(best)) + 4


def planted_curves(speed: dict[str, float], best: dict[str, float], tried: list[tuple[str, float, int]]):
    """Return a train() whose loss decays as exp(-speed x steps), more slowly at other rates than the best ones."""

    def train(model, batches, loss_fn, *, optimizer: str, rate: float, num_steps: int, at_steps, **_) -> None:
        tried.append((optimizer, rate, num_steps))
        slower = 2 ** -abs(math.log2(rate / best[optimizer]))
        for step in sorted(at_steps):
            at_steps[step](math.exp(-speed[optimizer] * slower * step))

    return train


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[dict[str, float], list[tuple[str, float, int]]]]:
    """Speeds of the optimizers, and the trainings that were made; losses are those of planted_curves."""
    speed, tried = {"SGD": 0.01, "AdamW": 0.01}, []
    monkeypatch.setattr(races, "train", planted_curves(speed, {"SGD": 0.2, "AdamW": 0.004}, tried))
    monkeypatch.setattr(races, "make_loss", lambda _: lambda model, data: (torch.tensor(model, dtype=torch.float64),))
    yield speed, tried


TINY, RATES = Conditions(100, 2, (0, 1)), {"SGD": 0.05, "AdamW": 0.004}


@pytest.mark.parametrize(("sgd", "expected"), [(0.02, 0.5), (0.01, 1.0), (0.004, 2.5), (0.001, MOST_RATIO)])
def test_race_finds_the_planted_ratio(sgd: float, expected: float, planted, tmp_path: Path) -> None:
    """Means of WINDOW evaluations of an exponential are exponential, (WINDOW - 1) / 2 of them later."""
    speed, _ = planted
    speed["SGD"] = sgd
    found = race(tmp_path, "x", CALIBRATED["linear-images-64"], RATES, TINY)
    assert found.rates == {"SGD": 0.2, "AdamW": 0.004} and len(found.ratios) == 2
    assert found.ratio == pytest.approx(expected, rel=0.12)
    assert (found.sgd[0] is None) == (expected == MOST_RATIO)


def test_an_interrupted_race_goes_on_and_gives_the_same(planted, tmp_path: Path) -> None:
    _, tried = planted
    whole = race(tmp_path / "whole", "x", CALIBRATED["linear-images-64"], RATES, TINY)
    made, real = list(tried), races.train

    def broken(*arguments, **options):
        if len(tried) == len(made) + 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(races, "train", broken)
        with pytest.raises(KeyboardInterrupt):
            race(tmp_path / "cut", "x", CALIBRATED["linear-images-64"], RATES, TINY)
    assert len(list((tmp_path / "cut").rglob("*.json"))) == 4
    assert race(tmp_path / "cut", "x", CALIBRATED["linear-images-64"], RATES, TINY) == whole
    assert tried[len(made) :] == made  # every training once
    assert race(tmp_path / "cut", "x", CALIBRATED["linear-images-64"], RATES, TINY) == whole and len(tried) == 2 * len(
        made
    )


def test_a_lost_training_is_given_up(monkeypatch: pytest.MonkeyPatch, planted, tmp_path: Path) -> None:
    speed, _ = planted
    speed["AdamW"] = -0.1
    with pytest.raises(ValueError, match="AdamW must converge on x, got divergence at the rates"):
        race(tmp_path, "x", CALIBRATED["linear-images-64"], RATES, TINY)
    (path, *_) = tmp_path.rglob("AdamW*.json")
    assert len(json.loads(path.read_text())["losses"]) < TINY.num_steps / EVERY


FAMILIES = sorted({a.family for a in CALIBRATED.values()})


def records(relation: float, noise: float = 0.0, *, same: bool = True) -> list[Record]:
    """Three networks of every family; the curvature spread at initialization follows the ratio in the choosing
    families, and in the others if `same`; all else is noise.
    """
    generator, found = np.random.default_rng(1), []
    names = [named_predictor(p, stage) for p in PREDICTORS for stage in STAGES.values()]
    for name, architecture in list(CALIBRATED.items()):
        ratio = float(generator.uniform(0.8, 4.0))
        values = {key: float(generator.normal()) for key in names} | dict.fromkeys(BASELINES, 10.0)
        sign = relation if same or architecture.family in calibrate.CHOOSING else -relation
        values[names[0]] = sign * ratio + noise * float(generator.normal())
        rates = {"SGD": 0.1, "AdamW": 0.01}
        found.append(Record(name, architecture.family, (ratio, 1.1 * ratio), ratio, rates, values))
    return found


def test_a_planted_predictor_holds_on_the_other_families() -> None:
    found = calibrate.judgment(records(1.0, 0.2))
    assert found.best == "curvature spread at initialization" and found.holds
    assert found.of["all"][found.best][0].lower > 0.5


def test_a_predictor_of_the_choosing_families_alone_does_not_hold() -> None:
    found = calibrate.judgment(records(1.0, 0.2, same=False))
    assert found.best == "curvature spread at initialization" and not found.holds
    assert found.test is not None and found.test.value < 0
    assert not calibrate.judgment(records(0.0, 1.0)).holds


def test_networks_without_a_predictor_are_left_out_of_it() -> None:
    key = named_predictor("R", "at initialization")
    some = [
        Record(**{**vars(r), "values": {**r.values, key: None}}) if k % 2 else r for k, r in enumerate(records(1.0))
    ]
    found, count = calibrate.correlation(some, key)
    assert found is not None and count == -(-len(some) // 2)
    none, count = calibrate.correlation([r for r in some if r.values[key] is None], key)
    assert none is None and count == 0


def test_reliability_compares_seeds() -> None:
    made = [Record(**{**vars(r), "ratios": (k, 2.0 * k, -k)}) for k, r in enumerate(records(1.0), 1)]
    assert calibrate.reliability(made) == pytest.approx((1 - 1 - 1) / 3)


def test_judge_writes_what_was_measured() -> None:
    made = records(1.0, 0.2)
    result = calibrate.judge(made, TINY, 0, {"trainings": 5})
    json.dumps(result.numbers, allow_nan=False)
    assert result.claims[0].verdict == "partly" and result.claims[1].verdict == "reproduced"
    assert result.numbers["behind"] == sum(r.ratio > 1.5 for r in made)
    value, lower, upper, count = result.numbers["correlations"]["all"]["curvature spread at initialization"]
    assert lower < value <= upper and count == len(made)
    assert f"{value:+.2f} ({lower:+.2f} ... {upper:+.2f}), n = {count}" in result.text


def test_the_networks_are_of_many_kinds() -> None:
    assert len(CALIBRATED) >= 16 and len(FAMILIES) >= 8 and set(calibrate.CHOOSING) < set(FAMILIES)
    half = sum(a.family in calibrate.CHOOSING for a in CALIBRATED.values()) / len(CALIBRATED)
    assert 0.35 <= half <= 0.65
    for family in set(FAMILIES) - {"ResNet", "ViT", "VGG", "BERT"}:
        assert {a.images for a in CALIBRATED.values() if a.family == family} == {True, False} or family in (
            "GPT",
            "LSTM",
        )


def test_words_follow_zipfs_law() -> None:
    (tokens, targets), *_ = ARCHITECTURES["mlp-words-1024"].batches(4, 0)
    counts = np.sort(np.bincount(targets.flatten().numpy(), minlength=WORDS))[::-1]
    assert tokens.max() < WORDS and counts[0] > 20 * max(1, counts[WORDS // 10])


TINY_SETTINGS = Settings(4, 1, seeds=(0, 1), grids={"SGD": (0.1,), "AdamW": (1e-3, 1e-2)}, most_added=2)


def test_an_interrupted_search_goes_on_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with one_thread():
        whole = find_best(tmp_path / "whole", "resnet", "AdamW", TINY_SETTINGS)
        calls = []

        def broken(*arguments, **options):
            calls.append(options["rate"])
            if len(calls) == 3:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        real = training_runs.train
        monkeypatch.setattr(training_runs, "train", broken)
        with pytest.raises(KeyboardInterrupt):
            find_best(tmp_path / "cut", "resnet", "AdamW", TINY_SETTINGS)
        assert len(list((tmp_path / "cut").rglob("*.json"))) == 2
        resumed = find_best(tmp_path / "cut", "resnet", "AdamW", TINY_SETTINGS)
        done = len(calls)
        assert resumed == whole and done == 3 + len(list((tmp_path / "cut").rglob("*.json"))) - 2
        assert find_best(tmp_path / "cut", "resnet", "AdamW", TINY_SETTINGS) == whole and len(calls) == done
        other = load_or_train(tmp_path / "cut", "resnet", "AdamW", 1e-2, 0, Settings(3, 1))
        assert other.num_steps == 3 and len(calls) == done + 1  # other settings are no hit


def test_the_grid_grows_until_the_best_rate_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted_train(*_, rate: float, num_steps: int, **options):
        final = None if rate > 4 else abs(math.log10(rate) - 0.25)
        return training_runs.Training((1.0,) * num_steps, 9.0, final, final is None, num_steps)

    monkeypatch.setattr(training_runs, "train", planted_train)
    settings = Settings(1, 0, grids={"SGD": (0.1, 0.3)}, most_added=4)
    found = find_best(tmp_path, "resnet", "SGD", settings)
    assert not found.at_edge and found.rate == pytest.approx(3.0)
    assert None in found.tried.values()
    few = find_best(tmp_path, "resnet", "SGD", Settings(1, 0, grids={"SGD": (0.01, 0.03)}, most_added=1))
    assert few.at_edge


def test_every_architecture_can_be_trained() -> None:
    with one_thread():
        for name, architecture in ARCHITECTURES.items():
            (batch,) = architecture.batches(1, 0, batch_size=4)
            model = architecture.model(0)
            loss = blockhess.problem.losses.make_loss(architecture.loss_fn)(model, batch)[0]
            loss.backward()
            assert all(p.grad is not None for p in model.parameters()), name
            if architecture.draw != "pairs":  # an untrained model predicts all classes alike
                assert abs(loss.item() - math.log(architecture.classes)) < 0.6, name
            again = architecture.model(0)
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters()))


def test_language_models_do_not_see_what_they_predict() -> None:
    for name, architecture in CALIBRATED.items():
        if architecture.draw not in ("characters", "words"):
            continue
        ((tokens, _),) = architecture.batches(1, 0, batch_size=2)
        model, changed = architecture.model(0), tokens.clone()
        changed[:, 20:] = (changed[:, 20:] + 1) % CHARACTERS
        before, after = model(tokens), model(changed)
        torch.testing.assert_close(after[:, :20], before[:, :20])
        assert not torch.equal(after[:, 20:], before[:, 20:]) or name.startswith("linear")


def test_first_steps_are_those_of_the_race() -> None:
    architecture = CALIBRATED["linear-images-64"]
    start = calibrate.after_steps(architecture, 0.01, 0, 0)
    moved = calibrate.after_steps(architecture, 0.01, 0, 3)
    batches, model = architecture.batches(3, 0), architecture.model(0)
    assert torch.equal(start.weight, model.weight)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step, (images, labels) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1) / 4
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(moved.weight, model.weight)


@pytest.mark.slow
def test_quick_calibration(tmp_path: Path) -> None:
    with one_thread():
        result = calibrate.run(quick=True, folder=tmp_path)
        again = calibrate.run(quick=True, folder=tmp_path)
    assert again.text == result.text and len(result.claims) == 3
    record = result.numbers["networks"]["linear-images-64"]
    spectra = blockhess.load(tmp_path / "spectra" / "linear-images-64-0.npz")
    values = record["values"]
    assert values["curvature spread at initialization"] == pytest.approx(spectra.curvature_spread().value)
    assert values["JS0 at initialization"] == pytest.approx(spectra.js0().value)
    assert values["gain of block rates at initialization"] == pytest.approx(spectra.block_rate_gain().value)


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
        figure10.compare("x", "Figure: x", {"resnet": "CNN"}, similar, {"resnet": QUICK}, tmp_path, ARCHITECTURES)
        .claims[0]
        .verdict
        for similar in (True, False)
    ]
    assert verdicts == ["not reproduced", "reproduced"]
