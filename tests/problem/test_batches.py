"""What counts as one batch, what as many, and what as a mistake."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from blockhess.problem.batches import (
    as_batches,
    batch_size,
    check_device,
    map_tensors,
    split_batch,
)

X, Y = torch.arange(10.0).view(5, 2), torch.arange(5)


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (X, 1),
        ((X, Y), 1),
        (namedtuple("Pair", "x y")(X, Y), 1),
        ({"x": X, "y": Y}, 1),
        ([X, Y], 1),
        ([(X, Y)], 1),
        ([(X, Y), (X, Y)], 2),
        ([[X, Y], [X, Y]], 2),
        ([X, Y, X], 3),
        ([{"x": X}, {"x": X}, {"x": X}], 3),
        (DataLoader(TensorDataset(X, Y), batch_size=2), 3),
        ("abc", None),
    ],
)
def test_how_many_batches(data: object, count: int | None) -> None:
    if count is None:
        with pytest.raises(ValueError, match="got str"):
            as_batches(data, pairs=True)
    else:
        assert len(as_batches(data, pairs=True)) == count


def test_two_tensors_are_two_batches_where_no_pair_is_wanted() -> None:
    assert len(as_batches([X, Y], pairs=False)) == 2


def test_an_object_of_the_users_is_one_batch() -> None:
    @dataclass
    class Graph:
        nodes: torch.Tensor

    graph = Graph(X)
    assert as_batches(graph, pairs=False) == [graph]
    assert as_batches([graph, graph], pairs=False) == [graph, graph]


def test_a_shuffling_loader_is_drawn_once() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)
    batches = as_batches(loader, pairs=True)
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == [0, 1, 2, 3, 4]
    assert isinstance(batches, list)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "at least one batch, got an empty list"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), "at least one batch, got an empty DataLoader"),
        ((X[:0], Y[:0]), "hold samples, got an empty batch 0"),
        ([(X, Y), (X[:0], Y[:0])], "hold samples, got an empty batch 1"),
        (((X, Y) for _ in range(2)), "got a generator, which may never end: pass list"),
        (iter([(X, Y)]), "got a list_iterator"),
        (TensorDataset(X, Y), "got the Dataset TensorDataset, which holds samples: pass torch.utils.data.DataLoader"),
        (X.numpy(), "got ndarray"),
        (None, "got NoneType"),
    ],
)
def test_bad_data(data: object, text: str) -> None:
    with pytest.raises(ValueError, match=f"spectrum: data must .*{text}"):
        as_batches(data, pairs=True)


def test_batch_size() -> None:
    assert batch_size((X, Y)) == 5
    assert batch_size({"scale": torch.tensor(2.0), "x": [Y[:3]]}) == 3
    assert batch_size(("key", np.ones(3), torch.tensor(1.0))) is None


def test_devices() -> None:
    check_device([(X, Y)], torch.device("cpu"))
    with pytest.raises(ValueError, match="model's device cpu, got batch 1 on meta"):
        check_device([(X, Y), {"x": [X.to("meta")]}], torch.device("cpu"))


def test_split_batch() -> None:
    parts = split_batch({"x": X, "y": [Y], "scale": torch.tensor(2.0), "name": "a"}, 2)
    assert [len(part["x"]) for part in parts] == [2, 3]
    assert torch.equal(torch.cat([part["x"] for part in parts]), X)
    assert torch.equal(torch.cat([part["y"][0] for part in parts]), Y)
    assert all(part["scale"] == 2 and part["name"] == "a" for part in parts)
    assert len(split_batch((X, Y), 99)) == 5
    assert split_batch("key", 3) == ["key"]


def test_map_tensors_keeps_the_structure() -> None:
    pair = namedtuple("Pair", "a b")
    mapped = map_tensors(torch.neg, {"p": pair(X, 3), "l": [Y, (X,)]})
    assert isinstance(mapped["p"], pair) and mapped["p"].b == 3
    assert torch.equal(mapped["p"].a, -X) and torch.equal(mapped["l"][1][0], -X)
