"""Several processes share a job: the same result as one alone, and no process that waits for one that has failed."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blockhess
from blockhess.hvp.autograd import AutogradEngine
from blockhess.problem.batches import as_batches
from blockhess.problem.blocks import partition
from blockhess.problem.losses import make_loss
from blockhess.problem.problem import Problem
from blockhess.results.unit import Unit
from blockhess.run.costs import product_costs
from blockhess.run.split_work import items_of, shared
from blockhess.run.storage import directory
from tests.helpers import distributed_cases as cases

NAMES = {
    2: tuple(name for name in cases.CASES if name != "mesh"),
    4: ("work", "data", "mesh", "adaptive"),
}


SIZES = (2, pytest.param(4, marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """World size -> case -> what every rank got; a world is run when it is first asked for."""

    class Worlds(dict):
        def __missing__(self, size):
            ranks = cases.run(size, tmp_path_factory.mktemp("world"), NAMES[size])
            self[size] = {name: [rank[name] for rank in ranks] for name in NAMES[size]}
            return self[size]

    return Worlds()


@pytest.fixture(scope="module")
def two(worlds):
    return worlds[2]


def alone(**options):
    return cases.values(blockhess.spectrum(cases.model(), cases.batches(), cases.LOSS, **options))


def same_bits(a, b):
    return all(torch.equal(a[name], b[name]) for name in cases.TENSORS)


def expect_error(found, kind, *texts):
    for rank, text in enumerate(found):
        assert isinstance(text, str), f"rank {rank} raised nothing"
        assert text.startswith(kind) and all(part in text for part in texts), text


@pytest.mark.parametrize("size", SIZES)
def test_shared_work_gives_the_bits_of_one_process(worlds, size):
    expected = alone(**cases.OPTIONS)
    for found in worlds[size]["work"]:
        assert same_bits(found, expected)
        assert found["hvps"] == expected["hvps"] and found["processes"] == [size, 1]
        assert found["gradient_norms"] == expected["gradient_norms"]
    assert not same_bits(expected, alone(**cases.OPTIONS | {"seed": 1}))


@pytest.mark.parametrize("size", SIZES)
def test_shared_work_takes_the_same_adaptive_decisions(worlds, size):
    expected = alone(**cases.OPTIONS | {"engine": "auto", "num_probes": 6, "num_steps": 20, "tol": 0.05})
    assert all(same_bits(found, expected) for found in worlds[size]["adaptive"])


def test_a_fresh_seed_is_the_same_on_all_ranks(two):
    first, second = two["fresh_seed"]
    assert same_bits(first, second)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (2, "data"),
        (2, "own_data"),
        (2, "slow_rank"),
        pytest.param(4, "data", marks=pytest.mark.slow),
        pytest.param(4, "mesh", marks=pytest.mark.slow),
    ],
)
def test_shared_batches_give_the_same_hessian(worlds, size, name):
    expected = alone(**cases.DOUBLE)
    first = worlds[size][name][0]
    for found in worlds[size][name]:
        assert same_bits(found, first)
        assert cases.close(found["nodes"], expected["nodes"])
        assert math.isclose(found["loss_value"], expected["loss_value"], rel_tol=1e-12)
        assert found["weight"] == expected["weight"] == 30 and found["hvps"] == expected["hvps"]
        assert found["gradient_norms"] == pytest.approx(expected["gradient_norms"], rel=1e-9)
    changed = cases.values(blockhess.spectrum(cases.model(), cases.batches()[:4], cases.LOSS, **cases.DOUBLE))
    assert not cases.close(changed["nodes"], first["nodes"])


def test_losses_that_sum_over_samples_are_summed_over_ranks(two):
    loss = torch.nn.CrossEntropyLoss(reduction="sum")
    expected = cases.values(blockhess.spectrum(cases.model(), cases.batches(), loss, **cases.DOUBLE))
    for found in two["summed_loss"]:
        assert cases.close(found["nodes"], expected["nodes"], growth=1e6)
        assert found["gradient_norms"] == pytest.approx(expected["gradient_norms"], rel=1e-9)
        assert math.isclose(found["loss_value"], expected["loss_value"], rel_tol=1e-12)


def test_batch_statistics_are_averaged_over_ranks(two):
    options = cases.DOUBLE | {"batchnorm": "frozen_batch_stats"}
    whole = cases.values(blockhess.spectrum(cases.normalised(), cases.batches(), cases.LOSS, **options))
    assert all(cases.close(found["nodes"], whole["nodes"], growth=1e10) for found in two["statistics"])


def test_the_gain_of_sign_descent_is_that_of_all_batches(two):
    expected = blockhess.sign_gain(cases.model(), cases.batches(), cases.LOSS, dtype=torch.float64)
    for found in two["sign_gain"]:
        assert found["value"] == pytest.approx(expected.value, rel=1e-9) and found == two["sign_gain"][0]
    own = blockhess.sign_gain(cases.model(), cases.batches()[1:], cases.LOSS, dtype=torch.float64)
    assert own.value != pytest.approx(expected.value, rel=1e-9)


def test_ddp_models_are_taken(two):
    assert same_bits(two["wrapped"][0], alone(**cases.OPTIONS))


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("other_option", ("num_probes", "rank 0", "rank 1")),
        ("other_model", ("parameters",)),
        ("other_version", ("blockhess",)),
        ("other_mesh", ("parallel", "recurrences", "data")),
        ("wrong_mesh", ("product is the world size 2, got (3, 1)",)),
        ("other_data", ("must be the same on all ranks",)),
        ("few_batches", ("a batch for each of the 2 ranks", "got 1")),
        ("little_work", ("no more ranks than there are recurrences, 1, got 2",)),
    ],
)
def test_errors_of_all_ranks_are_the_same(two, name, texts):
    expect_error(two[name], "ValueError: spectrum: ", *texts)
    assert len(set(two[name])) == 1


def test_the_error_of_one_rank_ends_all(two):
    for name, text in (
        ("one_bad_option", "ValueError: spectrum: num_steps must be"),
        ("work_fails", "Failure: on rank 1"),
        ("data_fails", "Failure: on rank 1"),
        ("data_fills_memory", "OutOfMemoryError: spectrum: memory_budget must be below"),
        (
            "posing_fails",
            "ValueError: spectrum: loss_fn(model, batch) must run on the data, got OverflowError in loss_fn",
        ),
    ):
        other, failed = two[name]
        assert failed.startswith(text)
        assert other.startswith("RankError: spectrum: rank 1 failed with " + text), other


def test_parallel_needs_a_process_group():
    with pytest.raises(ValueError, match=r"parallel='recurrences' needs torch.distributed.init_process_group\(\)"):
        blockhess.spectrum(cases.model(), cases.batches(), cases.LOSS, parallel="recurrences", **cases.OPTIONS)


@pytest.mark.parametrize(
    ("parallel", "places"),
    [
        ("recurrences", [(2, 3), (4, 2), (1, None)]),
        ("data", [(2, 4), (2, None)]),
        ("sharded", [(2, 4), (2, None)]),
    ],
)
def test_a_killed_rank_costs_nothing_that_was_finished(tmp_path, parallel, places):
    found, killed = cases.killed_and_resumed(tmp_path, parallel, places)
    assert killed == len(places) - 1
    expected = alone(**cases.OPTIONS | ({"engine": "difference"} if parallel == "sharded" else {}))
    for spectra, _ in found:
        assert spectra["hvps"] == expected["hvps"]
        if parallel == "recurrences":
            assert same_bits(spectra, expected)
        else:
            assert (spectra["nodes"] - expected["nodes"]).abs().max() < (1e-4 if parallel == "sharded" else 1e-5)
            assert same_bits(spectra, found[0][0])
    run = tmp_path / "run"
    parts = directory.parts(run, directory.read_run(run)["id"])
    made = [item for _, done, _ in parts for item in items_of(done.unit)]
    assert sorted(made) == [(block, probe) for block in range(6) for probe in range(3)]
    if parallel != "recurrences":
        assert all(steps <= cases.OPTIONS["num_steps"] - 3 for _, steps in found)  # the state was taken up


@pytest.mark.slow
@pytest.mark.parametrize("seed", (2, 3))  # which kill both ranks
def test_ranks_with_shards_killed_at_random_moments_resume_to_the_same_bits(tmp_path, seed):
    rng, folder = random.Random(seed), tmp_path / "undisturbed"
    folder.mkdir()
    expected = cases.killed_and_resumed(folder, "sharded", [(2, None)])[0]
    worlds = [*((2, rng.randint(1, 3)) for _ in range(3)), (2, None)]
    moments = [(rng.randrange(2), rng.uniform(0.0, 0.2)) for _ in worlds]
    found, killed = cases.killed_and_resumed(tmp_path, "sharded", worlds, moments)
    assert killed, "no rank was killed"
    for (spectra, _), (right, _) in zip(found, expected):
        assert same_bits(spectra, right)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(1, 7),
    st.randoms(use_true_random=False),
)
def test_shares_hold_every_recurrence_once_and_are_balanced(shapes, size, random):
    units, block = [], 0
    for first, probes, blocks in shapes:
        units.append(Unit(first, probes, tuple(range(block, block + blocks))))
        block += blocks
    units.append(Unit(0, 0, (block, block + 1)))
    everything = [item for unit in units for item in items_of(unit)]
    costs = {item: random.uniform(0.1, 1.0) for item in everything}
    done = {item for item in everything if random.random() < 0.2}
    shares = shared(units, lambda *item: costs[item], size, done)
    got = [item for share in shares for unit in share for item in items_of(unit)]
    assert sorted(got) == sorted(set(everything) - done)
    loads = [sum(costs[item] for unit in share for item in items_of(unit)) for share in shares]
    assert max(loads) <= sum(loads) / size + max(costs.values())


def test_costs_grow_with_what_a_product_walks_through():
    model = torch.nn.Sequential(*[torch.nn.Linear(256, 256) for _ in range(4)])
    blocks = partition(model, "parameter").blocks
    loss = make_loss(torch.nn.MSELoss())
    data = as_batches((torch.randn(512, 256), torch.randn(512, 256)), pairs=True)
    problem = Problem(model, loss, data, blocks)
    costs = product_costs(problem, AutogradEngine(problem))
    assert costs == product_costs(problem, AutogradEngine(problem))
    weights = costs[::2]
    assert weights == sorted(weights, reverse=True) and weights[0] > 2 * weights[-1]
