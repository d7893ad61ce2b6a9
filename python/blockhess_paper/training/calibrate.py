"""What predicts how many times more steps SGD needs than AdamW? Five predictors on 39 networks of ten families.

    ratio = SGD's steps / AdamW's steps to the loss that AdamW has after 400 steps, best rates, three seeds (races.py)

The predictors were fixed beforehand, and each is expected to rise with the ratio: the curvature spread, JS0 by default,
the gain of block rates, the one-step gain R of sign descent, and the heterogeneity of the gradient. Each is measured at
initialization and after AdamW's first 2 % of the steps, on one batch of the training's size that no training uses, with
the statistics of the batch in BatchNorm. A correlation is Spearman's, with an interval by bootstrap over families.

The predictor with the largest correlation over the families in CHOOSING is tested on the other families. Two baselines
need no curvature: the number of classes, and the samples or tokens in a batch.

FOLDER holds one file per training, per spectrum and per R, so that an interrupted run resumes.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING

from torch import nn

from blockhess._text import format_table
from blockhess.problem.model_state import has_batchnorm
from blockhess.results.files import writable_folder
from blockhess.sign_descent import sign_gain
from blockhess.spectra import Spectra
from blockhess_paper.networks.initial_spectra import Effort, measure_once
from blockhess_paper.networks.networks import Network, Selection
from blockhess_paper.results import ADAM_COLOR, GD_COLOR, Claim, Result, new_figure, verdict
from blockhess_paper.training.architectures import CALIBRATED, CONTEXT, Architecture
from blockhess_paper.training.calibration import CONFIDENCE, Correlation, heterogeneity, rank_correlation
from blockhess_paper.training.loop import train
from blockhess_paper.training.races import MOST_RATIO, Conditions, Race, race

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EFFORT, QUICK_EFFORT = Effort(3, 20), Effort(2, 4)
QUICK = Conditions(40, 2, (0, 1))
QUICK_NAMES = ("linear-images-64", "mlp-images-16", "gpt-1-characters")

# Kind -> first rates of SGD and AdamW. Those of AdamW are low: over large rates the loss has several minima.
FIRST_RATES = {"images": (0.05, 0.002), "text": (0.5, 0.002), "Transformer": (0.125, 0.002), "linear": (16.0, 0.016)}

PREDICTORS = ("curvature spread", "JS0", "gain of block rates", "R", "gradient heterogeneity")
BASELINES = ("number of classes", "batch")

# Share of AdamW's steps -> name of the stage.
STAGES = {0.0: "at initialization", 0.02: "after 2 %"}

# The families that choose the predictor; the others test it.
CHOOSING = ("linear", "CNN", "ViT", "GPT")

# Ratios of networks on which SGD falls behind, and on which it keeps up.
BEHIND, ON_PAR = 1.5, 1.15

# Ratios at the ticks of the figure.
TICKS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)

# Seed of the batch on which predictors are measured.
DATA_SEED = 2_000


@dataclass(frozen=True)
class Record:
    """A measured network.

    Attributes:
        name: a key of CALIBRATED.
        family: networks that are resampled together.
        ratios: seed by seed, the ratio of the steps of SGD and AdamW; MOST_RATIO where it is larger.
        ratio: their geometric mean.
        rates: optimizer -> best rate.
        values: predictor -> value; None where it does not exist.
    """

    name: str
    family: str
    ratios: tuple[float, ...]
    ratio: float
    rates: Mapping[str, float]
    values: Mapping[str, float | None]


def named_predictor(predictor: str, stage: str) -> str:
    """Return the name of a predictor at a stage."""
    return f"{predictor} {stage}"


def first_rates(architecture: Architecture) -> dict[str, float]:
    """Return optimizer -> rate that is tried first."""
    kind = "images" if architecture.images else "Transformer" if architecture.transformer else "text"
    sgd, adamw = FIRST_RATES["linear" if kind == "text" and architecture.family == "linear" else kind]
    return {"SGD": sgd, "AdamW": adamw}


def after_steps(architecture: Architecture, rate: float, seed: int, num_steps: int) -> nn.Module:
    """Return the model after the first steps of AdamW, all of them warm-up."""
    model, kept = architecture.model(seed), []
    if num_steps == 0:
        return model
    train(
        model,
        architecture.batches(num_steps + 1, seed),
        architecture.loss_fn,
        optimizer="AdamW",
        rate=rate,
        num_steps=num_steps + 1,
        schedule="constant",
        warmup=num_steps,
        at_steps={num_steps: lambda m: kept.append(copy.deepcopy(m))},
        **architecture.options,
    )
    return kept[0]


def predictors(
    folder: Path, name: str, architecture: Architecture, found: Race, conditions: Conditions, effort: Effort
) -> dict[str, float | None]:
    """Return predictor at its stage -> value, computed or loaded from the folder."""
    size = architecture.size * (1 if architecture.images else CONTEXT)
    values: dict[str, float | None] = dict(zip(BASELINES, (float(architecture.classes), float(size))))
    (batch,) = architecture.batches(1, DATA_SEED)
    for share, stage in STAGES.items():
        seed, steps = conditions.seeds[0], conditions.warmup if share else 0
        net = Network(
            name, after_steps(architecture, found.rates["AdamW"], seed, steps), batch, architecture.loss_fn, ""
        )
        policy = "batch" if has_batchnorm(net.model) else "none"
        path = writable_folder(folder / "spectra") / f"{name}-{steps}.npz"
        for predictor, value in zip(
            PREDICTORS, of_spectra(measure_once(path, net, policy, effort, seed), sign(path, net, policy))
        ):
            values[named_predictor(predictor, stage)] = value
    return values


def of_spectra(spectra: Spectra, r: float | None) -> tuple[float | None, ...]:
    """Return the values of PREDICTORS, R being given."""
    norms = spectra.provenance["gradient_norms"]
    spread = spectra.curvature_spread()
    return (
        None if spread is None else spread.value,
        spectra.js0().value,
        spectra.block_rate_gain().value,
        r,
        heterogeneity([norms[name] for name in spectra.names], spectra.dims),
    )


def sign(spectra_path: Path, net: Network, policy: str) -> float | None:
    """Return R, computed or loaded from the file beside the spectra; None where curvature is not positive."""
    path = spectra_path.with_suffix(".json")
    if not path.exists() or path.stat().st_mtime < spectra_path.stat().st_mtime:
        found = sign_gain(net.model, net.data, net.loss_fn, batchnorm="eval" if policy == "none" else policy)
        path.write_text(json.dumps({**found.to_dict(), "value": None if found.missing else found.value}) + "\n")
    value: float | None = json.loads(path.read_text())["value"]
    return value


def run(*, seed: int = 0, quick: bool = False, folder: Path, selection: Selection | None = None) -> Result:
    """Race both optimizers on all networks, measure the predictors, and judge.

    Args:
        seed: first of the seeds; seed of the bootstrap.
        quick: three networks and few steps.
        folder: holds trainings and spectra; those of an interrupted run are reused.
        selection: the device; its scale must be "mini".

    Raises:
        ValueError: the scale is "paper".
    """
    if selection is not None and selection.scale != "mini":
        raise ValueError(
            "calibrate: scale must be mini, got 'paper': a rank correlation over the paper's six networks, in two "
            "families, says nothing, and each would be trained at every rate with three seeds; fig10 and fig11 train "
            "the six once"
        )
    conditions = QUICK if quick else Conditions(seeds=(seed, seed + 1, seed + 2))
    device = "cpu" if selection is None else selection.device
    chosen = {name: replace(CALIBRATED[name], device=device) for name in (QUICK_NAMES if quick else CALIBRATED)}
    folder = writable_folder(folder)
    first = Conditions(conditions.num_steps, conditions.warmup, conditions.seeds[:1])
    for name, architecture in chosen.items():  # the searches first: an interrupted run has some of every family
        found = race(folder, name, architecture, first_rates(architecture), first)
        print(f"  {name}: ratio {found.ratio:.2f}", flush=True)
    records = []
    for name, architecture in chosen.items():
        found = race(folder, name, architecture, first_rates(architecture), conditions)
        values = predictors(folder, name, architecture, found, conditions, QUICK_EFFORT if quick else EFFORT)
        records.append(Record(name, architecture.family, found.ratios, found.ratio, found.rates, values))
    costs = [json.loads(path.read_text())["cpu_seconds"] for path in (folder / "races").rglob("*.json")]
    return judge(records, conditions, seed, {"trainings": len(costs), "processor seconds of trainings": sum(costs)})


def correlation(records: Sequence[Record], key: str, seed: int = 0) -> tuple[Correlation | None, int]:
    """Return the rank correlation of a predictor and the ratio, and the number of networks that have the predictor.

    It is None where fewer than two families, values or ratios are left.
    """
    known = [(r, value) for r in records if (value := r.values[key]) is not None]
    families, ratios = [r.family for r, _ in known], [r.ratio for r, _ in known]
    values = [value for _, value in known]
    if min(len({*column}) for column in (families, ratios, values)) < 2:
        return None, len(known)
    return rank_correlation(values, ratios, families, seed=seed), len(known)


@dataclass(frozen=True)
class Judgment:
    """The correlations of all predictors.

    Attributes:
        of: subset of the networks -> predictor -> (correlation, number of networks).
        best: the predictor with the largest correlation over the families in CHOOSING.
    """

    of: Mapping[str, Mapping[str, tuple[Correlation | None, int]]]
    best: str

    @property
    def test(self) -> Correlation | None:
        """The correlation of the best predictor over the families that did not choose it."""
        return self.of["held out"][self.best][0]

    @property
    def holds(self) -> bool:
        """Whether the interval of that correlation is above zero."""
        return self.test is not None and self.test.lower > 0


def judgment(records: Sequence[Record], seed: int = 0) -> Judgment:
    """Correlate all predictors and baselines with the ratio, over all networks and subsets of them."""
    subsets = {
        "all": list(records),
        "choosing": [r for r in records if r.family in CHOOSING],
        "held out": [r for r in records if r.family not in CHOOSING],
        "images": [r for r in records if r.values["number of classes"] == 10],
        "text": [r for r in records if r.values["number of classes"] != 10],
    }
    candidates = [named_predictor(predictor, stage) for stage in STAGES.values() for predictor in PREDICTORS]
    of = {
        subset: {key: correlation(members, key, seed) for key in (*candidates, *BASELINES)}
        for subset, members in subsets.items()
    }

    def value(key: str) -> float:
        found = of["choosing"][key][0]
        return -math.inf if found is None else found.value

    return Judgment(of, max(candidates, key=value))


def reliability(records: Sequence[Record]) -> float:
    """Return the mean rank correlation of the ratios of two seeds, to about which noise limits a predictor."""
    names, pairs = [r.name for r in records], itertools.combinations(zip(*(r.ratios for r in records)), 2)
    return fmean(rank_correlation(a, b, names, resamples=1).value for a, b in pairs)


def judge(records: Sequence[Record], conditions: Conditions, seed: int, cost: Mapping[str, float]) -> Result:
    """Judge the claims by the measured networks."""
    found = judgment(records, seed)
    reliable = reliability(records)
    behind, on_par = sum(r.ratio > BEHIND for r in records), sum(r.ratio < ON_PAR for r in records)
    ordered = sorted(records, key=lambda r: r.ratio)
    rows = [
        [
            r.name,
            f"{_ratio(r.ratio)} ({_ratio(min(r.ratios))} ... {_ratio(max(r.ratios))})",
            *(f"{r.rates[optimizer]:.3g}" for optimizer in ("SGD", "AdamW")),
            *(f"{r.values[key]:g}" for key in BASELINES),
        ]
        for r in ordered
    ]
    header = ["network", "ratio (over seeds)", "SGD's rate", "AdamW's", "classes", "batch"]
    short = ["spread", "JS0", "gain", "R", "gradient"]
    measures = [
        [r.name, *(_value(r.values[named_predictor(p, stage)]) for stage in STAGES.values() for p in PREDICTORS)]
        for r in ordered
    ]
    lines = [[key, *(_correlation(*of[key]) for of in found.of.values())] for key in next(iter(found.of.values()))]
    text = "\n\n".join(
        [
            format_table(header, rows),
            "predictors at initialization, and after 2 % of AdamW's steps\n"
            + format_table(["network", *short, *(f"{name} 2 %" for name in short)], measures),
            f"{behind} of {len(records)} networks have a ratio above {BEHIND:g}, {on_par} below {ON_PAR:g}; rank "
            f"correlation of the ratios of two seeds {reliable:+.2f}",
            f"Spearman's rank correlation with the ratio, {100 * CONFIDENCE:g} % by bootstrap over families; "
            f"choosing: {', '.join(CHOOSING)}\n"
            + format_table(["predictor", *(f"{subset}" for subset in found.of)], lines),
        ]
    )
    return Result(
        "calibrate",
        f"Steps of SGD over steps of AdamW to the same loss: {len(records)} networks of "
        f"{len({r.family for r in records})} families, {conditions.num_steps} steps, {len(conditions.seeds)} seeds",
        {
            "seed": seed,
            "num_steps": conditions.num_steps,
            "warmup": conditions.warmup,
            "seeds": list(conditions.seeds),
            "most ratio": MOST_RATIO,
            "num_probes": EFFORT.num_probes,
            "Lanczos steps": EFFORT.num_steps,
            "choosing families": list(CHOOSING),
        },
        _claims(records, found),
        text,
        {
            "networks": {r.name: {key: value for key, value in vars(r).items() if key != "name"} for r in records},
            "correlations": {
                subset: {key: None if c is None else [c.value, c.lower, c.upper, n] for key, (c, n) in of.items()}
                for subset, of in found.of.items()
            },
            "behind": behind,
            "on par": on_par,
            "rank correlation of two seeds": reliable,
            "best": found.best,
            "holds": found.holds,
            **cost,
        },
        figure=_draw(records, found),
    )


def _ratio(value: float) -> str:
    return f">= {MOST_RATIO}" if value >= MOST_RATIO - 1e-9 else f"{value:.2f}"


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _correlation(found: Correlation | None, count: int) -> str:
    return f"none, n = {count}" if found is None else f"{found}, n = {count}"


def _claims(records: Sequence[Record], found: Judgment) -> tuple[Claim, ...]:
    start = STAGES[0.0]
    every = found.of["all"]
    heterogeneity = [named_predictor(predictor, start) for predictor in PREDICTORS[:2]]
    positive = [c is not None and c.lower > 0 for c in (every[key][0] for key in heterogeneity)]
    sides = [[r.ratio for r in records if CALIBRATED[r.name].transformer is side] for side in (True, False)]
    means = [geometric_mean(side) if side else math.nan for side in sides]
    tested = _correlation(*found.of["held out"][found.best])
    return (
        Claim(
            "Section 2.3: SGD is worse than Adam where the blocks are heterogeneous, and on par where they are not.",
            "rank correlation with the ratio of steps: "
            + "; ".join(f"{key} {_correlation(*every[key])}" for key in heterogeneity)
            + ".",
            verdict(all(positive), any(positive)),
        ),
        Claim(
            "Section 2.5: a measure of the blocks tells before training whether SGD can be used.",
            f"{found.best} has the largest correlation over {', '.join(CHOOSING)}, "
            f"{_correlation(*found.of['choosing'][found.best])}; over the other families {tested}.",
            verdict(found.holds, found.test is not None and found.test.value > 0.3),
        ),
        Claim(
            "Section 2.1: on Transformers SGD performs significantly worse than Adam, on CNNs they are similar.",
            f"geometric mean ratio {means[0]:.2f} of {len(sides[0])} Transformers, {means[1]:.2f} of all others.",
            verdict(
                all(ratio > BEHIND for ratio in sides[0]) and all(ratio < BEHIND for ratio in sides[1]),
                means[0] > ON_PAR * means[1],
            ),
        ),
    )


def _draw(records: Sequence[Record], found: Judgment) -> Figure:
    figure = new_figure(14.0, 6.0)
    panels = figure.subplots(2, len(PREDICTORS), sharey=True)
    for row, stage in zip(panels, STAGES.values()):
        for panel, predictor in zip(row, PREDICTORS):
            key = named_predictor(predictor, stage)
            for r in records:
                if (x := r.values[key]) is None:
                    continue
                color = GD_COLOR if CALIBRATED[r.name].images else ADAM_COLOR
                panel.plot([x, x], [min(r.ratios), max(r.ratios)], color=color, linewidth=1)
                filled = color if r.family in CHOOSING else "white"
                panel.plot([x], [r.ratio], "o", color=color, markerfacecolor=filled, markersize=5)
            if predictor in ("gain of block rates", "R"):
                panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_yticks(TICKS, labels=[f"{tick:g}" for tick in TICKS])
            panel.minorticks_off()
            panel.axhline(1.0, color="0.7", linestyle="--", linewidth=1)
            panel.set_xlabel(key, fontsize="small")
            panel.set_title(_correlation(*found.of["all"][key]), fontsize="small")
            for side in ("top", "right"):
                panel.spines[side].set_visible(False)
        row[0].set_ylabel("steps of SGD / AdamW (bar: seeds)")
    figure.suptitle(
        "blue: images, orange: text; filled: the families that choose the predictor; above: rank correlation over all",
        fontsize="small",
    )
    return figure
