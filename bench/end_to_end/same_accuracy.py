"""The row of the CPU's speed table that measures the time until the Jensen-Shannon matrix has a given accuracy.

The accuracy is that of 10 probes of 100 steps: the largest error of an entry of the matrix, relative to a run with
other random vectors and more steps, on a GPT of one layer with 32 tokens. Ours is timed in full with `spectrum(tol=)`;
the tolerance is the largest of a few that suffices, known in hindsight. Rivals have no tolerance and are shown twice:
with 10 x 100, and with the smallest number of products that suffices in hindsight. Small blocks, which ours computes
exactly, contribute to the largest error, so that of the large blocks alone is given, too.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from torch import Tensor

import blockhess
from bench.end_to_end.fixed_budget import compare_and_time
from bench.end_to_end.slices import PEERS, PROBES, SEED, STEPS, of_rival, ours, probes_of
from bench.harness.machine import Machine
from bench.harness.rows import Row, Rows, Target, faster
from bench.harness.timing import now
from bench.hvp import cases
from bench.hvp.rivals import Case
from blockhess.models import GPTConfig
from blockhess.problem.model_state import fixed_state
from blockhess_ext import ops

# Tolerances of densities in L1, smoothed by 1 % of the range of their block.
TOLERANCES, SIGMA = (0.1, 0.05, 0.02, 0.01, 0.005), 0.01
HINDSIGHT = ", fewest products in hindsight"


def large_blocks(machine: Machine) -> Case:
    """Return a GPT of one layer with nearly all parameters in blocks of 1e5 and more, and 32 tokens."""
    width, context = machine.pick(320, 16, 16), machine.pick(32, 8, 8)
    config = GPTConfig(context=context, num_layers=1, num_heads=4, width=width)
    return cases.gpt("GPT of one layer, width 320", config, 1, 1)


def part(spectra: blockhess.Spectra, probes: slice, steps: int) -> blockhess.Spectra:
    """Return the spectra of some of the probes after fewer steps."""
    q = spectra.quadrature
    made = q.steps[probes].clamp(max=steps)
    alpha, beta = (table[probes, :, :steps].contiguous() for table in (q.alpha, q.beta))
    nodes, weights = ops.tridiag_quadrature(alpha.flatten(0, 1), beta.flatten(0, 1), made.flatten())
    tables = {"nodes": nodes.view_as(alpha), "weights": weights.view_as(alpha), "alpha": alpha, "beta": beta}
    fewer = dataclasses.replace(q, **tables, steps=made, nonfinite=q.nonfinite[probes], num_steps=steps)
    return blockhess.Spectra(spectra.blocks, fewer, spectra.provenance)


def cheapest(
    spectra: blockhess.Spectra, error: Callable[[blockhess.Spectra], float], tolerance: float
) -> tuple[int, int]:
    """Return the number of probes and of steps with the smallest product whose median error is at most `tolerance`."""
    n, m = spectra.quadrature.num_probes, spectra.quadrature.num_steps
    choices = [(p, s) for p in {1, 2, 3, 5, n} if p <= n for s in (m // 8, m // 5, m // 3, m // 2, 3 * m // 4, m)]
    for p, s in sorted(choices, key=lambda choice: choice[0] * choice[1]):
        groups = [slice(first, first + p) for first in range(0, n - p + 1, p)]
        if statistics.median(error(part(spectra, group, s)) for group in groups) <= tolerance:
            return p, s
    return n, m


def row(machine: Machine) -> Row:
    """Measure `spectrum(tol=)` next to rivals with 10 x 100, and with fewer products if they suffice."""
    case = large_blocks(machine)
    probes, steps = machine.pick(PROBES, 2, 2), machine.pick(STEPS, 24, 24)
    with fixed_state(case.model):
        truth = ours(case, num_probes=2 * probes // 3, num_steps=3 * steps, seed=SEED + 1)
        sigma = truth.default_sigma(axis="linear")
        expected: Tensor = truth.js_matrix(axis="linear", sigma=sigma)

        def error(spectra: blockhess.Spectra, blocks: Any = slice(None)) -> float:
            return float((spectra.js_matrix(axis="linear", sigma=sigma) - expected)[blocks][:, blocks].abs().max())

        fixed = ours(case, num_probes=probes, num_steps=steps, engine="traced")  # as rivals, no block computed exactly
        allowed = error(fixed)
        large = [l for l, dim in enumerate(truth.dims) if dim >= machine.pick(10**5, 200, 200)]

        p, s = cheapest(fixed, error, allowed)

        def adaptive(tol: float) -> blockhess.Spectra:
            return ours(case, num_probes=2 * probes, num_steps=2 * steps, tol=tol, tol_sigma=SIGMA)

        for tol in TOLERANCES:
            found = adaptive(tol)
            if error(found) <= allowed:
                break
        counts = {name: probes * min(steps, parameter.numel()) for name, parameter in case.parameters.items()}
        probe = probes_of(ours(case, num_probes=1, num_steps=1, engine="autograd"))
        fewest: dict[str, list[float]] = {name: [] for name in PEERS}

        def seconds_of(name: str) -> float:
            if name == "blockhess":
                begin = now()
                adaptive(tol)
                return now() - begin
            slice_ = of_rival(name, case, counts, probe, machine.pick(5, 1, 1))
            fewest[name].append(slice_.setup + slice_.work * p * s / (probes * steps))
            return slice_.whole

        entries = compare_and_time(case, "traced", seconds_of, machine.pick(3, 1, 1), error(found))
    result = Row.of(entries)
    for name in PEERS:
        if fewest[name]:
            ratios = [a / b for a, b in zip(fewest[name], entries["blockhess"].seconds)]
            result.measured[f"times faster than {name}{HINDSIGHT}"] = statistics.median(ratios)
    result.measured |= {
        "tol": tol,
        "error over that of 10 x 100": error(found) / allowed,
        "the same among blocks of 1e5 and more": error(found, large) / error(fixed, large),
        "products": found.provenance["hvps"],
        "products of rivals": sum(counts.values()),
    }
    result.notes += [
        f"largest error of the JS matrix at sigma {sigma:.3g}, relative to {truth.quadrature.num_probes} probes of "
        f"{truth.quadrature.num_steps} steps: {allowed:.2g} by {probes} x {steps}; {p} x {s} suffice",
        f"ours in full; rivals extrapolated from one probe and {machine.pick(5, 1, 1)} steps of all blocks",
    ]
    return result


ROWS: Rows = {
    "end to end to the same accuracy (adaptive), nearly all in blocks of 1e5 elements": (
        row,
        [
            *(faster(name, 8) for name in PEERS[:3]),
            *(faster(name, 8, HINDSIGHT) for name in PEERS[:3]),
            Target("JS matrix as near the truth as by 10 x 100", "error over that of 10 x 100", 1, False),
        ],
    ),
}
