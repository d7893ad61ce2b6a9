"""What a whole job takes, from a part of it: ours and every rival's, with the spectra that they find.

Nobody has the hours that 10 probes of 100 steps take with every rival. So one probe's first steps are timed, of all
blocks or of every so many-th: the first step and what comes before it as set-up, whose programs are traced, compiled
and loaded then; of the others, each block's time for a product, Lanczos and all, times its number of products.
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
from bench.hvp.hvp_rivals import RIVALS, Case, Product
from bench.hvp.paper_procedure import Quadratures
from blockhess import estimate
from blockhess_ext import batched_slq

PROBES, STEPS, SEED = 10, 100, 0
PEERS = ("the paper's procedure", "hessian-eigenthings", "curvlinops", "PyHessian")

Counts = Mapping[str, int]  # block -> products


@dataclass
class Slice:
    """What a job takes, in seconds.

    Attributes:
        setup: all that is prepared. work: products and what goes with them. quadratures: that a rival found.
    """

    setup: float
    work: float
    quadratures: Quadratures = field(default_factory=dict)

    @property
    def whole(self) -> float:
        return self.setup + self.work


class Stopped(Exception):
    """A job was stopped, as was asked for."""


@contextmanager
def on_products(call: Callable[[], object]) -> Iterator[None]:
    """`blockhess.spectrum` calls `call` after every product."""

    @contextmanager
    def bar(*_: object) -> Iterator[Callable[[], object]]:
        yield call

    with mock.patch.object(estimate, "progress_bar", bar):
        yield


def ours(case: Case, **options: Any) -> blockhess.Spectra:
    """The spectra of the blocks of a case."""
    defaults: dict[str, Any] = {"seed": SEED, "reorthogonalize": "none", "progress": False}
    blocks = {name: [name] for name in case.blocks}
    return blockhess.spectrum(case.model, case.batch, case.criterion, blocks=blocks, **(defaults | options))


def plan(case: Case, **options: Any) -> blockhess.Plan:
    """What `ours` will do."""
    blocks = {name: [name] for name in case.blocks}
    return blockhess.plan(
        case.model, case.batch, case.criterion, blocks=blocks, reorthogonalize="none", **options
    )  # fmt: skip


def scale(case: Case, counts: Counts) -> float:
    """All products over those of the blocks measured."""
    return sum(counts.values()) / sum(counts[name] for name in case.blocks)


def of_ours(case: Case, counts: Counts, steps: int) -> Slice:
    """Of `spectrum`, told to make as many products a block as 10 probes of 100 steps, and stopped.

    Args:
        case: with the blocks that are measured. What is prepared for them counts for the others in proportion.
        counts: of all blocks of the job.
        steps: that are timed, after the first.
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
    each = [b - a for a, b in pairwise(ends[n - 1 :])]  # product by product, block by block
    of_block = [statistics.fmean(each[l::n]) for l in range(n)]
    setup = (ends[n - 1] - begin - sum(of_block)) * len(counts) / n
    work = sum(seconds * counts[name] for name, seconds in zip(case.blocks, of_block))
    return Slice(setup, work * scale(case, counts))


def of_rival(name: str, case: Case, counts: Counts, probes: Sequence[dict[str, Tensor]], num_steps: int) -> Slice:
    """Of a rival, whose products go through the paper's recurrence, block after block, as its users must.

    Args:
        case: with the blocks that are measured.
        counts: of all blocks of the job.
        probes: of every probe the unit vector of every block measured.
        num_steps: Lanczos steps that are timed.
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
    # What it does once a step for all blocks.
    found.work += PROBES * STEPS * statistics.fmean(timed(rival.step) for _ in range(num_steps))
    return found


def probes_of(spectra: blockhess.Spectra) -> list[dict[str, Tensor]]:
    """The random vectors that a result was made with: the first input of any operator of these dims and ids."""
    q, seen = spectra.quadrature, []

    def operator(v: Tensor) -> Tensor:
        seen.append(v.clone())
        return v

    batched_slq(operator, q.dims, num_probes=q.num_probes, num_steps=1, seed=q.seed, block_ids=q.block_ids)
    return [dict(zip(spectra.names, probe.split(q.dims))) for probe in seen[0]]


def js_matrix(spectra: blockhess.Spectra, quadratures: Quadratures) -> Tensor:
    """Of other quadratures of the probes of these spectra, at the sigma that the spectra ask for."""
    q = spectra.quadrature
    nodes, weights = torch.zeros_like(q.nodes), torch.zeros_like(q.weights)
    for l, name in enumerate(spectra.names):
        for p, (x, w) in enumerate(quadratures[name]):
            nodes[p, l], nodes[p, l, : len(x)] = float(x[-1]), torch.from_numpy(x)
            weights[p, l, : len(w)] = torch.from_numpy(w)
    theirs = blockhess.Spectra(spectra.blocks, dataclasses.replace(q, nodes=nodes, weights=weights), spectra.provenance)
    return theirs.js_matrix(sigma=spectra.default_sigma())
