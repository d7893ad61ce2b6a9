"""Random data: inputs and targets of a few batches, and the containers that hold them."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.random_problems.choices import Choices
from tests.random_problems.models import VOCABULARY

OTHER = {torch.float32: torch.float64, torch.float64: torch.float32}
Raw = list[tuple[Any, Tensor]]  # inputs and targets of every batch


def features(c: Choices, *shape: int) -> Tensor:
    made = c.randn(*shape)
    return made.to(OTHER[c.stored]) if "data of another precision" in c.kinds and not c.plain else made


def inputs(c: Choices, source: str, n: int) -> Any:
    if source == "graph":
        return features(c, n, 3), c.randint(n, 2, 2 * n + 1)
    shapes = {"vectors": (3,), "images": (1, 4, 4), "signals": (2, 4)}
    if source == "tokens":
        return c.randint(VOCABULARY, n, 3)
    if source in ("PackedSequence", "nested tensor"):
        sequences = [features(c, 3 - i % 2, 2) for i in range(n)]
        if source == "nested tensor":
            return torch.nested.nested_tensor(sequences)
        return pack_sequence(sequences, enforce_sorted=False)
    return features(c, n, *shapes.get(source, (3, 2)))


def targets(c: Choices, n: int) -> Tensor:
    if c.task == "classes":
        made = c.randint(c.classes, n)
        made[0] = 1  # one that is not ignored
        return made
    return c.randn(n, c.classes) if c.task == "numbers" else c.tensor(c.randint(2, n, c.classes))


def raw_batches(c: Choices, source: str) -> Raw:
    counts = {"one batch": [5], "two batches": [5, 4], "three batches": [4, 6, 4], "equal batches": [4, 4]}
    sizes = counts[c.pick({"one batch": 5, "two batches": 2, "three batches": 1, "equal batches": 1})]
    if c.stored in OTHER and source != "tokens" and c.chance(0.04):
        c.note("data of another precision", *["data that are not converted"] * (c.compute == c.stored))
    return [(inputs(c, source, n), targets(c, n)) for n in sizes]


class Pair(NamedTuple):
    x: Any
    y: Tensor


@dataclass
class Item:
    x: Any
    y: Tensor


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Tensor

    def to(self, *args: Any, **kwargs: Any) -> Frozen:
        return replace(self, x=moved(self.x, *args, **kwargs), y=self.y.to(*args, **kwargs))


def moved(x: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(x, tuple) and not hasattr(x, "batch_sizes"):
        return tuple(moved(each, *args, **kwargs) for each in x)
    return x.to(*args, **kwargs) if not isinstance(x, Tensor) or x.is_floating_point() else x


class Encoding(UserDict):
    """A mapping whose values are attributes too, as BatchEncoding of Transformers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> Encoding:
        self.data = {key: moved(value, device) for key, value in self.data.items()}
        return self


class Graphs:
    """Attributes only, as torch_geometric.data.Data."""

    def __init__(self, x: Any, y: Tensor) -> None:
        self.x, self.y, self.name = x, y, "a graph"

    def to(self, *args: Any, **kwargs: Any) -> Graphs:
        return Graphs(moved(self.x, *args, **kwargs), moved(self.y, *args, **kwargs))


class Without:
    """Attributes only, and no method `to`."""

    def __init__(self, x: Any, y: Tensor) -> None:
        self.x, self.y = x, y


def by_attribute(batch: Any) -> tuple[Any, Tensor]:
    return batch.x, batch.y


def by_key(batch: Any) -> tuple[Any, Tensor]:
    return batch["x"], batch["y"]


def by_index(batch: Any) -> tuple[Any, Tensor]:
    return batch[0], batch[1]


Pack, Unpack = Callable[[Any, Tensor], Any], Callable[[Any], tuple[Any, Tensor]]

# How a closure is given inputs and targets: name -> weight, pack, unpack.
CONTAINERS: dict[str, tuple[float, Pack, Unpack]] = {
    "tuple": (3, lambda x, y: (x, y), by_index),
    "dict": (1, lambda x, y: {"x": x, "y": y}, by_key),
    "dict with texts": (1, lambda x, y: {"text": ["a"] * len(y), "x": x, "id": None, "y": y}, by_key),
    "nested dict": (1, lambda x, y: {"in": [x], "out": {"y": y}}, lambda b: (b["in"][0], b["out"]["y"])),
    "named tuple": (1, Pair, by_attribute),
    "dataclass": (1, Item, by_attribute),
    "frozen dataclass": (1, Frozen, by_attribute),
    "mapping with attributes": (1, lambda x, y: Encoding({"x": x, "y": y}), by_attribute),
    "object": (1, Graphs, by_attribute),
    "object without .to": (0.5, Without, by_attribute),
    "another tensor first": (0.7, lambda x, y: {"steps": torch.arange(2), "x": x, "y": y}, by_key),
}


class Endless(IterableDataset):
    """Never ends, up to a number of batches that no reader should reach."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        for _ in range(10**6):
            yield self.batch
        raise AssertionError("data without an end was read to batch 1,000,000")


class Finite(IterableDataset):
    """Has an end, and no length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def joined(batches: list[tuple[Tensor, Tensor]], **options: Any) -> DataLoader[Any]:
    whole = TensorDataset(*map(torch.cat, zip(*batches)))
    return DataLoader(whole, batch_size=4, **options)


# How several batches are given: name -> weight, function of the list of batches.
COLLECTIONS: dict[str, tuple[float, Callable[[list[Any]], Any]]] = {
    "list": (8, list),
    "iterable without length": (1, Finite),
    "iterator": (0.3, iter),
    "endless data": (0.3, lambda batches: Endless(batches[0])),
}
# Those of pairs of tensors too.
LOADERS: dict[str, tuple[float, Callable[[list[Any]], Any]]] = {
    "DataLoader": (2, joined),
    "shuffling DataLoader": (2, lambda batches: joined(batches, shuffle=True)),
    "samples, not batches": (0.3, lambda batches: joined(batches).dataset),
}
