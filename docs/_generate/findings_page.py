"""Write the measured parts of docs/findings.md from docs/results, so that no number is typed by hand.

python -m docs._generate.paper_results --batchnorm         # spectra for BatchNorm
python -m docs._generate.paper_results table1 fig4 fig3    # the networks
python -m docs._generate.paper_results --plan              # their cost at the paper's size
python -m docs._generate.findings_page                     # rewrite the parts between the markers
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

import blockhess
from blockhess.analysis.axes import Axis
from blockhess.analysis.errors.intervals import student_quantile
from blockhess.analysis.jensen_shannon import JS0
from blockhess.spectra import Spectra
from blockhess_paper.commands import NETWORK_EXPERIMENTS
from blockhess_paper.networks.batchnorm import IMAGE_SIDE, IMAGES, MINI_IMAGES, MINI_RUNS, NUM_STEPS, SEEDS, stem
from blockhess_paper.networks.cost import ASSUMED_SHARE, HOUR, JobCost, format_plans
from blockhess_paper.networks.table1 import PAPER as TABLE_1
from blockhess_paper.scaled_mlp.table3 import ORDERED, PAPER_SIGMA
from blockhess_paper.scaled_mlp.table3 import PAPER as TABLE_3
from docs._generate.readme import ROOT, replaced
from docs._generate.theory_page import experiment_part, result

FOLDER = ROOT / "docs" / "results" / "findings"
PAGE = ROOT / "docs" / "findings.md"

# Description of a measure -> arguments of Spectra.js0.
MEASURES: Mapping[str, Mapping[str, Any]] = {
    "sigma 1% of the range of all blocks": {"axis": "linear"},
    f"sigma {PAPER_SIGMA:.3g}, as in the paper's code": {"axis": "linear", "sigma": PAPER_SIGMA},
    "each block over its spectral radius, 1%": {"axis": Axis(normalize="radius")},
    "each block over its 10th largest, 1%": {"axis": Axis(normalize=10)},
    "asinh axis, 1%": {"axis": "asinh"},
}

DEFAULT = "asinh axis, 1%"  # the measure of js0() without arguments

CLASSES = 10

# Hypothesis -> pattern of the definitions in Tables 1 and 3; the first match counts.
HYPOTHESES = {
    "H3: eigenvalues divided by a sum that may be near zero": r"normalization trace",
    "H1: densities summed without the bin width": r"^unnormalized",
    "H2: symmetrized KL (Jeffreys)": r"^jeffreys",
    "a Jensen-Shannon distance or divergence": r"",
}


@cache
def spectra(stem: str) -> Spectra:
    """Return the committed spectra."""
    return blockhess.load(FOLDER / f"{stem}.npz")


@cache
def js0(stem: str, measure: str) -> JS0:
    """Return JS0 with 95 % intervals."""
    return spectra(stem).js0(**MEASURES[measure], confidence=0.95)


def format_js0(found: JS0) -> str:
    """Return value and interval as text."""
    assert found.probes_interval is not None
    return f"{found.value:.3g} ({found.probes_interval[0]:.2g} ... {found.probes_interval[1]:.2g})"


def compare(first: JS0, second: JS0) -> str:
    """Return "more", "less" or, where the intervals overlap, "undecided"."""
    assert first.probes_interval is not None and second.probes_interval is not None
    if first.probes_interval[0] > second.probes_interval[1]:
        return "more"
    return "less" if first.probes_interval[1] < second.probes_interval[0] else "undecided"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table with numbers aligned to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ResNet18 under every policy, and the GPT -> title.
TITLES = {
    "resnet18_eval": "ResNet18, eval",
    "resnet18_frozen_batch_stats": "ResNet18, frozen statistics",
    "resnet18_batch": "ResNet18, batch statistics",
    "gpt2_nano": "GPT2-nano",
}
NETWORKS = tuple(TITLES)


def default_intervals(name: str, seed: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the 95 % intervals of the curvature spread and, for the probes, of JS0 on the default axis."""
    spread, js = spectra(stem(name, seed)).curvature_spread(), js0(stem(name, seed), DEFAULT)
    assert spread is not None and spread.interval is not None and js.probes_interval is not None
    return spread.interval[:2], js.probes_interval[:2]


