"""Result files: one .npz of plain arrays, the first of which, "header", is UTF-8 JSON that describes the others.

    header  format, version, blocks, provenance, and the fields of the quadrature that are no tensors
    nodes, weights, alpha, beta  (n_probes, n_blocks, m) float64;  steps int64 and nonfinite bool (n_probes, n_blocks)

A round trip preserves every bit. Nothing is unpickled. A file is written under a temporary name, synced and renamed, so
it is complete or absent. `read` returns a valid result or raises one ValueError that names the file, whatever the file
contains; entries are stored uncompressed, so none takes more memory than the file has bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import reprlib
import secrets
import stat
import sys
import tokenize
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch

from blockhess._text import printable
from blockhess.problem.blocks import BlockInfo
from blockhess_ext import Quadrature

FORMAT = "blockhess-spectra"
VERSION = 1

# Largest deviation from 1 of the sum of a recurrence's weights.
WEIGHT_TOLERANCE = 1e-6
# Largest absolute value of a node: sums of 2^62 squares of such nodes are finite in float64.
LARGEST_NODE = 1e140
# array -> (dtype, number of dimensions)
_ARRAYS = {name: ("<f8", 3) for name in ("nodes", "weights", "alpha", "beta")}
_ARRAYS |= {"steps": ("<i8", 2), "nonfinite": ("|b1", 2)}


def check_writable(path: str | PathLike[str]) -> Path:
    """Return path if a file can be written there; to be called before a long computation.

    Args:
        path: of a file that may exist; its folder must exist.

    Raises:
        ValueError: path is a folder, or its folder is missing or not writable.
    """
    path = Path(path)
    _write(path, None)
    return path


def writable_folder(path: str | PathLike[str]) -> Path:
    """Create the folder and its parents if they are missing, and return it if files can be written there.

    Raises:
        ValueError: it cannot be created, is not a folder, or is not writable.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output folder: cannot make {printable(path)}: {error.strerror or error}") from None
    _write(path / "file", None)
    return path


def write_text(text: str, path: str | PathLike[str]) -> Path:
    """Write text as UTF-8, atomically, and return path. An existing file is replaced.

    Raises:
        ValueError: the file cannot be written.
    """
    path = Path(path)
    _write(path, lambda file: file.write(text.encode()))
    return path


