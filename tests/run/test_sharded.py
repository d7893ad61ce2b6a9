"""Sharded models: the spectra of the whole model within the error of differences, and one line where that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import blockhess
from tests.helpers import sharded_cases as cases
from tests.helpers.distributed_cases import run

SHARDED = (
    *(name for name in cases.CASES if name.startswith("float")),
    "CPU offload",
    "HSDP",
    "tensor parallelism",
    "tied",
)
ONLY_OF_FOUR = ("FSDP and tensor parallelism", "groups", "groups of distant ranks")
OF_FOUR = ("float64", "HSDP", "FSDP and tensor parallelism", "groups")
# Eigenvalues of probes that differ by an error move by about its size.
GROWTH = 30


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    class Worlds(dict):
        def __missing__(self, size):
            of_two = (name for name in cases.CASES if name not in ONLY_OF_FOUR)
            names = tuple(of_two if size == 2 else dict.fromkeys(OF_FOUR + ONLY_OF_FOUR))
            ranks = run(size, tmp_path_factory.mktemp("world"), names, cases.__name__)
            self[size] = {name: [rank[name] for rank in ranks] for name in names}
            return self[size]

    return Worlds()


def alone(name: str, **options: Any) -> blockhess.Spectra:
    if name == "groups":
        options |= {"num_probes": 2}
    if "Llama" in name:
        options |= {"blocks": cases.LLAMA_BLOCKS}
    if name == "tied":
        options |= {"blocks": "parameter"}
    return blockhess.spectrum(cases.whole(name), cases.batches(), cases.LOSS, **cases.OPTIONS | options)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        *((2, name) for name in SHARDED),
        *(pytest.param(4, name, marks=pytest.mark.slow) for name in OF_FOUR),
    ],
)
def test_spectra_are_those_of_the_whole_model(worlds, size, name):
    found, *others = worlds[size][name]
    assert not isinstance(found, str), found
    expected = alone(name)  # the same blocks are computed exactly
    assert expected.provenance["engine"] != "difference"
    assert found["engine"] == "difference" and found["names"] == expected.names
    assert found["unchecked"] == []
    for other in others:
        assert all(torch.equal(other[what], found[what]) for what in ("nodes", "weights", "alpha", "beta"))
    made = expected.provenance
    assert found["loss_value"] == pytest.approx(made["loss_value"], rel=1e-6)
    assert found["processes"] == ([size // 2, 2] if name == "groups" else [1, size])
    for norm, right in zip(found["gradient_norms"].values(), made["gradient_norms"].values()):
        assert norm == pytest.approx(right, rel=1e-5)
    moments = [(found["weights"] * found["nodes"] ** k).sum(-1) for k in (1, 2)]
    for l, block in enumerate(expected.names):
        if block in expected.zero_blocks:
            continue
        error = GROWTH * found["error"][block]
        nodes = expected.quadrature.nodes[:, l]
        assert abs(float(found["nodes"][:, l].max() - nodes.max())) < error + 1e-6 * float(nodes.abs().max()) * (
            "float32" in name
        )
        weights = expected.quadrature.weights[:, l]
        assert float((moments[0][:, l] - (weights * nodes).sum(-1)).abs().max()) < error
        assert found["error"][block] < 1e-2 * float(nodes.abs().max())


def test_world_sizes_and_modes_of_fsdp_agree(worlds):
    first = worlds[2]["float64"][0]
    for name in ("float64 gathered in backward", "gathered before", "HSDP", "run directory"):
        other = worlds[2][name][0]
        assert not isinstance(other, str), other
        torch.testing.assert_close(other["nodes"], first["nodes"], rtol=0, atol=1e-8)
    assert first["fingerprints"] == alone("float64", engine="difference").provenance["fingerprints"]


def test_modules_in_bfloat16_have_a_large_error(worlds):
    (found, _) = worlds[2]["bfloat16 in modules"]
    expected = alone("float64")
    for l, block in enumerate(expected.names):
        largest = float(expected.quadrature.nodes[:, l].abs().max())
        assert found["error"][block] > 1e-4 * largest
        assert float((found["nodes"][:, l].max() - expected.quadrature.nodes[:, l].max()).abs()) < max(
            GROWTH * found["error"][block], 0.1 * largest
        )


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("wrong gradient", ("DerivativeMismatch: ", "the gradient of block '0.weight' is not that of the loss")),
        ("fails", ("got OverflowError in loss_fn for batch 0: beside the parameters",)),
        ("engine", ("engine must be 'auto' or 'difference' for a sharded model, got 'autograd'",)),
        ("dtype", ("dtype must be that of the parameters of a sharded model, torch.float64, got torch.float32",)),
        ("parallel", ("parallel must be None, 'recurrences' or (1, 2) for a model sharded over 2 of 2", "got 'data'")),
        ("other data", ("all ranks must be given the same job", "data ")),
        ("other model", ("all ranks must be given the same job", "number of them  14", "13")),
        ("other values", ("all ranks must be given the same job", "parameters ")),
        ("other wrapping", ("all ranks must be given the same job", "modules ")),
        ("unused on one later", ("all ranks must be given the same job", "parameters with gradients")),
        ("unused on one", ("all ranks must be given the same job", "parameters with gradients")),
        ("bfloat16", ("must be float32 or float64, got torch.bfloat16 of '0.weight'", "MixedPrecisionPolicy")),
        ("FSDP1", ("(FSDP1), got 'the model'; use torch.distributed.fsdp.fully_shard instead",)),
        (
            "uneven parts of parts",
            ("must be divided evenly, got shape (9, 6) of '1.up.weight' in 2 parts along dim 0",),
        ),
        ("partial sums", ("placements Shard or Replicate, got (Partial(sum),) of '3.weight'",)),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(worlds, name, texts):
    for found in worlds[2][name]:
        assert isinstance(found, str)
        assert all(text in found for text in texts), found


def test_a_rank_that_ends_ends_the_others(worlds):
    waiting, failed = worlds[2]["one fails"]
    told = "got OverflowError in '2' (FSDPResidual) for batch 0: beside the parameters"
    assert failed.startswith("ValueError: ") and told in failed
    assert "rank 1 failed with ValueError: " in waiting and told in waiting
    assert "onnection closed" in waiting  # not a timeout


@pytest.mark.slow
def test_groups_must_be_of_neighbors(worlds):
    for rank, found in enumerate(worlds[4]["groups of distant ranks"]):
        assert f"a model sharded over neighboring ranks, got ranks {[rank % 2, rank % 2 + 2]}" in found
