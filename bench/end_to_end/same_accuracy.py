"""A row of the CPU's speed table: time until the Jensen-Shannon matrix is as accurate as 10 x 100 makes it.

Ours is told a tolerance, and stops where it is reached; rivals are told how many probes and steps to make, of every
block alike. The error is the largest of an entry of the matrix, beside that of a run with other random vectors and more
steps. The tolerance is the largest of a few that does it, known with hindsight; so are, for a second comparison, the
probes and steps that make the fewest products.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

from torch import Tensor

import blockhess
from bench.end_to_end.end_to_end import contest
from bench.end_to_end.slices import PEERS, PROBES, SEED, STEPS, of_rival, ours, probes_of
from bench.harness.machine import Machine
from bench.harness.rows import Row, Target, faster
from bench.harness.timing import now
from bench.hvp import hvp
from bench.hvp.hvp_rivals import Case
from blockhess.models import GPTConfig
from blockhess.problem.model_state import fixed_state
from blockhess_ext import ops

# Of densities in L1, blurred by 1 % of a block's range, as the matrix's are by 1 % of the range of all.
TOLERANCES, SIGMA = (0.1, 0.05, 0.02, 0.01, 0.005), 0.01
HINDSIGHT = ", fewest products in hindsight"


def large_blocks(machine: Machine) -> Case:
    """A GPT of one layer whose parameters are nearly all in blocks of 1e5 and more; 32 tokens."""
    width, context = machine.pick(320, 16, 16), machine.pick(32, 8, 8)
    config = GPTConfig(context=context, num_layers=1, num_heads=4, width=width)
    return hvp.gpt("GPT of one layer, width 320", config, 1, 1)


def part(spectra: blockhess.Spectra, probes: slice, steps: int) -> blockhess.Spectra:
    """What some of the probes would have found in fewer steps."""
    q = spectra.quadrature
    made = q.steps[probes].clamp(max=steps)
    alpha, beta = (table[probes, :, :steps].contiguous() for table in (q.alpha, q.beta))
    nodes, weights = ops.tridiag_quadrature(alpha.flatten(0, 1), beta.flatten(0, 1), made.flatten())
    fewer = dataclasses.replace(
        q,
        nodes=nodes.view_as(alpha),
        weights=weights.view_as(alpha),
        alpha=alpha,
        beta=beta,
        steps=made,
        nonfinite=q.nonfinite[probes],
        num_steps=steps,
    )
    return blockhess.Spectra(spectra.blocks, fewer, spectra.provenance)


def cheapest(spectra: blockhess.Spectra, error: Callable[[blockhess.Spectra], float], most: float) -> tuple[int, int]:
    """Probes and steps with the smallest product whose error is at most `most`: the median over disjoint probes."""
    n, m = spectra.quadrature.num_probes, spectra.quadrature.num_steps
    choices = [(p, s) for p in {1, 2, 3, 5, n} if p <= n for s in (m // 8, m // 5, m // 3, m // 2, 3 * m // 4, m)]
    for p, s in sorted(choices, key=lambda choice: choice[0] * choice[1]):
        groups = [slice(first, first + p) for first in range(0, n - p + 1, p)]
        if statistics.median(error(part(spectra, group, s)) for group in groups) <= most:
            return p, s
    return n, m


def row(machine: Machine) -> Row:
    """`spectrum(tol=)` beside rivals of 10 x 100, and of fewer where fewer would have done."""
    case = large_blocks(machine)
    probes, steps = machine.pick(PROBES, 2, 2), machine.pick(STEPS, 24, 24)
    with fixed_state(case.model):
        truth = ours(case, num_probes=2 * probes // 3, num_steps=3 * steps, seed=SEED + 1)
        sigma = truth.default_sigma()
        expected: Tensor = truth.js_matrix(sigma=sigma)

        def error(spectra: blockhess.Spectra) -> float:
            return float((spectra.js_matrix(sigma=sigma) - expected).abs().max())

        fixed = ours(case, num_probes=probes, num_steps=steps, engine="traced")  # as rivals, nothing written out
        allowed = error(fixed)
        large = [l for l, dim in enumerate(truth.dims) if dim >= machine.pick(10**5, 200, 200)]

        def error_of_large(spectra: blockhess.Spectra) -> float:
            return float((spectra.js_matrix(sigma=sigma) - expected)[large][:, large].abs().max())

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

        def clock(name: str) -> float:
            if name == "blockhess":
                begin = now()
                adaptive(tol)
                return now() - begin
            slice_ = of_rival(name, case, counts, probe, machine.pick(5, 1, 1))
            fewest[name].append(slice_.setup + slice_.work * p * s / (probes * steps))
            return slice_.whole

        entries = contest(case, "traced", clock, machine.pick(3, 1, 1), error(found))
    result = Row.of(entries)
    for name in PEERS:
        if fewest[name]:
            ratios = [a / b for a, b in zip(fewest[name], entries["blockhess"].seconds)]
            result.measured[f"times faster than {name}{HINDSIGHT}"] = statistics.median(ratios)
    result.measured |= {
        "tol": tol,
        "error over that of 10 x 100": error(found) / allowed,
        "the same among blocks of 1e5 and more": error_of_large(found) / error_of_large(fixed),
        "products": found.provenance["hvps"],
        "products of rivals": sum(counts.values()),
    }
    result.notes += [
        f"largest error of the JS matrix at sigma {sigma:.3g}, beside {truth.quadrature.num_probes} probes of "
        f"{truth.quadrature.num_steps} steps: {allowed:.2g} by {probes} x {steps}; {p} x {s} would have done",
        f"ours in full; rivals extrapolated from one probe and {machine.pick(5, 1, 1)} steps of all blocks",
    ]
    return result


ROWS: dict[str, tuple[Callable[[Machine], Row], list[Target]]] = {
    "end to end to the same accuracy (adaptive), nearly all in blocks of 1e5 elements": (
        row,
        [
            *(faster(name, 8) for name in PEERS[:3]),
            *(faster(name, 8, HINDSIGHT) for name in PEERS[:3]),
            Target("JS matrix as near the truth as by 10 x 100", "error over that of 10 x 100", 1, False),
        ],
    ),
}
