"""Measure how JS0 and the curvature spread depend on the scale of the axis, sigma, probes, steps and a further block.

    python -m bench.accuracy.comparisons [--json PATH] [--text PATH] [--quick | --show PATH]      # 6 minutes

The spectra at real width are those of docs/results/findings. Those of small networks, for three seeds of weights and
data and two of probes, are computed anew. The scale of the signed-log axis is a multiple of the lower quartile of the
blocks' root mean square eigenvalues; the default is RELATIVE_SCALE.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockhess
from bench.harness import command
from bench.harness.environment import describe, one_line
from blockhess._text import format_table
from blockhess.analysis.axes import RELATIVE_SCALE, Axis, default_scale
from blockhess.analysis.selection import distributions
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import next_token_loss
from blockhess.problem.blocks import BlockInfo
from blockhess.spectra import Spectra
from blockhess_ext.ops import tridiag_quadrature
from blockhess_paper.models import named
from blockhess_paper.networks.batchnorm import weights

FOLDER = Path(__file__).parents[2] / "docs" / "results" / "findings"
POLICIES = ("eval", "frozen_batch_stats", "batch")
SEEDS = ("", "_seed1")
NAMES = tuple(f"{name}{seed}" for seed in SEEDS for name in ("gpt2_nano", *(f"resnet18_{p}" for p in POLICIES)))
SHARES = (1.0, 0.3, 0.1, RELATIVE_SCALE, 0.01)
FLATTER = (1.0, 10.0, 100.0)
STEPS = (5, 10, 20)
IMAGES, WINDOWS = 32, 4


def with_flat_block(spectra: Spectra, factor: float) -> Spectra:
    """Return the spectra with one more block: the flattest one, its eigenvalues divided by a factor."""
    nodes, weights = spectra.merged
    sizes = (weights * nodes**2).sum(1)
    names = spectra.comparable_blocks()
    row = min(spectra.rows(names), key=lambda r: float(sizes[r]))
    q, block = spectra.quadrature, spectra.blocks[row]
    rows = [*range(len(spectra)), row]
    last = torch.ones(len(rows), dtype=torch.float64)
    last[-1] = 1 / factor
    longer = q.select_blocks(rows)
    scaled = {name: getattr(longer, name) * last[:, None] for name in ("nodes", "alpha", "beta")}
    ids = (*q.block_ids, max(q.block_ids) + 1)
    more = dataclasses.replace(longer, **scaled, block_ids=ids)
    errors = dict(spectra.provenance.get("hvp_error") or {})
    errors["one more"] = errors.get(block.name, 0.0) / factor
    info = BlockInfo("one more", block.shape, block.dim, block.parameters)
    return Spectra([*spectra.blocks, info], more, {**spectra.provenance, "hvp_error": errors})


def with_steps(spectra: Spectra, count: int) -> Spectra:
    """Return the spectra that the first `count` steps of every recurrence give."""
    q = spectra.quadrature
    steps = q.steps.clamp(max=count)
    alpha, beta = q.alpha[..., :count], q.beta[..., :count]
    flat = alpha.flatten(0, 1).contiguous(), beta.flatten(0, 1).contiguous(), steps.flatten()
    nodes, weights = (part.view(alpha.shape) for part in tridiag_quadrature(*flat))
    fields = {"nodes": nodes, "weights": weights, "alpha": alpha, "beta": beta, "steps": steps, "num_steps": count}
    return Spectra(spectra.blocks, dataclasses.replace(q, **fields), spectra.provenance)


def axis_of(spectra: Spectra, share: float) -> Axis:
    """Return the signed-log axis with this share of the lower quartile as scale."""
    nodes, weights = distributions(spectra, spectra.comparable_blocks(), Axis("asinh"))
    return Axis("asinh", scale=share / RELATIVE_SCALE * default_scale(nodes, weights))


def changes(spectra: Spectra, share: float) -> dict[str, Any]:
    """Return JS0 with a 95 % interval, and by what it changes."""
    axis = axis_of(spectra, share)
    found = spectra.js0(axis=axis, confidence=0.95)
    assert found.probes_interval is not None and found.stderr is not None

    def change(value: float) -> float:
        return value / found.value - 1

    flatter = [with_flat_block(spectra, factor) for factor in FLATTER]
    return {
        "value": found.value,
        "interval": list(found.probes_interval[:2]),
        "stderr": found.stderr / found.value,
        "half sigma": change(spectra.js0(axis=axis, sigma=0.5 * found.sigma).value),
        "double sigma": change(spectra.js0(axis=axis, sigma=2.0 * found.sigma).value),
        "one more block": [change(more.js0(axis=axis_of(more, share)).value) for more in flatter],
    }


def spread(spectra: Spectra) -> dict[str, Any]:
    """Return the curvature spread with 5, 10 and 20 steps."""
    found = [with_steps(spectra, count).curvature_spread() for count in STEPS]
    assert all(found)
    return {
        "values": [each.value for each in found if each],
        "intervals": [each.interval for each in found if each],
        "ratio": found[-1].ratio if found[-1] else None,
    }


def small_networks(quick: bool) -> list[dict[str, Any]]:
    """Return JS0 and curvature spread of a small GPT and ResNet, for seeds of weights and data, and of probes."""
    rows = []
    text = shakespeare()
    for seed in range(1 if quick else 3):
        torch.manual_seed(seed)
        resnet, gpt = named("resnet18-mini"), named("gpt2-nano-mini", vocab_size=len(text.vocabulary), fused_qkv=False)
        images = tuple(part[seed * IMAGES : (seed + 1) * IMAGES] for part in fashion_mnist(3 * IMAGES))
        windows = text.batches(batch_size=WINDOWS, context=64, seed=seed)
        jobs = {"GPT": (gpt, windows, next_token_loss, "eval")}
        jobs |= {f"ResNet {policy}": (resnet, images, nn.CrossEntropyLoss(), policy) for policy in POLICIES}
        for name, (model, data, loss_fn, policy) in list(jobs.items())[: 2 if quick else None]:
            options = {"blocks": weights(model), "batchnorm": policy, "num_steps": 8 if quick else 20}
            for probes in (seed, seed + 100):
                found = blockhess.spectrum(model, data, loss_fn, num_probes=3, seed=probes, progress=False, **options)
                js0, spread = found.js0(confidence=0.95), found.curvature_spread()
                assert js0.probes_interval is not None and spread is not None
                row = {"network": name, "seed": seed, "probes": probes, "js0": js0.value}
                rows.append(row | {"interval": list(js0.probes_interval[:2]), "spread": spread.value})
            print(f"  {name}, seed {seed}", file=sys.stderr, flush=True)
    return rows


def measure(quick: bool) -> dict[str, Any]:
    """Return the result that the tables show."""
    js0: dict[str, dict[str, Any]] = {}
    spreads: dict[str, dict[str, Any]] = {}
    for name in NAMES[:2] if quick else NAMES:
        spectra = blockhess.load(FOLDER / f"{name}.npz")
        js0[name] = {
            "linear": spectra.js0(axis="linear").value,
            **{f"{share:g}": changes(spectra, share) for share in SHARES},
        }
        spreads[name] = spread(spectra)
        print(f"  {name}", file=sys.stderr, flush=True)
    return {"environment": describe(), "js0": js0, "spread": spreads, "small": small_networks(quick)}


def _largest(found: dict[str, Any], key: str) -> float:
    values = found[key] if isinstance(found[key], list) else [found[key]]
    return max(values, key=abs)


def text(result: dict[str, Any]) -> str:
    """Return the tables of a result."""
    header = [
        "scale / lower quartile",
        "network",
        "JS0",
        "95 %",
        "+- probes",
        "sigma / 2",
        "sigma x 2",
        "one more block",
    ]
    lines = []
    for share in (f"{share:g}" for share in SHARES):
        for name, by_share in result["js0"].items():
            found = by_share[share]
            low, high = found["interval"]
            moves = [_largest(found, key) for key in ("half sigma", "double sigma", "one more block")]
            lines.append(
                [share, name, f"{found['value']:.3f}", f"{low:.3f} ... {high:.3f}", f"{100 * found['stderr']:.1f} %"]
                + [f"{100 * move:+.0f} %" for move in moves]
            )
    spreads = [
        [name, *(f"{value:.3f}" for value in found["values"]), f"{found['intervals'][1][0]:.2f} ... "
         f"{found['intervals'][1][1]:.2f}", f"{float(f'''{found['ratio']:.2g}'''):,g}"]
        for name, found in result["spread"].items()
    ]  # fmt: skip
    small = []
    for first, second in zip(result["small"][::2], result["small"][1::2]):
        change = 100 * (second["js0"] / first["js0"] - 1)
        intervals = [f"{low:.3f} ... {high:.3f}" for low, high in (first["interval"], second["interval"])]
        values = [first["js0"], second["js0"], first["spread"], second["spread"]]
        numbers = [f"{value:.3f}" for value in values]
        start = [first["network"], str(first["seed"])]
        small.append([*start, numbers[0], intervals[0], numbers[1], intervals[1], f"{change:+.1f} %", *numbers[2:]])
    columns = ["network", "seed", "JS0", "95 %", "other probes", "95 %", "change", "spread", "other probes"]
    return "\n".join(
        [
            f"JS0 on the signed-log axis by its scale, {RELATIVE_SCALE:g} being the default: 95 % interval and",
            "relative standard error for the probes; changes if sigma is halved or doubled, and the largest change if",
            "one more block is compared: the flattest again, 10 and 100 times as flat.",
            "",
            format_table(header, lines, left=2),
            "",
            "Curvature spread, in decades, with 5, 10 and 20 Lanczos steps; the 95 % interval is that of 10 steps.",
            "",
            format_table(["network", *(f"{m} steps" for m in STEPS), "95 %", "largest / smallest"], spreads, left=1),
            "",
            "Small networks: JS0 and curvature spread for seeds of weights and data, with three probes and others.",
            "",
            format_table(columns, small, left=1),
            "",
            one_line(result["environment"]),
        ]
    )


def main() -> None:
    command.run(__doc__, measure, text, quick="two networks, to check that it runs")


if __name__ == "__main__":
    main()
