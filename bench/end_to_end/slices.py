"""Extrapolate the time of a whole job, ours and every rival's, from a part of it.

10 probes of 100 steps take hours with every rival. Of our job, which multiplies all blocks and probes together, the
first steps are timed. What the first one takes longer and everything before it count as set-up: tracing, checks,
recording. Of a rival, which multiplies one vector of one block after the other, the first steps of one probe are timed,
of all blocks or of every n-th; the time of each block per product, including Lanczos, is multiplied by its number of
products.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import blockhess
from bench.harness.timing import now, timed
from bench.hvp import paper_procedure
from bench.hvp.paper_procedure import Quadratures
from bench.hvp.rivals import RIVALS, Case, Product
from blockhess import estimate
from blockhess_ext import batched_slq

PROBES, STEPS, SEED = 10, 100, 0
PEERS = ("the paper's procedure", "hessian-eigenthings", "curvlinops", "PyHessian")

Counts = Mapping[str, int]  # block -> products


@dataclass
class Slice:
    """Extrapolated times of a job, in seconds."""

    setup: float
    work: float  # of products and Lanczos steps
    quadratures: Quadratures = field(default_factory=dict)  # that a rival found

    @property
    def whole(self) -> float:
        return self.setup + self.work


class Stopped(Exception):
    """Raised to stop a job after some of its products."""


@contextmanager
def on_products(call: Callable[[], object]) -> Iterator[None]:
    """Make `blockhess.spectrum` call `call` after every product."""

    @contextmanager
    def bar(*_: object) -> Iterator[Callable[[], object]]:
        yield call

    with mock.patch.object(estimate, "progress_bar", bar):
        yield


def arguments(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a job with the blocks of a case."""
    problem = {"model": case.model, "data": case.batch, "loss_fn": case.criterion}
    return {**problem, "blocks": {name: [name] for name in case.blocks}, "reorthogonalize": "none", **options}


def ours(case: Case, **options: Any) -> blockhess.Spectra:
    """Return the spectra of the blocks of a case by this package."""
    return blockhess.spectrum(**arguments(case, {"seed": SEED, "progress": False, **options}))


def plan(case: Case, **options: Any) -> blockhess.Plan:
    """Return the plan of `ours`."""
    return blockhess.plan(**arguments(case, options))


def of_ours(case: Case, counts: Counts, together: int, steps: int) -> Slice:
    """Return the slice of `spectrum` with PROBES x STEPS, stopped after a few steps.

    Args:
        case: Case with all blocks of the job.
        counts: Products of all blocks of the job.
        together: Products of a step, of all blocks and probes that are estimated.
        steps: Steps to time after the first.
    """
    ends: list[float] = []

    def count() -> None:
        ends.append(now())
        if len(ends) == together * (steps + 1):
            raise Stopped

    begin = now()
    try:
        with on_products(count):
            ours(case, num_probes=PROBES, num_steps=STEPS)
    except Stopped:
        pass
    first, last = ends[together - 1], ends[-1]
    step = (last - first) / steps
    return Slice(first - begin - step, step / together * sum(counts.values()))


def of_rival(name: str, case: Case, counts: Counts, probes: Sequence[dict[str, Tensor]], num_steps: int) -> Slice:
    """Return the slice of a rival, which runs the paper's recurrence block by block.

    Args:
        name: Name of the rival.
        case: Case with the blocks to measure. Set-up is scaled to the number of all blocks.
        counts: Products of all blocks of the job.
        probes: For every probe, block -> unit vector.
        num_steps: Lanczos steps to time.
    """
    begin = now()
    rival = RIVALS[name](case)
    found = Slice(now() - begin, 0.0)
    for block in case.blocks:
        begin = now()
        product = rival.of_block(block)
        found.setup += (now() - begin) * len(counts) / len(case.blocks)
        made = 0

        def products(vectors: dict[str, Tensor], product: Product = product) -> dict[str, Tensor]:
            nonlocal made
            made += 1
            return {name: product(v).reshape(-1).double() for name, v in vectors.items()}

        begin = now()
        found.quadratures |= paper_procedure.lanczos(products, [{block: probe[block]} for probe in probes], num_steps)
        found.work += (now() - begin) / made * counts[block]
    found.work *= sum(counts.values()) / sum(counts[name] for name in case.blocks)
    # The work of a step that all blocks share.
    found.work += max(counts.values()) * statistics.fmean(timed(rival.step) for _ in range(num_steps))
    return found


def probes_of(spectra: blockhess.Spectra) -> list[dict[str, Tensor]]:
    """Return the random vectors of a result: the first input of any operator with the same blocks."""
    q, seen = spectra.quadrature, []

    def operator(v: Tensor) -> Tensor:
        seen.append(v.clone())
        return v

    batched_slq(operator, q.dims, num_probes=q.num_probes, num_steps=1, seed=q.seed, block_ids=q.block_ids)
    return [dict(zip(spectra.names, probe.split(q.dims))) for probe in seen[0]]


def js_matrix(spectra: blockhess.Spectra, quadratures: Quadratures) -> Tensor:
    """Return the Jensen-Shannon matrix of other quadratures of the same probes, at the default sigma of the spectra."""
    q = spectra.quadrature
    nodes, weights = torch.zeros_like(q.nodes), torch.zeros_like(q.weights)
    for l, name in enumerate(spectra.names):
        for p, (x, w) in enumerate(quadratures[name]):
            nodes[p, l], nodes[p, l, : len(x)] = float(x[-1]), torch.from_numpy(x)
            weights[p, l, : len(w)] = torch.from_numpy(w)
    theirs = blockhess.Spectra(spectra.blocks, dataclasses.replace(q, nodes=nodes, weights=weights), spectra.provenance)
    return theirs.js_matrix(
        axis="linear", sigma=spectra.default_sigma(axis="linear"), blocks=spectra.comparable_blocks()
    )
