"""Does JS0 predict how far SGD falls behind AdamW? The paper's claim over fifteen small architectures.

    gap = (SGD's final loss - AdamW's) / (initial - AdamW's), best rates of growing grids, mean over the seeds

JS0 at initialization is computed in every definition: kind, mean over pairs of blocks or over the whole matrix, axis,
normalization, sigma and BatchNorm policy. The default definition was fixed before any result was known and decides the
verdict. The best definition is reported with the number of definitions tried, since the best of many is good by chance.
The baseline is the spread of log lambda_max over the blocks, which has no parameters.

With an initial loss far above chance the progress of every optimizer looks like that of AdamW. The gap is therefore
also reported with the initial loss capped at the loss of the uniform prediction.

FOLDER holds one file per training and per spectrum, so that an interrupted run resumes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from blockhess._text import format_table
from blockhess.analysis.axes import Axis
from blockhess.analysis.sensitivity import NORMALIZATIONS, SIGMAS
from blockhess.problem.model_state import has_batchnorm
from blockhess.results.files import writable_folder
from blockhess.spectra import Spectra
from blockhess_paper.networks.initial_spectra import POLICIES, Effort, measure_once
from blockhess_paper.networks.networks import Network, Selection
from blockhess_paper.networks.reconstructed_js import KINDS, js0_value
from blockhess_paper.results import ADAM_COLOR, GD_COLOR, Claim, Result, new_figure, verdict
from blockhess_paper.training.architectures import ARCHITECTURES
from blockhess_paper.training.calibration import (
    CONFIDENCE,
    NEEDED_GAP,
    Calibration,
    Correlation,
    Subject,
    gap,
    rank_correlation,
)
from blockhess_paper.training.training_runs import QUICK, Best, Settings, cpu_seconds, find_best

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EFFORT = Effort(3, 40)
QUICK_EFFORT = Effort(1, 4, 4)

# Samples in the batch of the Hessian: images; windows or pairs.
IMAGES, WINDOWS = 64, 16

QUICK_KINDS = ("distance",)
QUICK_NAMES = ("cnn", "gpt-1", "lstm")

MEANS = ("pairs", "matrix")
AXES = ("linear", "asinh")
SPREAD = "spread of log lambda_max"

# Bootstrap samples for definitions other than the default.
RESAMPLES = 200

# Number of definitions in the printed table.
SHOWN = 6


@dataclass(frozen=True)
class Measured:
    """A measured architecture.

    Attributes:
        name: a key of ARCHITECTURES.
        spectra: BatchNorm policy -> spectra at initialization with the first seed; the same object without BatchNorm.
        sgd, adamw: both optimizers at their best rate.
    """

    name: str
    spectra: dict[str, Spectra]
    sgd: Best
    adamw: Best


def initial_spectra(folder: Path, name: str, seed: int, effort: Effort) -> dict[str, Spectra]:
    """Return BatchNorm policy -> spectra of every parameter tensor, computed or loaded from the folder."""
    architecture = ARCHITECTURES[name]
    model = architecture.model(seed)
    images = architecture.draw.endswith("images")
    usual = IMAGES if images else WINDOWS
    batch = architecture.batches(1, seed, batch_size=usual if effort.size is None else effort.size)
    source = "Fashion-MNIST" if images else "Shakespeare"
    network = Network(name, model, batch, architecture.loss_fn, source)
    files = writable_folder(folder / "spectra")
    if not has_batchnorm(model):
        return dict.fromkeys(POLICIES, measure_once(files / f"{name}-none.npz", network, "none", effort, seed))
    return {policy: measure_once(files / f"{name}-{policy}.npz", network, policy, effort, seed) for policy in POLICIES}


def measure(folder: Path, names: Sequence[str], settings: Settings, effort: Effort) -> Iterator[Measured]:
    """Yield the measured architectures one after the other."""
    for name in names:
        spectra = initial_spectra(folder, name, settings.seeds[0], effort)
        sgd, adamw = (find_best(folder, name, optimizer, settings) for optimizer in ("SGD", "AdamW"))
        yield Measured(name, spectra, sgd, adamw)


@dataclass(frozen=True)
class Definition:
    """A definition of JS0.

    Attributes:
        kind: one of reconstructed_js.KINDS.
        axis, normalize: see blockhess.analysis.axes.Axis.
        multiple: sigma in units of the default sigma.
        mean: over "pairs" of different blocks, or over the whole "matrix" with its zero diagonal.
        policy: BatchNorm policy.
    """

    kind: str = "distance"
    axis: str = "linear"
    normalize: str | int = "none"
    multiple: float = 1.0
    mean: str = "pairs"
    policy: str = "eval"

    def __str__(self) -> str:
        return (
            f"{self.kind}, {self.axis}, divided by {self.normalize}, sigma x {self.multiple:.2g}, mean over "
            f"{self.mean}, BatchNorm {self.policy}"
        )


DEFAULT = Definition()


def values_of(spectra: Spectra, policy: str, kinds: Iterable[str] = KINDS) -> dict[Definition, float]:
    """Return JS0 under one BatchNorm policy in every definition that is possible for these blocks."""
    compared = []
    for axis in itertools.starmap(Axis, itertools.product(AXES, NORMALIZATIONS)):
        if len(spectra.comparable_blocks(axis)) >= 2:
            default = spectra.js0(axis=axis)
            where = replace(axis, scale=default.scale)
            for multiple in sorted(SIGMAS, key=lambda m: m != 1):
                compared.append((multiple, spectra.js0(axis=where, sigma=multiple * default.sigma)))
    found = {}
    for kind, (multiple, js0) in itertools.product(kinds, compared):
        value, count = js0_value(spectra, kind, js0), len(js0.blocks)
        for mean, share in zip(MEANS, (1.0, (count - 1) / count)):
            found[Definition(kind, js0.axis, js0.normalize, multiple, mean, policy)] = share * value
    return found


def _tables(m: Measured, kinds: Iterable[str]) -> dict[Definition, float]:
    """Return JS0 in every definition under both BatchNorm policies."""
    found = values_of(m.spectra["eval"], "eval", kinds)
    if m.spectra["batch"] is not m.spectra["eval"]:
        return found | values_of(m.spectra["batch"], "batch", kinds)
    return found | {replace(definition, policy="batch"): value for definition, value in found.items()}


def spread(spectra: Spectra) -> float:
    """Return the standard deviation of log10 lambda_max over the blocks with positive curvature."""
    zero = set(spectra.zero_blocks)
    largest = zip(spectra.names, spectra.eigenvalue_range()[1].tolist())
    values = [math.log10(value) for name, value in largest if value > 0 and name not in zero]
    return float(torch.tensor(values, dtype=torch.float64).std())


def gaps(name: str, sgd: Best, adamw: Best, *, capped: bool = False) -> list[float]:
    """Return the gap of every seed; capped: with the initial loss at most at chance, where AdamW gets below it."""
    most = ARCHITECTURES[name].chance if capped else math.inf
    losses = zip(adamw.initial, sgd.final, adamw.final)
    return [gap(min(i, most), s, a) for i, s, a in losses if not (capped and a >= most)]


def run(*, seed: int = 0, quick: bool = False, folder: Path, selection: Selection | None = None) -> Result:
    """Train the architectures, compute their spectra, and judge the claims.

    Args:
        seed: first of the seeds; seed of the bootstrap.
        quick: three architectures, six steps, one kind.
        folder: holds trainings and spectra; those of an interrupted run are reused.
        selection: its scale must be "mini".

    Raises:
        ValueError: the scale is "paper".
    """
    if selection is not None and selection.scale != "mini":
        raise ValueError(
            "calibrate: scale must be mini, got 'paper': a rank correlation over the paper's six networks, in two "
            "families, says nothing, and each would be trained at every rate with three seeds; fig10 and fig11 train "
            "the six once"
        )
    settings = Settings(seeds=(seed, seed + 1, seed + 2)) if not quick else QUICK
    names = QUICK_NAMES if quick else tuple(ARCHITECTURES)
    measured, spent = [], 0.0
    for found in measure(writable_folder(folder), names, settings, QUICK_EFFORT if quick else EFFORT):
        print(f"  {found.name}: {_summary(found)}", flush=True)
        measured.append(found)
        for optimizer, best in (("SGD", found.sgd), ("AdamW", found.adamw)):
            spent += cpu_seconds(folder, found.name, optimizer, best, settings)
        spent += sum(s.provenance["seconds"] for s in {id(s): s for s in found.spectra.values()}.values())
    result = judge(measured, settings, seed, QUICK_KINDS if quick else KINDS)
    return replace(result, numbers={**result.numbers, "seconds of trainings and spectra, whenever made": spent})


def _summary(found: Measured) -> str:
    js0 = found.spectra["eval"].js0(axis="linear").value
    return f"gap {fmean(gaps(found.name, found.sgd, found.adamw)):.3f}, JS0 {js0:.3f}"


def judge(measured: Sequence[Measured], settings: Settings, seed: int, kinds: Iterable[str] = KINDS) -> Result:
    """Judge the claims by the measured architectures, with JS0 of the given kinds."""
    names = [m.name for m in measured]
    families = [ARCHITECTURES[name].family for name in names]
    all_gaps = {capped: [gaps(m.name, m.sgd, m.adamw, capped=capped) for m in measured] for capped in (False, True)}
    mean = {capped: [fmean(v) if v else math.nan for v in found] for capped, found in all_gaps.items()}
    tables = [_tables(m, kinds) for m in measured]
    predictors: dict[Definition | str, list[float]] = {
        definition: [table[definition] for table in tables]
        for definition in tables[0]
        if all(definition in table for table in tables)
    }
    predictors[SPREAD] = [spread(m.spectra["eval"]) for m in measured]
    found = {
        key: rank_correlation(values, mean[False], families, seed=seed, resamples=RESAMPLES)
        for key, values in predictors.items()
        if len(set(values)) > 1 and key not in (DEFAULT, SPREAD)
    }
    found |= {key: rank_correlation(predictors[key], mean[False], families, seed=seed) for key in (DEFAULT, SPREAD)}
    defined = [k for k, value in enumerate(mean[True]) if math.isfinite(value)]
    capped = rank_correlation(
        [predictors[DEFAULT][k] for k in defined],
        [mean[True][k] for k in defined],
        [families[k] for k in defined],
        seed=seed,
    )
    calibration = Calibration(
        tuple(
            Subject(name, family, g, js0)
            for name, family, g, js0 in zip(names, families, mean[False], predictors[DEFAULT])
        ),
        {"num_steps": settings.num_steps, "seeds": list(settings.seeds), "command": "blockhess paper calibrate"},
    )
    definitions = {key: value for key, value in found.items() if isinstance(key, Definition)}
    order = sorted(definitions, key=lambda key: -definitions[key].value)
    rows = [
        [
            m.name,
            f"{mean[False][k]:+.3f} ({min(all_gaps[False][k]):+.3f} ... {max(all_gaps[False][k]):+.3f})",
            f"{mean[True][k]:+.3f}",
            *(_rate(best) for best in (m.sgd, m.adamw)),
            f"{predictors[DEFAULT][k]:.3f}",
            f"{m.spectra['batch'].js0(axis='linear').value:.3f}",
            f"{predictors[SPREAD][k]:.2f}",
        ]
        for k, m in enumerate(measured)
    ]
    header = ["architecture", "gap (over seeds)", "capped", "SGD's rate", "AdamW's", "JS0", "JS0 batch", "spread"]
    shown = [DEFAULT, *order[:SHOWN], order[-1]]
    lines = [[str(key), str(found[key])] for key in dict.fromkeys([*shown])]
    lines += [[SPREAD, str(found[SPREAD])], ["the default, gap capped at chance", str(capped)]]
    text = "\n\n".join(
        [
            format_table(header, rows) + "\n* best rate at the end of the grid that was tried",
            f"Spearman's rank correlation with the gap, {100 * CONFIDENCE:g} % by bootstrap over families\n"
            + format_table(["definition", "correlation"], lines, left=2),
            f"{calibration}\nadvice: {calibration.failure or 'the rule holds'}",
        ]
    )
    return Result(
        "calibrate",
        f"JS0 against the gap between SGD and AdamW: {len(names)} architectures, {settings.num_steps} steps, "
        f"{len(settings.seeds)} seeds",
        {
            "seed": seed,
            "num_steps": settings.num_steps,
            "warmup": settings.warmup,
            "schedule": settings.schedule,
            "seeds": list(settings.seeds),
            "first rates": {name: list(rates) for name, rates in settings.grids.items()},
            "num_probes": measured[0].spectra["eval"].quadrature.num_probes,
            "Lanczos steps": measured[0].spectra["eval"].quadrature.num_steps,
        },
        _claims(measured, mean[False], predictors[DEFAULT], found, capped, calibration, definitions, order),
        text,
        {
            "architectures": {m.name: _record(m, all_gaps, k) for k, m in enumerate(measured)},
            "JS0": {str(key): values for key, values in predictors.items()},
            "correlations": {str(key): [value.value, value.lower, value.upper] for key, value in found.items()},
            "leave one family out": calibration.leave_one_out,
            "calibration": {"subjects": [vars(s) for s in calibration.subjects], "made": dict(calibration.made)},
        },
        figure=_draw(measured, mean[False], all_gaps[False], predictors),
    )


def _rate(best: Best) -> str:
    return f"{best.rate:.2g}{'*' if best.at_edge else ''}"


def _record(m: Measured, all_gaps: Mapping[bool, list[list[float]]], k: int) -> dict[str, object]:
    return {
        "family": ARCHITECTURES[m.name].family,
        "gaps": all_gaps[False][k],
        "gaps capped": all_gaps[True][k],
        **{
            optimizer: {
                "rate": best.rate,
                "at edge": best.at_edge,
                "tried": {f"{rate:.3g}": "diverged" if v is None else v for rate, v in best.tried.items()},
                "initial": list(best.initial),
                "final": list(best.final),
            }
            for optimizer, best in (("SGD", m.sgd), ("AdamW", m.adamw))
        },
    }


def _claims(
    measured: Sequence[Measured],
    mean: Sequence[float],
    default: Sequence[float],
    found: Mapping[Definition | str, Correlation],
    capped: Correlation,
    calibration: Calibration,
    definitions: Mapping[Definition, Correlation],
    order: Sequence[Definition],
) -> tuple[Claim, ...]:
    sides: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for m, g, js0 in zip(measured, mean, default):
        sides[ARCHITECTURES[m.name].transformer].append((g, js0))
    of = {side: [fmean(column) for column in zip(*pairs)] for side, pairs in sides.items() if pairs}
    positive = [key for key in definitions if definitions[key].lower > 0]
    best = definitions[order[0]]
    correlation = found[DEFAULT]
    needs = sum(s.needs_adam for s in calibration.subjects)
    return (
        Claim(
            "Section 2.3: SGD is worse than Adam where the blocks are heterogeneous, and on par where they are not: "
            "JS0 predicts the gap.",
            f"rank correlation {correlation} of JS0 in the default definition and the gap, n = {len(measured)}; with "
            f"the initial loss capped at chance {capped}; of the spread of log lambda_max {found[SPREAD]}.",
            verdict(correlation.lower > 0, correlation.value > 0.3),
        ),
        Claim(
            "Section 2.5: JS0, suitably defined, tells before training whether SGD can be used.",
            f"{len(positive)} of {len(definitions)} definitions have an interval above zero; the best of all has "
            f"{best} ({order[0]}), chosen after the fact. Leaving one family out, the default's rule decides on "
            f"{calibration.num_decided} of {len(measured)} architectures and is wrong about {calibration.num_wrong}.",
            verdict(not calibration.failure, len(positive) > len(definitions) / 2),
        ),
        Claim(
            "Section 2.1: on Transformers SGD performs significantly worse than Adam, on CNNs they are similar.",
            f"mean gap {of[True][0]:.3f} of Transformers and {of[False][0]:.3f} of all others (JS0 {of[True][1]:.3f} "
            f"and {of[False][1]:.3f}); {needs} of {len(measured)} have a gap above {NEEDED_GAP:g}: "
            f"{', '.join(s.name for s in calibration.subjects if s.needs_adam) or 'none'}.",
            verdict(
                all(g > NEEDED_GAP for g, _ in sides[True]) and all(g <= NEEDED_GAP for g, _ in sides[False]),
                of[True][0] > of[False][0] + NEEDED_GAP,
            ),
        ),
    )


def _draw(
    measured: Sequence[Measured],
    mean: Sequence[float],
    every: Sequence[Sequence[float]],
    predictors: Mapping[Definition | str, Sequence[float]],
) -> Figure:
    figure = new_figure(11.0, 5.0)
    panels = figure.subplots(1, 2, sharey=True)
    drawn: dict[Definition | str, str] = {DEFAULT: "JS0 at initialization, default definition", SPREAD: SPREAD}
    for panel, (key, label) in zip(panels, drawn.items()):
        for k, m in enumerate(measured):
            x = predictors[key][k]
            color = ADAM_COLOR if ARCHITECTURES[m.name].transformer else GD_COLOR
            panel.plot([x, x], [min(every[k]), max(every[k])], color=color, linewidth=1)
            panel.plot([x], [mean[k]], "o", color=color, markersize=5)
            panel.annotate(m.name, (x, mean[k]), xytext=(4, 3), textcoords="offset points", fontsize="x-small")
        panel.axhline(NEEDED_GAP, color="0.7", linestyle="--", linewidth=1)
        panel.set_xlabel(label)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_ylabel("gap between SGD and AdamW (bar: seeds)")
    panels[0].set_title("orange: Transformers; dashed: where Adam counts as needed", fontsize="small")
    return figure
