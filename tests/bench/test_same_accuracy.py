"""bench/end_to_end/same_accuracy.py: shorter runs, and the smallest number of products that suffices."""

from __future__ import annotations

import pytest
import torch

from bench.end_to_end import fixed_budget, same_accuracy, slices
from blockhess.problem.model_state import fixed_state
from tests.bench.cases import TINY, small_case


def test_fewer_probes_and_steps_are_those_of_a_shorter_run():
    case = small_case()
    with fixed_state(case.model):
        long, short = (
            slices.ours(case, num_probes=p, num_steps=m, first_probe=first, engine="autograd")
            for p, m, first in ((4, 9, 0), (2, 5, 1))
        )
    cut = same_accuracy.part(long, slice(1, 3), 5)
    torch.testing.assert_close(cut.quadrature.steps, short.quadrature.steps)
    torch.testing.assert_close(cut.trace()[0], short.trace()[0])
    torch.testing.assert_close(cut.js_matrix(axis="linear", sigma=0.1), short.js_matrix(axis="linear", sigma=0.1))


def test_cheapest_choice():
    case = small_case()
    with fixed_state(case.model):
        long = slices.ours(case, num_probes=3, num_steps=24, engine="autograd")
    seen = []

    def error(spectra):
        seen.append((spectra.quadrature.nodes.shape[0], spectra.quadrature.num_steps))
        return 1 / (seen[-1][0] * seen[-1][1])

    assert same_accuracy.cheapest(long, error, 1 / 13) == (2, 8)  # of 1 ... 2 x 3, 4, 8, 12, 18, 24
    assert (2, 12) not in seen and seen.count((1, 3)) == 3  # each of the probes alone
    assert same_accuracy.cheapest(long, lambda _: 1.0, 0.5) == (3, 24)


@pytest.mark.slow
def test_rivals_are_timed_to_the_same_accuracy(monkeypatch):
    monkeypatch.setattr(same_accuracy, "PEERS", ("the paper's procedure",))
    monkeypatch.setattr(fixed_budget, "PEERS", ("the paper's procedure",))
    monkeypatch.setattr(same_accuracy, "TOLERANCES", (0.2,))
    monkeypatch.setattr(same_accuracy, "cheapest", lambda *_: (1, 12))
    row = same_accuracy.row(TINY)
    whole, fewer = (
        row.measured[f"times faster than the paper's procedure{words}"] for words in ("", same_accuracy.HINDSIGHT)
    )
    assert whole / 4 < fewer < whole  # a quarter of the products, and all of the set-up
    assert row.measured["tol"] == 0.2 and "1 x 12 suffice" in row.notes[0]