def gpt_is_above() -> list[str]:
    """Return the networks and seeds whose intervals of both default measures are below those of GPT2-nano."""
    return [
        f"{TITLES[name]}, seed {seed}"
        for seed in SEEDS
        for name in NETWORKS[:-1]
        if all(a[1] < b[0] for a, b in zip(default_intervals(name, seed), default_intervals("gpt2_nano", seed)))
    ]


def spread_part() -> str:
    """Return curvature spread and JS0 on the default axis of ResNet18 under three policies and of GPT2-nano."""
    rows = []
    for seed in SEEDS:
        for name, title in TITLES.items():
            spread = spectra(stem(name, seed)).curvature_spread()
            assert spread is not None and spread.interval is not None
            low, high, _ = spread.interval
            rows.append(
                [
                    f"{title}, seed {seed}",
                    f"{spread.value:.2f} ({low:.2f} ... {high:.2f})",
                    f"{float(f'{spread.ratio:.2g}'):,g}",
                    format_js0(js0(stem(name, seed), DEFAULT)),
                ]
            )
    above, pairs = gpt_is_above(), len(SEEDS) * (len(NETWORKS) - 1)
    return (
        table(["", "curvature spread, decades", "sharpest / flattest", "JS0, asinh axis"], rows)
        + f"\n\nGPT2-nano is above ResNet18 of the same seed in both measures, with disjoint intervals, in "
        f"{len(above)} of {pairs} comparisons. In parentheses: 95 % intervals, those of JS0 for the probes."
    )


def resolved_part() -> str:
    """Return how many blocks are below sigma on the linear axis."""
    rows = []
    for name, title in TITLES.items():
        counts = []
        for seed in SEEDS:
            mean = spectra(stem(name, seed)).js0(axis="linear")
            low, high = spectra(stem(name, seed)).eigenvalue_range()
            radii = torch.maximum(low.abs(), high.abs())[spectra(stem(name, seed)).rows(mean.blocks)]
            counts.append(f"{int((radii < mean.sigma).sum())} of {len(radii)}")
        rows.append([title, *counts])
    return table(["blocks below sigma, linear axis", *(f"seed {seed}" for seed in SEEDS)], rows)


def against_gpt() -> dict[tuple[str, int], list[str]]:
    """Return (network, seed) -> comparison of its JS0 with that of GPT2-nano, for every measure."""
    return {
        (name, seed): [compare(js0(stem(name, seed), m), js0(stem("gpt2_nano", seed), m)) for m in MEASURES]
        for name in NETWORKS
        for seed in SEEDS
    }


def batchnorm_part() -> str:
    """Return JS0 of ResNet18 under three policies and of GPT2-nano, and counts of the comparisons."""
    words = against_gpt()
    header = ["JS0, distance, base 2", "ResNet18, eval", "frozen statistics", "batch statistics", "GPT2-nano"]
    tables = [
        f"Seed {seed}:\n\n"
        + table(
            [*header, "ResNet18, batch, against GPT2-nano"],
            [
                [m, *(format_js0(js0(stem(name, seed), m)) for name in NETWORKS), word]
                for m, word in zip(MEASURES, words["resnet18_batch", seed])
            ]
            + [["probes of every block", *(str(_probes(name, seed)) for name in NETWORKS), ""]],
        )
        for seed in SEEDS
    ]
    sizes = "; ".join(
        f"{name}: {len(spectra(first))} blocks, {sum(spectra(first).dims):,} parameters"
        for name, first in (("ResNet18", "resnet18_batch"), ("GPT2-nano", "gpt2_nano"))
    )
    steps = {spectra(stem(name, seed)).quadrature.num_steps for name in NETWORKS for seed in SEEDS}
    engines = {spectra(stem(name, seed)).provenance["engine"] for name in NETWORKS for seed in SEEDS}
    return (
        "\n\n".join(tables)
        + '\n\nIn parentheses: 95 % intervals for the probes; "more" and "less" where they do not overlap. '
        + f"{sizes}. {', '.join(map(str, steps))} Lanczos steps by the engine {', '.join(engines)}."
        + "".join("\n\n" + _counted(seed, words) for seed in SEEDS)
        + "\n\n"
        + _in_every_seed(words)
    )


