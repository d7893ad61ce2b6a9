"""State on disk: kills, faults and power cuts at every call of the system; damaged and hostile files."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blockhess.run.storage import store, tensor_file
from tests.helpers import faulty_disk
from tests.helpers.faulty_disk import FaultyDisk, Killed

Content = tuple[dict[str, torch.Tensor], dict[str, Any]]


def content(number: int) -> Content:
    rng = torch.Generator().manual_seed(number)
    tensors = {
        "alpha": torch.randn(2, 3, generator=rng, dtype=torch.float64),
        "vectors": torch.randn(2, 5, generator=rng),
        "finished": torch.tensor([number % 2 == 0, True, False]),
        "steps": torch.tensor(number),
        "none": torch.empty(0, 3),
    }
    return tensors, {"number": number}


def same(a: Content, b: Content) -> bool:
    equal = (a[0][name].dtype == b[0][name].dtype and a[0][name].equal(b[0][name]) for name in b[0])
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(equal)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.safetensors"


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[store.Disk], None]:
    return lambda disk: monkeypatch.setattr(store, "disk", disk)


def calls_of_a_write(path: Path, on_disk: Callable[[store.Disk], None]) -> list[str]:
    """What a write over two generations asks of the disk."""
    store.write(path, *content(0))
    store.write(path, *content(1))
    on_disk(disk := FaultyDisk())
    store.write(path, *content(2))
    on_disk(store.Disk())
    return disk.log


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        store.read(path)
    text = str(caught.value)
    assert type(caught.value) is ValueError and str(path) in text and text.isprintable()
    return text


def test_a_round_trip_keeps_every_bit(path: Path) -> None:
    store.write(path, *content(1))
    assert same(store.read(path), content(1))
    assert not same(store.read(path), content(2))  # control
    for dtype in tensor_file.DTYPES.values():
        bits = torch.randint(0, 2, (3, 32), dtype=torch.uint8)
        tensor = bits.view(dtype).T if dtype != torch.uint8 else bits
        store.write(path, {"x": tensor}, {})
        loaded = store.read(path)[0]["x"]
        assert loaded.dtype == dtype and loaded.shape == tensor.shape
        assert torch.equal(loaded.contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


def test_what_is_read_may_be_changed(path: Path) -> None:
    store.write(path, *content(1))
    tensors, _ = store.read(path)
    tensors["alpha"].zero_()
    assert tensors["vectors"].equal(content(1)[0]["vectors"]) and same(store.read(path), content(1))


def test_safetensors_reads_the_same(path: Path) -> None:
    store.write(path, *content(3))
    assert same((load_file(path), {"number": 3}), content(3))


def test_the_generation_before_stays(path: Path) -> None:
    for number in range(3):
        store.write(path, *content(number))
    assert sorted(os.listdir(path.parent)) == [path.name, f"{path.name}.previous"]
    assert same(store.read(f"{path}.previous"), content(1))


def test_a_write_syncs_before_it_renames(path: Path, on_disk: Callable[[store.Disk], None]) -> None:
    log = [call for call in calls_of_a_write(path, on_disk) if call in ("fsync", "replace")]
    assert log == ["fsync", "replace", "replace", "fsync"]


@pytest.mark.parametrize("fault", [faulty_disk.kill, faulty_disk.kill_halfway, faulty_disk.kill_after])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_state(
    path: Path, on_disk: Callable[[store.Disk], None], fault: Callable[..., Any]
) -> None:
    seen = set()
    calls = len(calls_of_a_write(path, on_disk))
    for first, second in itertools.product(range(calls), range(0, calls, 3)):
        calls_of_a_write(path, on_disk)
        before = content(2)
        for number, at in ((3, first), (4, second)):
            on_disk(FaultyDisk(at, fault))
            with contextlib.suppress(Killed):
                store.write(path, *content(number))
            on_disk(store.Disk())
            after = store.read(path)
            assert same(after, before) or same(after, content(number))
            before = after
            seen.add((number, after[1]["number"]))
    assert {(3, 2), (3, 3), (4, 2), (4, 3), (4, 4)} <= seen


def test_a_kill_of_the_first_write_leaves_nothing_or_all(path: Path, on_disk: Callable[[store.Disk], None]) -> None:
    for at in range(len(calls_of_a_write(path, on_disk))):
        for file in path.parent.iterdir():
            file.unlink()
        on_disk(FaultyDisk(at, faulty_disk.kill_halfway))
        with contextlib.suppress(Killed):
            store.write(path, *content(1))
        on_disk(store.Disk())
        try:
            assert same(store.read(path), content(1))
        except ValueError as error:
            assert str(path) in str(error)
        store.write(path, *content(2))
        assert same(store.read(path), content(2))


def test_the_kill_test_sees_a_careless_write(path: Path, on_disk: Callable[[store.Disk], None]) -> None:
    # Control: written in place, without a generation before, a kill halfway loses everything.
    store.write(path, *content(1))
    data = memoryview(path.read_bytes())
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    assert "truncated" in refused(path)


@pytest.mark.parametrize("fault", [faulty_disk.disk_full, faulty_disk.broken])
def test_an_error_at_any_call_is_raised_and_loses_nothing(
    path: Path, on_disk: Callable[[store.Disk], None], fault: Callable[..., Any]
) -> None:
    for at in range(len(calls_of_a_write(path, on_disk))):
        before = store.read(path)
        on_disk(disk := FaultyDisk(at, fault))
        with pytest.raises(OSError, match=r"space left|output error"):
            store.write(path, *content(3))
        assert len(disk.log) > at
        on_disk(store.Disk())
        after = store.read(path)
        assert same(after, before) or same(after, content(3))
        store.write(path, *content(4))
        assert same(store.read(path), content(4))


def test_a_failed_write_gives_its_space_back(path: Path, on_disk: Callable[[store.Disk], None]) -> None:
    at = calls_of_a_write(path, on_disk).index("write")
    on_disk(FaultyDisk(at + 1, faulty_disk.disk_full))
    with pytest.raises(OSError, match="No space left"):
        store.write(path, *content(3))
    assert sorted(os.listdir(path.parent)) == [path.name, f"{path.name}.previous"]


def test_short_writes_are_finished(path: Path, on_disk: Callable[[store.Disk], None]) -> None:
    for at in range(len(calls_of_a_write(path, on_disk))):
        on_disk(FaultyDisk(at, faulty_disk.short))
        store.write(path, *content(at))
        assert same(store.read(path), content(at))


def test_short_reads_are_finished(path: Path, on_disk: Callable[[store.Disk], None]) -> None:
    class Slow(store.Disk):
        @staticmethod
        def readv(file: int, views: list[memoryview]) -> int:
            return os.readv(file, [views[0][:3]])

    store.write(path, *content(1))
    on_disk(Slow())
    assert same(store.read(path), content(1))


class Cache(FaultyDisk):
    """A disk with a power cut: what was written and never synced is gone, and renames after the last sync may be."""

    def __init__(self, at: int, syncs: bool = True) -> None:
        super().__init__(at, faulty_disk.kill)
        self.syncs, self.unsynced, self.names = syncs, dict[int, int](), dict[int, str]()

    def open(self, path: str, *arguments: Any) -> int:
        file: int = super().open(path, *arguments)
        if not os.path.isdir(path):
            self.unsynced[os.fstat(file).st_ino] = 1
        return file

    def fsync(self, file: int) -> None:
        super().fsync(file)
        if self.syncs:
            self.unsynced.pop(os.fstat(file).st_ino, None)

    def power_cut(self, folder: Path) -> None:
        for file in folder.iterdir():
            if file.stat().st_ino in self.unsynced:
                file.write_bytes(b"")


@pytest.mark.parametrize("syncs", [True, False])
def test_a_power_cut_loses_only_what_was_not_synced(
    path: Path, on_disk: Callable[[store.Disk], None], syncs: bool
) -> None:
    lost = 0
    for at in range(len(calls_of_a_write(path, on_disk)) + 1):
        calls_of_a_write(path, on_disk)
        (path.parent / f"{path.name}.previous").unlink()
        on_disk(disk := Cache(at, syncs))
        with contextlib.suppress(Killed):
            store.write(path, *content(3))
        disk.power_cut(path.parent)
        on_disk(store.Disk())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            after = store.read(path)
        lost += len(caught)
        assert same(after, content(2)) or same(after, content(3))
    assert (lost == 0) == syncs  # control: without the sync the new file is empty once renamed


def test_a_damaged_generation_gives_way_to_the_one_before_and_is_named(path: Path) -> None:
    store.write(path, *content(1))
    store.write(path, *content(2))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=rf"{path.name}: .*; .*{path.name}.previous is used instead"):
        assert same(store.read(path), content(1))
    # A kill in the next write does not take the last good one with it.
    store.write(path, *content(3))
    assert same(store.read(path), content(3))


def test_a_damaged_file_and_a_kill_between_the_renames(path: Path, on_disk: Callable[[store.Disk], None]) -> None:
    for at in range(len(calls_of_a_write(path, on_disk))):
        calls_of_a_write(path, on_disk)
        path.write_bytes(path.read_bytes()[:-1])
        on_disk(FaultyDisk(at, faulty_disk.kill))
        with pytest.raises(Killed):
            store.write(path, *content(3))
        on_disk(store.Disk())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after = store.read(path)
        assert same(after, content(1)) or same(after, content(3))


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_truncated_at_every_length(path: Path, stride: int) -> None:
    store.write(path, *content(1))
    data = path.read_bytes()
    for length in range(0, len(data), stride):
        path.write_bytes(data[:length])
        refused(path)
    path.write_bytes(data + b"\0")
    refused(path)
    path.write_bytes(data)
    store.read(path)


def test_a_flipped_bit_is_noticed(path: Path) -> None:
    store.write(path, {"a": torch.arange(3.0), "b": torch.tensor([True])}, {"n": 1})
    data = bytearray(path.read_bytes())
    for bit in (*range(200), *range(200, len(data) * 8, 5)):
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        refused(path)
        data[bit // 8] ^= 1 << bit % 8


def forged(path: Path, entries: Any, data: bytes, header: str = "{}", more: str = "") -> Path:
    """Write a file whose checksum is right, whatever it holds."""
    start = '{"__metadata__":{"checksum":"'
    rest = f'","header":{json.dumps(header)}}}'
    if entries is not None:
        rest += "".join(f",{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + more + "}"
    rest += " " * (-(len(start) + 64 + len(rest)) % 8)
    length = struct.pack("<Q", len(start) + 64 + len(rest))
    before, after = length + start.encode(), rest.encode()
    path.write_bytes(before + tensor_file.checksum([before, after, data]) + after + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_forged_file_alone_is_read(path: Path) -> None:
    # Control of the below.
    tensors, header = store.read(forged(path, [("a", entry())], b"\0" * 8))
    assert tensors["a"].tolist() == [0, 0] and header == {}


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ([("a", entry(dtype="F31"))], "must be F64, .* got 'F31'"),
        ([("a", entry(dtype="O"))], "must be F64"),
        ([("a", entry(dtype=["F32"]))], "must be F64"),
        ([("a", entry(dtype=None))], "must be F64"),
        ([("a", entry(shape=(-2,)))], "a shape and two offsets"),
        ([("a", entry(shape=(-2, -1)))], "a shape and two offsets"),
        ([("a", entry(shape=(2.0,)))], "a shape and two offsets"),
        ([("a", entry(shape=(True, 2)))], "a shape and two offsets"),
        ([("a", entry(shape="2"))], "a shape and two offsets"),
        ([("a", entry(shape={"2": 2}))], "a shape and two offsets"),
        ([("a", entry(shape=(2**63, 2)))], "a shape and two offsets"),
        ([("a", entry(shape=(2**61, 4)))], "impossible shape"),
        ([("a", entry(shape=(0, 2**61, 4), offsets=(0, 0)))], "impossible shape"),
        ([("a", entry(shape=(1,) * 17))], "impossible shape"),
        ([("a", entry(shape=(2**32, 2**30)))], "impossible shape"),
        ([("a", entry(shape=(2**30, 2**30)))], "does not fit"),
        ([("a", entry(shape=(3,)))], "does not fit"),
        ([("a", entry(shape=()))], "does not fit"),
        ([("a", entry(offsets=(0, 9)))], "does not fit"),
        ([("a", entry(offsets=(8, 0)))], "does not fit"),
        ([("a", entry(offsets=(-8, 0)))], "two offsets"),
        ([("a", entry(offsets=(0, 8, 8)))], "two offsets"),
        ([("a", entry(offsets=8))], "two offsets"),
        ([("a", entry(offsets=(2**64, 2**64 + 8)))], "two offsets"),
        ([("a", entry(shape=(1,), offsets=(0, 4))), ("b", entry(shape=(1,), offsets=(0, 4)))], "'b' .* does not fit"),
        ([("a", entry(shape=(1,), offsets=(4, 8)))], "does not fit"),
        ([("a", entry(shape=(1,), offsets=(0, 4)))], "must take the 8 bytes that follow the header, got 4"),
        ([("a", entry("U8", (1,), (0, 1))), ("b", entry("F32", (1,), (1, 5)))], "'b' .* does not fit"),
        ([], "must take the 8 bytes"),
        ([("a", entry()), ("a", entry())], "a key is .*"),
        ([("__metadata__", {})], "a key is .*"),
        ([("a", entry() | {"more": 1})], "must have dtype, shape and data_offsets"),
        ([("a", 5)], "must have dtype"),
        ([("a", None)], "must have dtype"),
        ([("\x1b[2J", None)], "must have dtype"),
        ([("\ud800", entry())], "must have a name in Unicode"),
        ([("a", entry("BOOL", (8,)))], "must hold 0 and 1 alone"),
    ],
)
def test_hostile_entries_with_a_right_checksum(path: Path, entries: Any, text: str) -> None:
    forged(path, entries, b"\2" * 8)
    with pytest.raises(ValueError, match=text):
        store.read(path)
    refused(path)


@pytest.mark.parametrize(
    "header", ["", "[]", "5", "null", "{", "[" * 10**5, '{"a": 1, "a": 2}', "9" * 5000, '"\\ud800"']
)
def test_hostile_headers(path: Path, header: str) -> None:
    assert "header" in refused(forged(path, [("a", entry())], b"\0" * 8, header))


@pytest.mark.parametrize("more", [',"a":' + "[" * 10**5, ",", ',"a"', ',"b":NaN', ',"__metadata__":{"checksum":""}'])
def test_hostile_json(path: Path, more: str) -> None:
    refused(forged(path, [("a", entry())], b"\0" * 8, more=more))
    refused(forged(path, None, b""))


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 2**24 + 8, 0, 1, 28, 100])
def test_a_header_of_any_length_takes_no_memory(path: Path, length: int) -> None:
    path.write_bytes(struct.pack("<Q", length) + b"\0" * 100)
    tracemalloc.start()
    refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_a_sparse_file_takes_no_memory(path: Path) -> None:
    store.write(path, {"a": torch.zeros(2)}, {})
    os.truncate(path, 2**42)
    assert "must take" in refused(path)


def test_reading_takes_the_size_of_the_file(path: Path) -> None:
    store.write(path, {"a": torch.zeros(2**20), "b": torch.ones(2**20, dtype=torch.bool)}, {})
    tracemalloc.start()
    store.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 5 * 2**20 <= peak < 5 * 2**20 + 100_000


def test_foreign_files(path: Path) -> None:
    assert "no such file" in refused(path)
    path.mkdir()
    assert "Is a directory" in refused(path)
    path.rmdir()
    os.mkfifo(path)
    assert "truncated" in refused(path)
    path.unlink()
    torch.save({"a": torch.ones(3)}, path)
    refused(path)


def test_what_cannot_be_written_is_refused_before_anything_is_touched(path: Path) -> None:
    store.write(path, *content(1))
    for tensors, header, kind, text in (
        ({"a": torch.ones(2, dtype=torch.complex64)}, {}, ValueError, "must be dense and F64"),
        ({"a": torch.eye(2).to_sparse()}, {}, ValueError, "must be dense"),
        ({"__metadata__": torch.ones(2)}, {}, ValueError, "__metadata__"),
        ({"\udfff": torch.ones(2)}, {}, ValueError, "another name"),
        ({}, {"a": object()}, TypeError, "JSON"),
        ({}, {"a": "x" * 2**24}, ValueError, "header must take at most 16777216 bytes"),
    ):
        with pytest.raises(kind, match=text):
            store.write(path, tensors, header)
    assert os.listdir(path.parent) == [path.name] and same(store.read(path), content(1))


def test_texts(path: Path, on_disk: Callable[[store.Disk], None]) -> None:
    value = {"seed": 3, "names": ["ü", "\n"], "loss": 0.1, "none": None}
    store.write_json(path, {})
    store.write_json(path, value)
    assert store.read_json(path) == value == json.loads(path.read_text())["content"]
    data = path.read_bytes()
    path.with_name(f"{path.name}.previous").unlink()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=path.name):
            store.read_json(path)
        flipped = bytearray(data)
        flipped[length] ^= 1 << length % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="checksum is missing or wrong"):
            store.read_json(path)
    path.write_bytes(data)
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match="at most"):
        store.read_json(path)
    with pytest.raises(ValueError, match="at most"):
        store.write_json(path, "x" * 2**24)


def test_hostile_texts(path: Path) -> None:
    for body in (
        b"[" * 10**5,
        b'"content": }',
        b'"other": 1}',
        b'"content": ' + b"9" * 5000 + b"}",
        b'"content": "\xff"}',
    ):
        rest = b'",\n ' + body
        path.write_bytes(b'{"checksum": "' + tensor_file.checksum([b'{"checksum": "', rest]) + rest)
        with pytest.raises(ValueError, match="cannot be read"):
            store.read_json(path)
