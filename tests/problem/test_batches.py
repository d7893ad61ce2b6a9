"""What counts as one batch, what as many, and what as a mistake."""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from blockhess.problem import batches, fingerprint
from blockhess.problem.batches import (
    as_batches,
    batch_size,
    check_device,
    map_tensors,
    row_shapes,
    signature,
    split_batch,
    tensors,
    to_dtype,
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


def test_a_batch_is_split_only_with_certainty() -> None:
    graph = {"edges": torch.zeros(2, 9, dtype=torch.int64), "x": X, "y": Y}
    for batch in (graph, AClass(X, Y), Pair(X, Y), pack_sequence([X, X]), nested(torch.jagged)):
        (part,) = split_batch(batch, 2)
        assert part is batch
    assert len(split_batch(Attributes(x=X, y=Y), 2)) == 2 and type(split_batch(Store(x=X), 2)[1]) is Store


def test_map_tensors_keeps_the_structure() -> None:
    pair = namedtuple("Pair", "a b")
    mapped = map_tensors(torch.neg, {"p": pair(X, 3), "l": [Y, (X,)]})
    assert isinstance(mapped["p"], pair) and mapped["p"].b == 3
    assert torch.equal(mapped["p"].a, -X) and torch.equal(mapped["l"][1][0], -X)


# Batches of any type


@dataclass
class Pair:
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class FrozenPair:
    x: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class SlottedPair:
    x: Tensor
    y: Tensor


class AClass:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Attributes(dict[str, Any]):
    """A dict read by attribute, whose missing attributes are a KeyError: copy.deepcopy fails."""

    __getattr__ = dict.__getitem__


class Store(UserDict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self.data[name]  # without end before `data` is set


class Graph:
    """As a torch_geometric graph: attributes in a store that knows its graph, iteration over them, `to`."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.__dict__["store"] = {"x": x, "y": y}
        self.__dict__["owner"] = weakref.ref(self)
        self.__dict__["cycle"] = [self]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["store"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["store"][name] = value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__["store"].items())

    def to(self, device: Any) -> Graph:
        return self


TYPES = [Pair, FrozenPair, SlottedPair, AClass, namedtuple("NamedPair", "x y"), Graph]
MAPPINGS = [dict, OrderedDict, Attributes, Store]


def read(batch: Any, name: str) -> Any:
    return batch[name] if isinstance(batch, dict | UserDict) else getattr(batch, name)


@pytest.mark.parametrize("kind", [*TYPES, *MAPPINGS])
def test_every_type_is_one_batch_and_keeps_its_type(kind: Any) -> None:
    batch = kind(x=X, y=Y)
    assert as_batches(batch, pairs=False) == [batch] and as_batches([batch, batch], pairs=False) == [batch, batch]
    assert [id(t) for t in tensors(batch)] == [id(X), id(Y)]
    assert batch_size(batch) == 5 and row_shapes(batch) == ((2,), ())
    converted = to_dtype(batch, torch.float64)
    assert type(converted) is kind and converted is not batch
    assert read(converted, "x").dtype == torch.float64 and read(converted, "y") is Y
    assert read(batch, "x") is X and X.dtype == torch.float32
    assert to_dtype(batch, torch.float32) is batch  # nothing changes
    assert fingerprint.of_data([batch]) != fingerprint.of_data([converted])


def test_a_copy_refers_to_itself_as_the_original_does() -> None:
    batch = Graph(X, Y)
    converted = to_dtype(batch, torch.float64)
    assert converted.__dict__["owner"]() is converted and converted.__dict__["cycle"][0] is converted
    assert batch.__dict__["owner"]() is batch and batch.__dict__["cycle"][0] is batch
    loop: dict[str, Any] = {"x": X}
    loop["pair"] = (loop, X)
    converted = to_dtype(loop, torch.float64)
    assert converted["pair"][0] is converted and converted["pair"][1] is converted["x"]


def test_what_does_not_change_is_the_same_object() -> None:
    factory = defaultdict(list, x=X)
    texts, parts, model = ["a", "b"], [Y], nn.Linear(2, 2)
    batch = {"texts": texts, "parts": parts, "model": model, "f": torch.neg, "x": X, "d": factory}
    converted = to_dtype(batch, torch.float64)
    assert all(converted[name] is batch[name] for name in ("texts", "parts", "model", "f"))
    assert converted["d"]["missing"] == [] and "missing" not in factory and converted["d"]["x"] is converted["x"]
    assert len(list(tensors(batch))) == 3  # none of the model's
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_what_cannot_be_copied_is_named() -> None:
    class Array(bytearray):
        pass

    array = Array()
    array.x = X  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="spectrum: data must hold objects that can be copied, got Array"):
        to_dtype([array], torch.float64)


def test_complex_data_are_converted_too() -> None:
    assert to_dtype([X.to(torch.complex64)], torch.float64)[0].dtype == torch.complex128


def test_lengths_of_packed_sequences_stay_where_they_are() -> None:
    packed = pack_sequence([X, X[:2]], enforce_sorted=False)
    moved = map_tensors(lambda t: t.to("meta"), packed)
    assert isinstance(moved, PackedSequence) and moved.data.is_meta and moved.batch_sizes is packed.batch_sizes
    check_device([moved], torch.device("meta"))
    with pytest.raises(ValueError, match="got batch 0 on meta"):
        check_device([moved], torch.device("cpu"))
    longer = pack_sequence([X[[0, 1]], X[[0, 1, 2, 3, 4]]], enforce_sorted=False)
    assert fingerprint.of_data([packed]) != fingerprint.of_data([longer])


def nested(layout: torch.layout, rows: tuple[int, ...] = (2, 3)) -> Tensor:
    return torch.nested.nested_tensor(list(X.split(rows)), layout=layout)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    batch = nested(layout)
    assert batch_size(batch) == 2 and row_shapes(batch) is None
    assert to_dtype([batch], torch.float64)[0].unbind()[1].dtype == torch.float64
    assert fingerprint.of_data([batch]) == fingerprint.of_data([nested(layout)])
    assert fingerprint.of_data([batch]) != fingerprint.of_data([nested(layout, (3, 2))])


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensors(layout: torch.layout) -> None:
    batch = {"a": X.to_sparse(layout=layout)}
    assert batch_size(batch) == 5
    assert to_dtype(batch, torch.float64)["a"].layout == layout
    assert fingerprint.of_data([batch]) != fingerprint.of_data([{"a": X[:, [1, 0]].to_sparse(layout=layout)}])
    wide = torch.cat([X, torch.zeros(5, 1)], 1).to_sparse(layout=layout)
    assert fingerprint.of_data([batch]) != fingerprint.of_data([{"a": wide}])


def test_signatures() -> None:
    assert signature((X, Y)) == signature((X + 1, Y + 1)) != signature((X[:3], Y))
    assert signature((X, X)) != signature((X, X.clone()))  # a trace of the first has one input
    assert signature({"a": X}) != signature({"b": X}) and signature([X, 1]) != signature([X, 2])
    assert signature(Pair(X, Y)) == signature(Pair(X + 1, Y)) != signature(FrozenPair(X, Y))
    assert signature((X, [Y])) != signature((X, (Y,))) != signature(([X], Y))
    assert signature([X, np.ones(2)]) is None and signature([X.to_sparse()]) is None
    assert signature(pack_sequence([X])) is None


# Sizes


def test_the_size_is_the_first_dimension_that_most_tensors_share() -> None:
    graph = {"edges": torch.zeros(2, 9), "x": X, "y": Y}
    assert batch_size(graph) == 5 and row_shapes(graph) is None
    assert batch_size((X, Y[:4])) == 5  # the first of equally many
    assert row_shapes((X, Y, torch.tensor(1.0))) == ((2,), ())


# Loaders


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(itertools.repeat(X[0]))


def test_an_endless_loader_is_refused() -> None:
    with pytest.raises(ValueError, match=r"more than 4096 batches and may never end: pass list\(itertools.islice"):
        as_batches(DataLoader(Endless(), batch_size=2), pairs=True)
    assert len(as_batches(list(itertools.islice(DataLoader(Endless(), batch_size=2), 3)), pairs=True)) == 3


class Replay:
    """An iterable without a length."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_large_batches_of_unknown_number_are_limited_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(as_batches(Replay([(X, Y)] * 4), pairs=True)) == 4
    monkeypatch.setattr(batches, "MOST_MEMORY", 3 * (X.nbytes + Y.nbytes) / batches._memory(X.device))
    assert len(as_batches(Replay([(X, Y)] * 3), pairs=True)) == 3
    with pytest.raises(ValueError, match="more than 3 batches and may never end"):
        as_batches(Replay([(X, Y)] * 4), pairs=True)
    assert len(as_batches([(X, Y)] * 4, pairs=True)) == 4  # a list is no risk


def test_a_long_loader_of_known_length_is_read() -> None:
    data = TensorDataset(torch.zeros(5000, 1))
    assert len(as_batches(DataLoader(data, batch_size=1), pairs=True)) == 5000


def test_an_iterable_that_is_read_once() -> None:
    loader = Replay(iter([(X, Y)]))
    assert len(as_batches(loader, pairs=True)) == 1
    with pytest.raises(ValueError, match="got an empty Replay; an iterable that can be read only once is empty"):
        as_batches(loader, pairs=True)


def test_a_loader_that_fails() -> None:
    def broken() -> Iterator[Any]:
        yield X
        raise KeyError("image 7")

    with pytest.raises(RuntimeError, match="spectrum: data must yield batches, got KeyError after 1 batches of Replay"):
        as_batches(Replay(broken()), pairs=True)


class Sequence:
    """Has no __iter__."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return [(X, Y), (X, Y)][index]


class Keyed(Sequence):
    def __init__(self) -> None:
        self.x, self.y = X, Y


def test_sequences_without_iter_hold_batches() -> None:
    assert len(as_batches(Sequence(), pairs=True)) == 2
    assert len(as_batches(Keyed(), pairs=False)) == 1  # an object with tensors