def _probes(name: str, seed: int) -> int:
    return spectra(stem(name, seed)).quadrature.num_probes


def _in_every_seed(words: Mapping[tuple[str, int], list[str]]) -> str:
    """Return the comparisons of ResNet18 and GPT2-nano that hold for all seeds."""

    def counted(name: str, word: str) -> str:
        held = [m for m, *found in zip(MEASURES, *(words[name, seed] for seed in SEEDS)) if set(found) == {word}]
        return f"{word} in {len(held)}" + (f" ({'; '.join(held)})" if held else "")

    return (
        f"For every seed, of the {len(MEASURES)} measures ResNet18 is, against GPT2-nano: with batch statistics "
        + ", ".join(counted("resnet18_batch", word) for word in ("more", "less", "undecided"))
        + "; in eval mode "
        + ", ".join(counted("resnet18_eval", word) for word in ("more", "less", "undecided"))
        + "."
    )


def frozen_part() -> str:
    """Return the share of the growth of JS0 that remains with frozen statistics."""
    return table(
        ["share of the growth of JS0 from eval mode to batch statistics", *(f"seed {seed}" for seed in SEEDS)],
        [[m, *(f"{100 * frozen_share(m, seed):.0f} %" for seed in SEEDS)] for m in MEASURES],
    )


def frozen_share(measure: str, seed: int) -> float:
    """Return (JS0 frozen - JS0 eval) / (JS0 batch - JS0 eval) of ResNet18."""
    policies = ("eval", "frozen_batch_stats", "batch")
    in_eval_mode, frozen, batch = (js0(stem(f"resnet18_{policy}", seed), measure).value for policy in policies)
    return (frozen - in_eval_mode) / (batch - in_eval_mode)


def limits_part() -> str:
    """Return the limits of the tables at full width and the meaning of their intervals."""
    probes = sorted({_probes(name, seed) for name in NETWORKS for seed in SEEDS})
    found = [js0(stem(name, seed), m) for name in NETWORKS for seed in SEEDS for m in MEASURES]
    outside = sum(
        not each.probes_interval[0] <= each.value <= each.probes_interval[1] for each in found if each.probes_interval
    )
    named = len(probes) > 1
    factors = " and ".join(f"{student_quantile(0.95, n - 1):.1f}{f' ({n})' if named else ''}" for n in probes)
    return (
        f"Limits: one architecture of each kind at real width; {len(SEEDS)} seeds there, each of weights, data and "
        f"probes at once; {IMAGES} gray images of {IMAGE_SIDE} x {IMAGE_SIDE} and "
        f"{spectra('gpt2_nano').provenance['weight']:.0f} characters a seed; {NUM_STEPS} Lanczos steps. A block has "
        f"{' or '.join(map(str, probes))} probes, so the half-width of an interval is {factors} standard errors, "
        "themselves estimated from so few; it is centered at the value minus the jackknife's bias, which leaves "
        f"{outside} of the {len(found)} values outside. Each interval has 95 % confidence by itself: of {len(found)} "
        f"some may miss. None covers the variation over weights, data and steps, of which {len(SEEDS)} seeds give only "
        "an impression."
    )


