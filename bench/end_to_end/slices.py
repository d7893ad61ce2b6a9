"""Extrapolate the time of a whole job, ours and every rival's, from a part of it.

10 probes of 100 steps take hours with every rival. Therefore the first steps of one probe are timed, of all blocks or
of every n-th. The first step and everything before it count as set-up, since programs are traced, compiled and loaded
then. From the later steps, the time of each block per product, including Lanczos, is multiplied by its number of
products.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
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


def _arguments(case: Case, options: dict[str, Any]) -> dict[str, Any]:
    problem = {"model": case.model, "data": case.batch, "loss_fn": case.criterion}
    return {**problem, "blocks": {name: [name] for name in case.blocks}, "reorthogonalize": "none", **options}


def ours(case: Case, **options: Any) -> blockhess.Spectra:
    """Return the spectra of the blocks of a case by this package."""
    return blockhess.spectrum(**_arguments(case, {"seed": SEED, "progress": False, **options}))


def plan(case: Case, **options: Any) -> blockhess.Plan:
    """Return the plan of `ours`."""
    return blockhess.plan(**_arguments(case, options))


def scale(case: Case, counts: Counts) -> float:
    """Return the products of all blocks divided by those of the measured blocks."""
    return sum(counts.values()) / sum(counts[name] for name in case.blocks)


def of_ours(case: Case, counts: Counts, steps: int) -> Slice:
    """Return the slice of `spectrum` with one probe of PROBES * STEPS steps, stopped after a few of them.

    Args:
        case: Case with the blocks to measure. Set-up is scaled to the number of all blocks.
        counts: Products of all blocks of the job.
        steps: Steps to time after the first.
    """
    ends: list[float] = []
    n = len(case.blocks)

    def count() -> None:
        ends.append(now())
        if len(ends) == n * (steps + 1):
            raise Stopped

    begin = now()
    try:
        with on_products(count):
            ours(case, num_probes=1, num_steps=PROBES * STEPS)
    except Stopped:
        pass
    each = [b - a for a, b in pairwise(ends[n - 1 :])]  # products of all steps; blocks take turns
    of_block = [statistics.fmean(each[l::n]) for l in range(n)]
    setup = (ends[n - 1] - begin - sum(of_block)) * len(counts) / n
    work = sum(seconds * counts[name] for name, seconds in zip(case.blocks, of_block))
    return Slice(setup, work * scale(case, counts))


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
    found.work *= scale(case, counts)
    # The work of a step that all blocks share.
    found.work += PROBES * STEPS * statistics.fmean(timed(rival.step) for _ in range(num_steps))
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
    return theirs.js_matrix(sigma=spectra.default_sigma())
