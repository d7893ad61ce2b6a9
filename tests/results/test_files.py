"""files.py: round trips keep every bit; whatever else a file holds gives one ValueError that names it."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blockhess
from blockhess.report.text import describe
from blockhess.results.files import check_writable, writable_folder
from blockhess.spectra import Spectra, load
from tests.helpers.spectra_cases import make_spectra, random_spectra

TENSORS = ("nodes", "weights", "alpha", "beta", "steps", "nonfinite")


def same(a: Spectra, b: Spectra) -> bool:
    fields = ("dims", "block_ids", "num_steps", "seed", "distribution", "reorthogonalize", "dtype")
    return (
        a.blocks == b.blocks
        and a.provenance == b.provenance
        and all(getattr(a.quadrature, f) == getattr(b.quadrature, f) for f in fields)
        and all(
            getattr(a.quadrature, f).dtype == getattr(b.quadrature, f).dtype
            and getattr(a.quadrature, f).numpy().tobytes() == getattr(b.quadrature, f).numpy().tobytes()
            for f in TENSORS
        )
    )


def refused(path: Path) -> str:
    """Load a bad file; its one-line error must name it."""
    with pytest.raises(ValueError) as caught:
        load(path)
    text = str(caught.value)
    assert type(caught.value) is ValueError and str(path) in text and text.startswith("load: ") and "\n" not in text
    return text


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return random_spectra(batchnorm="eval", frozen=["é"], loss_value=0.1, tied={"a": ["b"]}).save(tmp_path / "good.npz")


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    header = json.loads(arrays["header"].tobytes())
    change(header)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, **arrays)
    return path


def change_arrays(path: Path, change: Callable[[dict[str, np.ndarray[Any, Any]]], object]) -> Path:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: array.copy() for name, array in file.items()}
    change(arrays)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("made", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_load_reads_regular_files_alone(tmp_path: Path, made: Callable[[Path], None]) -> None:
    made(tmp_path / "special")
    assert "must be a regular file" in refused(tmp_path / "special")


@pytest.mark.parametrize("name", ["seconds", "loss_value"])
def test_numbers_that_float64_does_not_hold_are_refused(good: Path, name: str) -> None:
    change_header(good, lambda header: header["provenance"].update({name: 10**400}))
    assert f"{name} must be a number that float64 holds" in refused(good)
    change_header(good, lambda header: header["provenance"].update({name: 10**300}))
    assert "Spectra" in describe(load(good))


def test_round_trip(good: Path) -> None:
    loaded = load(good)
    assert same(loaded, random_spectra(batchnorm="eval", frozen=["é"], loss_value=0.1, tied={"a": ["b"]}))
    assert torch.equal(loaded.js_matrix(), random_spectra().js_matrix())
    assert blockhess.load is load


def test_the_comparison_of_round_trips_sees_one_bit() -> None:
    # Control of `same`.
    changed = random_spectra()
    changed.quadrature.beta.view(torch.int64)[1, 1, 1] ^= 1
    assert not same(changed, random_spectra()) and same(random_spectra(), random_spectra())


def test_round_trip_of_awkward_values(tmp_path: Path) -> None:
    # A recurrence frozen at once, garbage beyond the steps, infinite loss, subnormal and negative zero nodes.
    spectra = make_spectra(
        [[[-0.0, 5e-324], [math.nan, math.inf]]],
        [[[0.5, 0.5], [0.0, 0.0]]],
        steps=[[2, 0]],
        nonfinite=[[False, True]],
        names=["a.b[0:3]", "ü "],
        loss_value=math.inf,
        seed=2**63 - 1,
    )
    loaded = load(spectra.save(tmp_path / "no suffix"))
    assert same(loaded, spectra) and os.listdir(tmp_path) == ["no suffix"]


@settings(max_examples=20, deadline=None)
@given(
    provenance=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_round_trip_of_any_provenance(provenance: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = random_spectra(n_probes=1, n_blocks=2, m=2)
    spectra = Spectra(plain.blocks, plain.quadrature, provenance)
    assert same(load(spectra.save(tmp_path_factory.mktemp("p") / "x.npz")), spectra)


def test_files_are_equal_byte_by_byte_and_readable_by_numpy(good: Path, tmp_path: Path) -> None:
    again = load(good).save(tmp_path / "again.npz")
    assert again.read_bytes() == good.read_bytes()
    with np.load(good, allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        assert file["nodes"].shape == (3, 4, 12)
    assert header["format"] == "blockhess-spectra" and header["version"] == 1
    assert header["blocks"][0] == {"name": "block0", "shape": [12], "dim": 12, "parameters": ["block0"], "note": ""}


def test_saving_replaces_whole_files_only(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = good.read_bytes()

    def disk_full(file: io.BufferedWriter, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", disk_full)
    with pytest.raises(ValueError, match=r"save: cannot write .*good.npz: No space left on device"):
        random_spectra(seed=1).save(good)
    assert good.read_bytes() == before and os.listdir(good.parent) == ["good.npz"]


def test_content_reaches_the_disk_before_its_name(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    random_spectra().save(good)
    assert calls == ["fsync", "replace"]


def test_saved_files_get_the_usual_permissions(good: Path) -> None:
    plain = good.with_name("plain")
    plain.touch()
    assert good.stat().st_mode == plain.stat().st_mode


def test_refuses_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, text in (
        (tmp_path / "missing" / "x.npz", "No such file or directory"),
        (tmp_path / "file" / "x.npz", "Not a directory"),
        (tmp_path, "must be a file, got the folder"),
        (tmp_path / ("n" * 300) / "x", "File name too long"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        for write in (random_spectra().save, check_writable):
            with pytest.raises(ValueError, match=f"save: .*{text}") as caught:
                write(path)
            assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"output folder: cannot make .*file"):
        writable_folder(tmp_path / "file" / "folder")
    with pytest.raises(ValueError, match=r"output folder: cannot make .*file"):
        writable_folder(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable to root")
def test_refuses_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        check_writable(tmp_path / "x")
    with pytest.raises(ValueError, match="Permission denied"):
        writable_folder(tmp_path)


def test_checks_leave_nothing_behind(tmp_path: Path) -> None:
    folder = writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and writable_folder(folder) == folder
    assert check_writable(folder / "x.npz") == folder / "x.npz"
    assert os.listdir(folder) == []


def test_truncated_anywhere(good: Path) -> None:
    data = good.read_bytes()
    for length in [*range(0, 300, 7), *range(300, len(data), 997), *range(len(data) - 60, len(data))]:
        good.write_bytes(data[:length])
        refused(good)


def test_a_flipped_bit_is_refused_or_harmless(good: Path) -> None:
    data, spectra = good.read_bytes(), load(good)
    harmless = 0
    offsets = [*range(0, 400), *range(400, len(data) - 900, 173), *range(len(data) - 900, len(data))]
    for offset in offsets:
        flipped = bytearray(data)
        flipped[offset] ^= 1 << (offset % 8)
        good.write_bytes(flipped)
        try:
            loaded = load(good)
        except ValueError as error:
            assert type(error) is ValueError and str(good) in str(error) and "\n" not in str(error)
        else:
            assert same(loaded, spectra)  # a time stamp or the like
            harmless += 1
    assert harmless < len(offsets) / 2


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_damage(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("d") / "x.npz"
    spectra = random_spectra(n_probes=1, n_blocks=2, m=2)
    content = bytearray(spectra.save(path).read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    piece = data.draw(st.binary(max_size=12))
    content[start : start + data.draw(st.integers(0, 12))] = piece
    path.write_bytes(content)
    try:
        assert same(load(path), spectra)
    except ValueError as error:
        assert type(error) is ValueError and str(path) in str(error)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    assert "no such file" in refused(path)
    assert "Is a directory" in refused(tmp_path)
    path.write_text("block  dim\n")
    assert "no result file" in refused(path)
    path.write_bytes(b"")
    assert "no result file" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<xml/>")
    assert "not a blockhess-spectra file" in refused(path)
    torch.save({"weight": torch.ones(3)}, path)
    assert "not a blockhess-spectra file" in refused(path)
    np.savez(path, header=np.frombuffer(b"not json", np.uint8))
    assert "header is not JSON" in refused(path)
    np.savez(path, header=np.frombuffer(b"[" * 100_000, np.uint8))
    assert "header is not JSON" in refused(path)
    np.savez(path, header=np.frombuffer(b'{"format": "other"}', np.uint8))
    assert "not a blockhess-spectra file" in refused(path)


def test_nothing_is_ever_unpickled(good: Path) -> None:
    marker = good.with_name("executed")

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    bomb = np.empty(1, dtype=object)
    bomb[0] = Bomb()
    for name in ("header", "nodes"):
        path = good.with_name("bomb.npz")
        path.write_bytes(good.read_bytes())
        change_arrays(path, lambda arrays, name=name: arrays.update({name: bomb}))
        assert f"array {name} must be" in refused(path)
        assert not marker.exists()
    good.write_bytes(pickle.dumps(Bomb()))
    refused(good)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb()))  # control: the bomb works
    assert marker.exists()


def test_sizes_are_checked_before_memory_is_taken(good: Path) -> None:
    # An entry that claims 8 EB, and one that would unpack to 1 GB.
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f8", "fortran_order": False, "shape": (2**20, 2**20, 2**20)})
    rewrite(good, "nodes.npy", huge.getvalue() + b"\0" * 64)
    assert "does not fit its 64 bytes" in refused(good)
    rewrite(good, "nodes.npy", b"\0" * 2**20, zipfile.ZIP_DEFLATED)
    assert "must be stored uncompressed" in refused(good)
    rewrite(good, "header.npy", b"\0" * 2**20, zipfile.ZIP_DEFLATED)
    assert "must be stored uncompressed" in refused(good)


def rewrite(path: Path, name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in {**entries, name: content}.items():
            archive.writestr(entry, data, compression if entry == name else zipfile.ZIP_STORED)


def test_a_newer_version_says_so(good: Path) -> None:
    change_header(good, lambda header: header.update(version=2, format="blockhess-spectra", blocks="other"))
    assert refused(good).endswith("version must be 1, got 2; a newer blockhess wrote it: upgrade")
    change_header(good, lambda header: header.update(version=0))
    assert refused(good).endswith("version must be 1, got 0")


def test_missing_extra_and_repeated_arrays(good: Path) -> None:
    content = good.read_bytes()
    change_arrays(good, lambda arrays: arrays.pop("beta"))
    assert "must hold the arrays" in refused(good)
    good.write_bytes(content)
    change_arrays(good, lambda arrays: arrays.update(more=np.ones(2)))
    assert "must hold the arrays" in refused(good)
    good.write_bytes(content)
    with zipfile.ZipFile(good, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("nodes.npy", archive.read("nodes.npy"))
    assert "must hold the arrays" in refused(good)


def edit(key: str, value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        inner: Any = header
        for step in path:
            inner = inner[step]
        inner[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (edit("version", True), "version must be an integer, got True"),
        (edit("blocks", {}), "blocks must be a list"),
        (edit("blocks", [1]), "blocks must be an object, got 1"),
        (edit("name", 5, "blocks", 0), "name must be text, got 5"),
        (edit("name", "block1", "blocks", 0), "different names, got block1"),
        (edit("dim", 12.0, "blocks", 0), "dim must be an integer, got 12.0"),
        (edit("dim", 0, "blocks", 0), "dim of a block must be at least 1, got 0"),
        (edit("dim", 13, "blocks", 0), "shape of a block must have dim elements"),
        (edit("shape", None, "blocks", 0), "shape must be a list, got None"),
        (edit("note", None, "blocks", 0), "note must be text"),
        (edit("quadrature", None), "quadrature must be an object"),
        (edit("seed", "0", "quadrature"), "seed must be an integer, got '0'"),
        (edit("num_steps", None, "quadrature"), "num_steps must be an integer"),
        (edit("dtype", "float16", "quadrature"), "dtype must be float32 or float64, got 'float16'"),
        (edit("block_ids", [1], "quadrature"), "must agree"),
        (edit("dims", [12] * 10**5, "quadrature"), "must agree"),
        (edit("provenance", []), r"provenance must be an object, got \[\]"),
    ],
)
def test_headers_are_validated(good: Path, change: Callable[[dict[str, Any]], None], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load(change_header(good, change))


def test_earlier_files_are_read_under_the_present_names(good: Path) -> None:
    earlier = {"tol": 0.1, "sigma": 0.05, "batchnorm": "frozen-batch-stats"}
    change_header(good, lambda header: header["provenance"].update(earlier))
    made = load(good).provenance
    assert made["tol_sigma"] == 0.05 and "sigma" not in made and made["batchnorm"] == "frozen_batch_stats"


def test_change_header_alone_is_harmless(good: Path) -> None:
    # Control of the above and the below.
    change_header(good, lambda header: None)
    change_arrays(good, lambda arrays: None)
    load(good)


def set_at(name: str, index: Any, value: Any) -> Callable[[dict[str, np.ndarray[Any, Any]]], None]:
    def change(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
        arrays[name][index] = value

    return change


def replace(name: str, make: Callable[[np.ndarray[Any, Any]], object]) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.update({name: make(arrays[name])})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_at("nodes", (0, 0, 0), math.nan), "array nodes must be finite"),
        (set_at("beta", (2, 3, 11), math.inf), "array beta must be finite"),
        (set_at("weights", (0, 0, 0), -0.1), "weights must not be negative"),
        (set_at("weights", (0, 0), 0.5), "must sum to 1, off by 5"),
        (set_at("steps", (0, 0), 13), r"steps must be in 1 ... min\(dim, 12\)"),
        (set_at("steps", (0, 0), 0), "steps must be in 1"),
        (set_at("steps", (0, 0), -1), "steps must be in 1"),
        (replace("nodes", lambda a: a[:, :3]), r"array nodes must have shape \(3, 4, 12\), got \(3, 3, 12\)"),
        (replace("nodes", lambda a: a[:0]), "at least one probe"),
        (replace("steps", lambda a: a[:2]), r"array steps must have shape \(3, 4\), got \(2, 4\)"),
        (replace("steps", lambda a: a.astype("<i4")), "array steps must be <i8 with 2 dimensions, got <i4"),
        (replace("alpha", lambda a: a.astype(">f8")), "array alpha must be <f8 with 3 dimensions, got >f8"),
        (replace("beta", lambda a: a[0]), "array beta must be <f8 with 3 dimensions"),
        (replace("beta", lambda a: np.asfortranarray(a)), "array beta must be"),
    ],
)
def test_arrays_are_validated(good: Path, change: Callable[[dict[str, Any]], None], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load(change_arrays(good, change))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda header: header["blocks"][0].update(dim=10**400, shape=[10**400]), "dim of a block must be below 2^62"),
        (lambda header: header["blocks"][0].update(shape=[-3, -4]), "shape of a block must have dim elements"),
        (lambda header: header["quadrature"].update(num_steps=-5), "num_steps must be in 1"),
    ],
)
def test_numbers_that_cannot_be(good: Path, change: Callable[[dict[str, Any]], object], text: str) -> None:
    assert text in refused(change_header(good, change))


def test_terminal_escapes_in_names_are_not_printed(tmp_path: Path) -> None:
    clear = "w\x1b[2J\x1b]0;title\x07\n\u202e"
    spectra = random_spectra(names=[clear, "a", "b", "c"], notes=[clear] * 4, model=clear, loss=clear, loss_value=0.1)
    loaded = load(spectra.save(tmp_path / "x.npz"))
    assert loaded.names[0] == clear  # kept as it is; only shown otherwise
    spoiled = dataclasses.replace(loaded.quadrature, nonfinite=torch.eye(3, 4).cummin(0).values.bool())
    for shown in (loaded, Spectra(loaded.blocks, spoiled, loaded.provenance)):
        texts = (repr(shown), shown.table(), shown.error_table(), describe(shown), str(shown.js0()))
        for text in texts:
            assert all(line.isprintable() for line in text.split("\n")) and "w\x1b" not in text
        assert "w\\x1b[2J\\x1b]0;title\\x07\\n\\u202e" in texts[1]
    with pytest.raises(ValueError, match="no block is called") as caught:
        loaded.rows([clear + "x"])
    assert str(caught.value).isprintable()
    with pytest.raises(ValueError, match="different names") as caught:
        load(change_header(tmp_path / "x.npz", edit("name", clear, "blocks", 1)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_at("nodes", (0, 0, 0), 5.0), "nodes must ascend"),
        (set_at("beta", (0, 0, 0), 1e150), "beta must be at most 1e\\+140"),
    ],
)
def test_nodes_ascend_and_their_moments_are_finite(good: Path, change: Callable[[Any], None], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load(change_arrays(good, change))


@pytest.mark.parametrize(
    "value", ["x", [], {"block0": "x"}, {"block0": None}, {"block0": -1}, {"block0": math.inf}, {"block0": {}}]
)
@pytest.mark.parametrize("key", ["hvp_error", "ghosts"])
def test_what_results_compute_with_is_checked(good: Path, key: str, value: Any) -> None:
    assert "provenance" in refused(change_header(good, lambda header: header["provenance"].update({key: value})))
    assert "provenance" in refused(change_header(good, lambda header: header["provenance"].update(tol="x")))


def test_paths_in_messages_are_escaped(tmp_path: Path) -> None:
    for call in (load, random_spectra().save):
        with pytest.raises(ValueError, match=r"folder\\x1b\[2J") as caught:
            call(tmp_path / "folder\x1b[2J" / "file")
        assert str(caught.value).isprintable()