def _counted(seed: int, words: Mapping[tuple[str, int], list[str]]) -> str:
    """Return how often ResNet18 is more heterogeneous than GPT2-nano, in either mode."""

    def counts(name: str) -> str:
        return "more heterogeneous in {}, less in {}, undecided in {}".format(
            *(words[name, seed].count(word) for word in ("more", "less", "undecided"))
        )

    def factors(first: str, second: str) -> str:
        found = [js0(stem(first, seed), m).value / js0(stem(second, seed), m).value for m in MEASURES]
        return f"{min(found):.2g} ... {max(found):.2g}"

    return (
        f"Seed {seed}: of the {len(MEASURES)} measures, ResNet18 with batch statistics is, against GPT2-nano, "
        f"{counts('resnet18_batch')}; its JS0 is {factors('resnet18_batch', 'gpt2_nano')} times as large. In eval mode "
        f"it is {counts('resnet18_eval')}. From eval mode to batch statistics JS0 grows by factors of "
        f"{factors('resnet18_batch', 'resnet18_eval')}, with the same weights and images."
    )


def mechanism_part() -> str:
    """Return sizes and signs of the spectra under every policy."""
    rows = [
        [f"{title}, seed {seed}", *_signs(spectra(stem(name, seed)))]
        for seed in SEEDS
        for name, title in TITLES.items()
    ]
    s = spectra("resnet18_eval")
    smallest = min(s.dims)
    return (
        table(
            [
                "",
                "loss",
                "flattest block",
                "sharpest block",
                "negative eigenvalues, mean",
                "largest negative / largest",
            ],
            rows,
        )
        + "\n\nFlattest and sharpest: smallest and largest, over the blocks, of the largest |eigenvalue|. Last column: "
        "largest over the blocks of |smallest eigenvalue| / largest eigenvalue. "
        + f"With {IMAGES} images and {CLASSES} classes the rank of a block is at most {IMAGES * (CLASSES - 1)} in the "
        f"first two rows of each seed; the smallest block there has {smallest:,} parameters, the largest "
        f"{max(s.dims):,}."
    )


def _signs(s: Spectra) -> list[str]:
    low, high = s.eigenvalue_range()
    radius = torch.maximum(low.abs(), high.abs())
    share = (-low / high.clamp(min=torch.finfo(torch.float64).tiny)).clamp(min=0).max()
    return [
        f"{s.provenance['loss_value']:.3f}",
        f"{float(radius.min()):.2g}",
        f"{float(radius.max()):.2g}",
        f"{100 * float(s.negative_mass().mean()):.1f} %",
        f"{float(share):.2g}",
    ]


def small_summary() -> dict[str, tuple[float, list[bool], list[float]]]:
    """Return measure -> JS0 of the small ResNet in eval mode with the most images over the fewest; whether batch
    statistics raise it, for every run; and its ratio to the small GPT, for every run."""
    found = {}
    for measure in MEASURES:
        fewest, most = (js0(f"mini_resnet_eval_{MINI_IMAGES[i]}_seed0", measure).value for i in (0, -1))
        batch, eval_mode = (
            [js0(f"mini_resnet_{policy}_{count}_seed{seed}", measure).value for count, seed in MINI_RUNS]
            for policy in ("batch", "eval")
        )
        gpt = [js0(f"mini_gpt_seed{seed}", measure).value for _, seed in MINI_RUNS]
        above = [b > e for b, e in zip(batch, eval_mode)]
        found[measure] = most / fewest, above, [b / g for b, g in zip(batch, gpt)]
    return found


