"""Result files: one .npz of plain arrays, the first of which, "header", is UTF-8 JSON that describes all others.

    header  format, version, blocks, provenance, and what the quadrature has beside arrays
    nodes, weights, alpha, beta  (n_probes, n_blocks, m) float64;  steps int64 and nonfinite bool (n_probes, n_blocks)

Promises: a round trip keeps every bit; nothing is ever unpickled; a file is either complete or not there (written
beside its place, synced, moved into it). Whatever a file holds, `load` returns sound Spectra or raises one ValueError
that names the file; entries are stored uncompressed, so none can be larger than the file itself.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import reprlib
import secrets
import zipfile
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch

from blockhess._text import printable
from blockhess.problem.blocks import BlockInfo
from blockhess.spectra import Spectra
from blockhess_ext import Quadrature

FORMAT = "blockhess-spectra"
VERSION = 1

# How far the weights of a recurrence may sum from 1.
WEIGHT_TOLERANCE = 1e-6

# Nodes up to this size have moments that float64 holds: 2^62 squares of them are finite.
LARGEST_NODE = 1e140

# The only header that numpy writes for these arrays; nothing else is parsed.
_NPY_HEADER = re.compile(
    r"\{'descr': '([^'\\]{1,9})', 'fortran_order': (False|True), 'shape': \(([0-9, ]{0,99})\), \} *\n"
)
_MAGIC = b"\x93NUMPY\x01\x00"

# array -> (dtype, number of dimensions)
_ARRAYS = {
    "header": ("|u1", 1),
    "nodes": ("<f8", 3),
    "weights": ("<f8", 3),
    "alpha": ("<f8", 3),
    "beta": ("<f8", 3),
    "steps": ("<i8", 2),
    "nonfinite": ("|b1", 2),
}


def check_writable(path: str | PathLike[str]) -> Path:
    """Return path where a file can be written there; call it before long work.

    Args:
        path: of a file that may exist already; its folder must.

    Raises:
        ValueError: path is a folder, or its folder is missing or refuses new files.
    """
    path = Path(path)
    _write(path, None)
    return path


def writable_folder(path: str | PathLike[str]) -> Path:
    """Make the folder with all its parents where it is missing, and return it if files can be written there.

    Raises:
        ValueError: it cannot be made, is no folder, or refuses new files.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output folder: cannot make {path}: {error.strerror or error}") from None
    _write(path / "file", None)
    return path