def write(
    path: str | PathLike[str], blocks: Sequence[BlockInfo], quadrature: Quadrature, provenance: Mapping[str, Any]
) -> Path:
    """Write a result file, atomically, and return path. An existing file is replaced.

    Args:
        path: of the file, used unchanged (".npz" by convention).
        blocks: information on every block.
        quadrature: on the CPU.
        provenance: JSON values.

    Raises:
        ValueError: the file cannot be written.

    Example:
        >>> write("gpt.npz", spectra.blocks, spectra.quadrature, spectra.provenance)
    """
    path = Path(path)
    labels = {f.name: getattr(quadrature, f.name) for f in dataclasses.fields(quadrature) if f.name not in _ARRAYS}
    header = {"format": FORMAT, "version": VERSION, "blocks": [dataclasses.asdict(block) for block in blocks]}
    header |= {"quadrature": labels, "provenance": provenance}
    arrays = {"header": np.frombuffer(json.dumps(header, indent=1).encode(), np.uint8)}
    for name, (dtype, _) in _ARRAYS.items():
        arrays[name] = getattr(quadrature, name).numpy().astype(dtype)
    _write(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
    return path


def read(path: str | PathLike[str]) -> tuple[list[BlockInfo], Quadrature, dict[str, Any]]:
    """Read a file of `write`.

    Returns:
        blocks, quadrature and provenance, equal bit for bit to those written.

    Raises:
        ValueError: the file does not exist, or is not a complete and valid result file of this or an older version.

    Example:
        >>> blocks, quadrature, provenance = read("gpt.npz")
    """
    path = Path(path)
    shown = printable(path)
    try:
        file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  (closed below)
    except FileNotFoundError:
        raise ValueError(f"load: no such file: {shown}") from None
    except OSError as error:
        raise ValueError(f"load: cannot read {shown}: {error.strerror or error}") from None
    with file:
        try:
            _require(stat.S_ISREG(os.fstat(file.fileno()).st_mode), "it must be a regular file")
            with zipfile.ZipFile(file) as archive:
                return _result(_header(archive), {name: _array(archive, name, *_ARRAYS[name]) for name in _ARRAYS})
        except _Refused as error:
            raise ValueError(f"load: {shown}: {_short(error)}") from None
        except zipfile.BadZipFile as error:
            raise ValueError(f"load: {shown} is no result file, or a damaged one: {_short(error)}") from None
        except _DAMAGE as error:
            raise ValueError(f"load: {shown} is damaged: {type(error).__name__}: {_short(error)}") from None


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # the writer of a pipe may never come


def _short(error: Exception) -> str:
    text = printable(error)  # it may quote the file
    return text if len(text) <= 400 else f"{text[:400]} ..."


class _Refused(Exception):
    """The file is invalid; the text says why and follows the file's name."""


# Errors of zipfile and numpy for damaged bytes, besides BadZipFile.
_DAMAGE = (
    ValueError, RuntimeError, OSError, EOFError, LookupError, OverflowError, MemoryError, TypeError, SyntaxError,
    tokenize.TokenError,
)  # fmt: skip


def _header(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Return the header after checking format, version and the names of all entries."""
    entries = [entry.filename for entry in archive.infolist()]
    if "header.npy" not in entries:
        raise _Refused(f"it is not a {FORMAT} file: it has no header")
    try:
        header = json.loads(_array(archive, "header", "|u1", 1).tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise _Refused(f"its header is not JSON: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _Refused(f"it is not a {FORMAT} file")
    version = _get(header, "version", int)
    if version != VERSION:
        advice = "; a newer blockhess wrote it: upgrade" if version > VERSION else ""
        raise _Refused(f"version must be {VERSION}, got {reprlib.repr(version)}{advice}")
    names = ("header", *_ARRAYS)
    if sorted(entries) != sorted(f"{name}.npy" for name in names):
        raise _Refused(f"it must hold the arrays {', '.join(names)}, got {reprlib.repr(entries)}")
    return header


def _array(archive: zipfile.ZipFile, name: str, dtype: str, ndim: int) -> np.ndarray[Any, Any]:
    """Return one array; its dtype, shape and size are checked before memory is allocated."""
    entry = archive.getinfo(f"{name}.npy")
    stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
    if not stored or entry.file_size > os.fstat(archive.fp.fileno()).st_size:  # type: ignore[union-attr]
        raise _Refused(f"array {name} must be stored uncompressed within the file")
    with archive.open(entry) as file:
        np.lib.format.read_magic(file)
        shape, fortran_order, found = np.lib.format.read_array_header_1_0(file)
        if found.str != dtype or len(shape) != ndim or fortran_order:
            raise _Refused(f"array {name} must be {dtype} with {ndim} dimensions, got {found.str} {shape}")
        data = file.read()  # to the end, which verifies the checksum
    if math.prod(shape) * found.itemsize != len(data):
        raise _Refused(f"array {name} of shape {shape} does not fit its {len(data)} bytes")
    return np.frombuffer(bytearray(data), found).reshape(shape)


def _result(
    header: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]
) -> tuple[list[BlockInfo], Quadrature, dict[str, Any]]:
    """Return the parts of a result after checking every value."""
    blocks = [_block(entry) for entry in _list(header, "blocks", dict)]
    made = _get(header, "quadrature", dict)
    dims, block_ids = (tuple(_list(made, key, int)) for key in ("dims", "block_ids"))
    reorthogonalize = tuple(_list(made, "reorthogonalize", str))
    dtype = _get(made, "dtype", str)
    _require(dtype in ("float32", "float64"), f"dtype must be float32 or float64, got {reprlib.repr(dtype)}")
    _require(
        dims == tuple(block.dim for block in blocks) and len(dims) == len(block_ids) == len(reorthogonalize),
        "blocks, dims, block_ids and reorthogonalize must agree",
    )
    repeated = [name for name, count in Counter(block.name for block in blocks).items() if count > 1]
    _require(not repeated, f"blocks must have different names, got {', '.join(repeated)} more than once")
    _check_arrays(arrays, dims)
    num_steps = _get(made, "num_steps", int)
    _require(1 <= num_steps < 2**62, "num_steps must be in 1 ... 2^62")
    fields: dict[str, Any] = {"dims": dims, "block_ids": block_ids, "num_steps": num_steps, "dtype": dtype}
    fields |= {"distribution": _get(made, "distribution", str), "reorthogonalize": reorthogonalize}
    fields["seed"] = None if made.get("seed") is None else _get(made, "seed", int)
    fields |= {name: torch.from_numpy(array) for name, array in arrays.items()}
    quadrature = Quadrature(**fields)
    made_by = _get(header, "provenance", dict)
    provenance = with_current_names(made_by)
    if "tol_sigma" in provenance and "tol_sigma" not in made_by:  # of version 0.1, which compared on the linear axis
        provenance["default_axis"] = "linear"
    _check_provenance(provenance)
    return blocks, quadrature, provenance


def with_current_names(made: dict[str, Any]) -> dict[str, Any]:
    """Return provenance, or the identity of a run, with names that earlier files use replaced by the present ones."""
    made = dict(made)
    if made.keys() >= {"tol", "sigma"}:
        made["tol_sigma"] = made.pop("sigma")
    if made.get("batchnorm") == "frozen-batch-stats":
        made["batchnorm"] = "frozen_batch_stats"
    if made.get("parallel") == "work":
        made["parallel"] = "recurrences"
    return made


def _check_provenance(provenance: dict[str, Any]) -> None:
    """Check the types of entries used in computations; all others are only shown."""
    tol = provenance.get("tol")
    numbers = [] if tol is None else [tol]
    _require(isinstance(provenance.get("unchecked", []), list), "provenance: unchecked must be a list of names")
    for name in ("hvp_error", "ghosts", "gradient_norms"):
        by_block = provenance.get(name)
        _require(by_block is None or isinstance(by_block, dict), f"provenance: {name} must be an object of numbers")
        numbers += (by_block or {}).values()
    for number in numbers:
        sound = type(number) in (int, float) and 0 <= number <= sys.float_info.max
        _require(sound, f"provenance: tol and the values of blocks must be numbers, got {reprlib.repr(number)}")
    for name in ("seconds", "loss_value"):
        number = provenance.get(name)
        overflow = type(number) is int and abs(number) > sys.float_info.max
        _require(not overflow, f"provenance: {name} must be a number that float64 holds, got {reprlib.repr(number)}")
    slices = provenance.get("slices", {})
    _require(isinstance(slices, dict), "provenance: slices must be an object of lists")
    for part in itertools.chain.from_iterable(_list({"slices": found}, "slices", list) for found in slices.values()):
        kinds = [type(item) for item in part]
        _require(kinds == [str, int, int, int], f"a slice must be a name and 3 integers, got {reprlib.repr(part)}")


def _block(entry: dict[str, Any]) -> BlockInfo:
    dim = _get(entry, "dim", int)
    shape = tuple(_list(entry, "shape", int))
    _require(dim >= 1, f"dim of a block must be at least 1, got {dim}")
    _require(dim < 2**62, "dim of a block must be below 2^62")
    _require(min(shape, default=1) >= 1 and math.prod(shape) == dim, "shape of a block must have dim elements")
    parameters = tuple(_list(entry, "parameters", str))
    return BlockInfo(_get(entry, "name", str), shape, dim, parameters, _get(entry, "note", str))


def _check_arrays(arrays: dict[str, np.ndarray[Any, Any]], dims: tuple[int, ...]) -> None:
    """Check that the arrays are those of one quadrature."""
    n_probes, _, m = arrays["nodes"].shape
    _require(min(n_probes, len(dims), m) >= 1, "it must hold at least one probe, block and step")
    for name, array in arrays.items():
        shape = (n_probes, len(dims), m)[: array.ndim]
        _require(array.shape == shape, f"array {name} must have shape {shape}, got {array.shape}")

    steps = arrays["steps"]
    # No step: not finite at the first step, or a probe that was not used for the block.
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
    """Return entry[key], which must be of that type; true and false are not integers."""
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
    """Write a temporary file next to path and rename it; without content, only check that this is possible."""
    if os.path.isdir(path):  # Path.is_dir would raise on names that are too long
        raise ValueError(f"save: path must be a file, got the folder {printable(path)}")
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with contextlib.suppress(FileNotFoundError):
            path.stat()  # fails for an invalid name before anything is computed
        with temporary.open("xb") as file:
            if content is not None:
                content(file)
                file.flush()
                os.fsync(file.fileno())
        if content is not None:
            os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"save: cannot write {printable(path)}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