def small_part() -> str:
    """Return the influence of the number of images and of the seed, on the small networks."""
    policies = ("eval", "frozen_batch_stats", "batch")
    rows = []
    for measure in MEASURES:
        for count, seed in MINI_RUNS:
            stems = [f"mini_resnet_{policy}_{count}_seed{seed}" for policy in policies]
            values = [f"{js0(stem, measure).value:.3g}" for stem in (*stems, f"mini_gpt_seed{seed}")]
            rows.append([measure, f"{count} images, seed {seed}", *values])
    probes = {spectra(path.stem).quadrature.num_probes for path in FOLDER.glob("mini_*.npz")}
    bound = MINI_IMAGES[-1] * (CLASSES - 1)
    dims = spectra(f"mini_resnet_eval_{MINI_IMAGES[-1]}_seed0").dims
    found = small_summary()
    summary = [
        [measure, f"{factor:.2f}", f"{sum(above)} of {len(above)}", f"{min(ratios):.2g} ... {max(ratios):.2g}"]
        for measure, (factor, above, ratios) in found.items()
    ]
    rising = sum(sum(above) for _, above, _ in found.values())
    above_gpt = sum(ratio > 1 for _, _, ratios in found.values() for ratio in ratios)
    return (
        table(["JS0", "data", "ResNet, eval", "frozen statistics", "batch statistics", "GPT"], rows)
        + f"\n\nJS0 is larger with batch statistics than in eval mode in {rising} of {len(rows)} rows, and larger "
        f"than the small GPT's of the same seed in {above_gpt}. {sum(spectra('mini_resnet_eval_8_seed0').dims):,} and "
        f"{sum(spectra('mini_gpt_seed0').dims):,} parameters; {min(probes)} to {max(probes)} probes: no intervals."
        f" With {MINI_IMAGES[-1]} images the bound on the rank is {bound:,}: below the parameters of "
        f"{sum(dim > bound for dim in dims)} of the {len(dims)} blocks.\n\n"
        + table(
            ["by measure", f"eval mode: {MINI_IMAGES[-1]} images / {MINI_IMAGES[0]}",
             "batch statistics above eval mode", "batch statistics / GPT"],
            summary,
        )
    )  # fmt: skip


def definition_part() -> str:
    """Return how closely every hypothesis on the paper's definition reproduces Tables 3 and 1."""
    rows = []
    table3, table1 = result("table3")["numbers"]["judged"], result("table1")["numbers"]["judged"]["eval"]
    rest3, rest1 = dict(table3), dict(table1)
    for hypothesis, pattern in HYPOTHESES.items():
        row = [hypothesis]
        for rest in (rest3, rest1):
            mine = {key: rest.pop(key) for key in list(rest) if re.search(pattern, key)}
            closest = min(mine.values(), key=lambda judged: judged[0])
            alike = min(mine.values(), key=lambda judged: judged[1])
            row += [f"{closest[0]:.3g}", f"{alike[1]:.3g}", f"{max(judged[2] for judged in mine.values()):.2f}"]
        rows.append(row)
    rows.append(["one number for all", *_constant(TABLE_3), *_constant(TABLE_1)])
    ordered = {
        policy: [key for key, judged in result("table1")["numbers"]["judged"][policy].items() if judged[2] > ORDERED]
        for policy in ("eval", "batch")
    }
    best3 = min(table3, key=lambda key: table3[key][0])
    best1 = min(table1, key=lambda key: table1[key][0])
    return (
        table(
            ["", "Table 3: factor", "scaled", "best rank", "Table 1: factor", "scaled", "best rank"],
            rows,
        )
        + "\n\nFactor: root mean square factor between the paper's numbers and those of the closest definition; "
        f"scaled: the same after the best common factor. {len(table3)} definitions for Table 3, {len(table1)} "
        f"for Table 1 (BatchNorm eval). Closest to Table 3: {best3}; to Table 1: {best1}."
        + "".join(
            f"\n\nRank correlation with Table 1 above {ORDERED}, BatchNorm {policy}: {'; '.join(keys) or 'none'}."
            for policy, keys in ordered.items()
        )
    )


def _constant(paper: tuple[float, ...]) -> list[str]:
    factor = math.exp(statistics.pstdev([math.log(value) for value in paper]))
    return [f"{factor:.3g}", f"{factor:.3g}", "-"]


def plan_part() -> str:
    """Return the cost of the jobs at the paper's size."""
    content = result("plan")
    names = [field.name for field in dataclasses.fields(JobCost)]
    jobs = [JobCost(**{name: job[name] for name in names}) for job in content["jobs"]]
    return (
        f"```text\n{format_plans(jobs, 'this CPU', None)}\n```\n\n{wanted(jobs)}\n\n"
        "Made by `python -m docs._generate.paper_results --plan` (`blockhess paper plan` prints it anew); rates by CPU "
        f"time, on a busy machine (load {content['load'][0]:.1f}); "
        + ", ".join(f"{key} {value}" for key, value in content["environment"].items())
    )