def save(spectra: Spectra, path: str | PathLike[str]) -> Path:
    """Write spectra to a file, all or nothing; an older file of that name is replaced.

    Args:
        spectra: what to keep.
        path: the file, taken as it is (".npz" by custom).

    Returns:
        path.

    Raises:
        ValueError: the file cannot be written there.

    Example:
        >>> blockhess.load(save(spectra, "gpt.npz")).names == spectra.names
        True
    """
    path = Path(path)
    q = spectra.quadrature
    header = {
        "format": FORMAT,
        "version": VERSION,
        "blocks": [
            {
                "name": block.name,
                "shape": list(block.shape),
                "dim": block.dim,
                "parameters": list(block.parameters),
                "note": block.note,
            }
            for block in spectra.blocks
        ],
        "quadrature": {
            "dims": list(q.dims),
            "block_ids": list(q.block_ids),
            "num_steps": q.num_steps,
            "seed": q.seed,
            "distribution": q.distribution,
            "reorthogonalize": list(q.reorthogonalize),
            "dtype": q.dtype,
        },
        "provenance": spectra.provenance,
    }
    text = json.dumps(header, indent=1).encode()
    arrays = {"header": np.frombuffer(text, np.uint8)}
    for name in list(_ARRAYS)[1:]:
        arrays[name] = getattr(q, name).numpy().astype(_ARRAYS[name][0])
    _write(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
    return path


def write_text(text: str, path: str | PathLike[str]) -> Path:
    """Write text as UTF-8, all or nothing; an older file of that name is replaced.

    Returns:
        path.

    Raises:
        ValueError: the file cannot be written there.
    """
    path = Path(path)
    _write(path, lambda file: file.write(text.encode()))
    return path


def load(path: str | PathLike[str]) -> Spectra:
    """Read spectra from a file of `save`.

    Args:
        path: the file.

    Returns:
        Spectra, equal bit by bit to what was saved.

    Raises:
        ValueError: there is no such file, or it is not a complete, sound result file of this or an older version.

    Example:
        >>> spectra = load("gpt.npz")
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise ValueError(f"load: no such file: {path}") from None
    except OSError as error:
        raise ValueError(f"load: cannot read {path}: {error.strerror or error}") from None
    with file:
        try:
            with zipfile.ZipFile(file) as archive:
                header = _header(archive)
                arrays = {name: _array(archive, name) for name in list(_ARRAYS)[1:]}
                return _spectra(header, arrays)
        except _Refused as error:
            raise ValueError(f"load: {path}: {_short(error)}") from None
        except zipfile.BadZipFile as error:
            raise ValueError(f"load: {path} is no result file, or a damaged one: {_short(error)}") from None
        except _DAMAGE as error:
            raise ValueError(f"load: {path} is damaged: {type(error).__name__}: {_short(error)}") from None


def _short(error: Exception) -> str:
    """The text of an error, which may quote the file: one line that is safe to print."""
    text = printable(str(error))
    return text if len(text) <= 400 else f"{text[:400]} ..."


class _Refused(Exception):
    """What is wrong with a file, to follow its name."""


# What zipfile and numpy raise on damaged bytes beside BadZipFile.
_DAMAGE = (ValueError, RuntimeError, OSError, EOFError, LookupError, OverflowError, MemoryError)


def _header(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Return the header, once format, version and the names of all entries are what a result file has."""
    entries = [entry.filename for entry in archive.infolist()]
    if "header.npy" not in entries:
        raise _Refused(f"it is not a {FORMAT} file: it has no header")
    try:
        header = json.loads(_array(archive, "header").tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise _Refused(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _Refused(f"it is not a {FORMAT} file")
    version = _get(header, "version", int)
    if version != VERSION:
        advice = "; a newer blockhess wrote it: upgrade" if version > VERSION else ""
        raise _Refused(f"version must be {VERSION}, got {reprlib.repr(version)}{advice}")
    if sorted(entries) != sorted(f"{name}.npy" for name in _ARRAYS):
        raise _Refused(f"it must hold the arrays {', '.join(_ARRAYS)}, got {reprlib.repr(entries)}")
    return header


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    """Read one array; its header must describe exactly the bytes that follow before any of them is read."""
    dtype, ndim = _ARRAYS[name]
    entry = archive.getinfo(f"{name}.npy")
    stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
    if not stored or entry.file_size > os.fstat(archive.fp.fileno()).st_size:  # type: ignore[union-attr]
        raise _Refused(f"array {name} must be stored uncompressed within the file")
    with archive.open(entry) as file:
        start = file.read(len(_MAGIC) + 2)
        text = file.read(int.from_bytes(start[len(_MAGIC) :], "little")).decode("latin1")
        found = _NPY_HEADER.fullmatch(text)
        if not start.startswith(_MAGIC) or found is None:
            raise _Refused(f"array {name} must be in npy format 1.0")
        got, order = found[1], found[2]
        shape = tuple(int(n) for n in found[3].split(",") if n.strip())
        if got != dtype or len(shape) != ndim or order != "False":
            raise _Refused(f"array {name} must be {dtype} with {ndim} dimensions, got {got} {shape}")
        size = entry.file_size - file.tell()
        if math.prod(shape) * np.dtype(dtype).itemsize != size:
            raise _Refused(f"array {name} of shape {shape} does not fit its {size} bytes")
        # Reading to the end also compares the checksum.
        return np.frombuffer(file.read(), dtype).reshape(shape)


def _spectra(header: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> Spectra:
    """Return the spectra of a file, after every promise about its parts was checked."""
    blocks = [_block(entry) for entry in _list(header, "blocks", dict)]
    made = _get(header, "quadrature", dict)
    dims, block_ids = (tuple(_list(made, key, int)) for key in ("dims", "block_ids"))
    reorthogonalize = tuple(_list(made, "reorthogonalize", str))
    dtype, seed = _get(made, "dtype", str), made.get("seed")
    _require(dtype in ("float32", "float64"), f"dtype must be float32 or float64, got {reprlib.repr(dtype)}")
    _require(
        dims == tuple(block.dim for block in blocks) and len(dims) == len(block_ids) == len(reorthogonalize),
        "blocks, dims, block_ids and reorthogonalize must agree",
    )
    _check_arrays(arrays, dims)
    provenance = _get(header, "provenance", dict)
    _check_provenance(provenance)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    quadrature = Quadrature(
        nodes=tensors["nodes"],
        weights=tensors["weights"],
        alpha=tensors["alpha"],
        beta=tensors["beta"],
        steps=tensors["steps"],
        nonfinite=tensors["nonfinite"],
        dims=dims,
        block_ids=block_ids,
        num_steps=_positive(made, "num_steps"),
        seed=None if seed is None else _get(made, "seed", int),
        distribution=_get(made, "distribution", str),
        reorthogonalize=reorthogonalize,
        dtype=dtype,
    )
    try:
        return Spectra(blocks, quadrature, provenance)
    except (ValueError, TypeError) as error:
        raise _Refused(str(error)) from None


def _check_provenance(provenance: dict[str, Any]) -> None:
    """Refuse entries that results compute with and that are no numbers; all others are only shown."""
    tol = provenance.get("tol")
    numbers = [] if tol is None else [tol]
    for name in ("hvp_error", "ghosts"):
        by_block = provenance.get(name)
        _require(by_block is None or isinstance(by_block, dict), f"provenance: {name} must be an object of numbers")
        numbers += (by_block or {}).values()
    for number in numbers:
        sound = type(number) in (int, float) and 0 <= number < math.inf
        _require(sound, f"provenance: tol, hvp_error and ghosts must be numbers, got {reprlib.repr(number)}")


def _positive(entry: dict[str, Any], key: str) -> int:
    value: int = _get(entry, key, int)
    _require(1 <= value < 2**62, f"{key} must be in 1 ... 2^62")
    return value


def _block(entry: dict[str, Any]) -> BlockInfo:
    dim = _get(entry, "dim", int)
    shape = tuple(_list(entry, "shape", int))
    _require(dim >= 1, f"dim of a block must be at least 1, got {dim}")
    _require(dim < 2**62, "dim of a block must be below 2^62")
    _require(min(shape, default=1) >= 1 and math.prod(shape) == dim, "shape of a block must have dim elements")
    return BlockInfo(
        name=_get(entry, "name", str),
        shape=shape,
        dim=dim,
        parameters=tuple(_list(entry, "parameters", str)),
        note=_get(entry, "note", str),
    )


def _check_arrays(arrays: dict[str, np.ndarray[Any, Any]], dims: tuple[int, ...]) -> None:
    """Refuse arrays that are not nodes, weights, alpha, beta, steps and nonfinite of one quadrature."""
    n_probes, _, m = arrays["nodes"].shape
    _require(min(n_probes, len(dims), m) >= 1, "it must hold at least one probe, block and step")
    for name, array in arrays.items():
        shape = (n_probes, len(dims), m)[: array.ndim]
        _require(array.shape == shape, f"array {name} must have shape {shape}, got {array.shape}")

    steps = arrays["steps"]
    # No step: frozen at once, or a probe that its block did without.
    least = np.where(arrays["nonfinite"] | (arrays["weights"] == 0).all(-1), 0, 1)
    most = np.array([min(dim, m) for dim in dims])
    _require(bool(((steps >= least) & (steps <= most)).all()), f"steps must be in 1 ... min(dim, {m})")
    valid = np.arange(m) < steps[..., None]
    for name in ("nodes", "weights", "alpha", "beta"):
        values = arrays[name][valid]
        _require(bool(np.isfinite(values).all()), f"array {name} must be finite")
        _require(bool((np.abs(values) <= LARGEST_NODE).all()), f"array {name} must be at most {LARGEST_NODE:g} in size")
    nodes = arrays["nodes"]
    _require(bool(((nodes[..., 1:] >= nodes[..., :-1]) | ~valid[..., 1:]).all()), "nodes must ascend")
    weights = np.where(valid, arrays["weights"], 0.0)
    _require(bool((weights >= 0).all()), "weights must not be negative")
    off = float(np.abs(weights.sum(-1) - (steps > 0)).max())
    _require(off < WEIGHT_TOLERANCE, f"the weights of a recurrence must sum to 1, off by {off:.3g}")


T = TypeVar("T")


def _get(entry: dict[str, Any], key: str, kind: type[T]) -> T:
    """Return entry[key], which must be of that kind; true and false are no integers."""
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _Refused(f"{key} must be {_KINDS[kind]}, got {reprlib.repr(value)}")
    return value


def _list(entry: dict[str, Any], key: str, kind: type[T]) -> list[T]:
    return [_get({key: item}, key, kind) for item in _get(entry, key, list)]


_KINDS: dict[type, str] = {int: "an integer", str: "text", list: "a list", dict: "an object"}


def _require(rule: bool, text: str) -> None:
    if not rule:
        raise _Refused(text)


def _write(path: Path, content: Callable[[IO[bytes]], object] | None) -> None:
    """Write a file beside path and move it there; without content, only try whether that would work."""
    if os.path.isdir(path):  # Path.is_dir would raise on names that are too long
        raise ValueError(f"save: path must be a file, got the folder {path}")
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # refuses a bad name now, not when the file is moved there
        with temporary.open("xb") as file:
            if content is not None:
                content(file)
                file.flush()
                os.fsync(file.fileno())
        if content is not None:
            os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"save: cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