def wanted(jobs: Sequence[JobCost]) -> str:
    """Return the targets on an H100 that the jobs would meet under the assumption."""
    met, missed = [], []
    for work in jobs:
        record = work.to_dict(None)
        for kind, target in record["seconds_wanted_on_h100"].items():
            seconds = record["seconds_extrapolated"][f"H100, {kind}"]
            words = f"{work.title} in {kind} ({seconds / HOUR:.2g} hours against {target / HOUR:.2g})"
            (met if seconds <= target else missed).append(words)
    return (
        f"**No step was timed on an H100.** At {100 * ASSUMED_SHARE:.0f} % of its peak the target would "
        f"be missed by {', '.join(missed) or 'none'} and met by {', '.join(met) or 'none'}."
    )


# Target of every figure with its defaults on two cores; and what experiments reuse of others in the same folder.
MOST_SECONDS = 600.0
REUSED = {
    "fig3": "the spectra of table1",
    "fig4": "the spectra of table1",
    "fig10": "trainings made before",
    "fig11": "trainings made before",
}


def times_part() -> str:
    """Return the times of the CPU-sized figures, and which results they reuse."""
    rows, missed = [], []
    for name in ("table1", "fig3", "fig4", "fig1", "fig10", "fig11"):
        content = result(name)
        seconds, cpu = content["seconds"], content["cpu_seconds"]
        threads = content["environment"]["threads"]
        if seconds > MOST_SECONDS:
            missed.append(f"{name} ({seconds / 60:.1f} minutes, {cpu / 60:.1f} of CPU time)")
        rows.append([f"`{name}`", f"{seconds:.0f}", f"{cpu:.0f}", f"{threads}", REUSED.get(name, "none")])
    return (
        table(["", "seconds", "CPU seconds", "threads", "reuses, not counted"], rows)
        + f"\n\nThe target is {MOST_SECONDS / 60:.0f} minutes each on two cores, missed by "
        + f"{', '.join(missed) or 'none'}. The machine was busy with other programs, so no run shows the time on "
        "an idle one; CPU seconds are those of the process itself. Whether a run resumed an interrupted one is not "
        "recorded."
    )


def environment_part() -> str:
    """Return where the spectra were made, as far as the files record it."""
    made = [spectra(path.stem).provenance for path in sorted(FOLDER.glob("*.npz"))]
    minutes = sum(provenance["seconds"] for provenance in made) / 60
    versions = ", ".join(sorted({provenance["torch"] for provenance in made}))
    places: dict[str, int] = {}
    for provenance in made:
        for place in provenance.get("made_at", ()):
            where = ", ".join(f"{key} {value}" for key, value in place.items() if key != "date")
            places[where] = places.get(where, 0) + 1
    unknown = sum(provenance["num_probes"] for provenance in made) - sum(places.values())
    return (
        f"`python -m docs._generate.paper_results --batchnorm`: {len(made)} files, {minutes:.0f} minutes on a busy "
        f"machine; torch {versions}. Every file records its engine, options and seeds."
        + "".join(
            f"\n\n{count} of the probes (each of all blocks of a file) were made with: {place}."
            for place, count in places.items()
        )
        + (f"\n\nFor the other {unknown} the files do not record it." if unknown else "")
    )


def page(text: str) -> str:
    """Return the page with every measured part rewritten."""
    parts = {
        "spread": spread_part,
        "resolved": resolved_part,
        "batchnorm": batchnorm_part,
        "frozen": frozen_part,
        "mechanism": mechanism_part,
        "limits": limits_part,
        "small": small_part,
        "definition": definition_part,
        "times": times_part,
        "plan": plan_part,
        "environment": environment_part,
    }
    for name, part in parts.items():
        text = replaced(text, name, part())
    for name in NETWORK_EXPERIMENTS:
        text = replaced(text, name, experiment_part(name))
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
