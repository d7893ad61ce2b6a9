"""Atomic writes of state files, which a kill, a full disk or a power failure cannot lose.

    write:  path.new written and synced  ->  path becomes path.previous  ->  path.new becomes path  ->  folder synced

At any time path is complete, or path.new is while path is missing between the two renames; path.previous holds the
state before. Only one process may write: see lock.py. Nothing is unpickled. Whatever a file contains, reading returns
what was written or raises one ValueError that names the file, and takes no more memory than the size of the file and
its parsed header. All system calls go through `disk`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, TypeVar

from torch import Tensor

from blockhess._text import printable
from blockhess.run.storage import tensor_file
from blockhess.run.storage.tensor_file import DIGITS, MAX_HEADER, Damaged, checksum

_JSON_PREFIX, _JSON_MIDDLE, _JSON_END = b'{"checksum": "', b'",\n "content": ', b"}\n"

T = TypeVar("T")


class Disk:
    """System calls for state files, replaceable in tests."""

    open = staticmethod(os.open)
    write = staticmethod(os.write)
    readv = staticmethod(os.readv)
    fsync = staticmethod(os.fsync)
    fstat = staticmethod(os.fstat)
    close = staticmethod(os.close)
    exists = staticmethod(os.path.lexists)
    replace = staticmethod(os.replace)
    unlink = staticmethod(os.unlink)


disk = Disk()


def write(path: str | PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and header to path; the previous state is kept as path.previous.

    Args:
        path: of the file, in an existing folder.
        tensors: dense, of any shape, on any device; float, integer or bool.
        header: JSON values.

    Raises:
        OSError: a system call failed; either the previous or the new state is complete.
        TypeError, ValueError: see tensor_file.pack.

    Example:
        >>> write("state.safetensors", {"alpha": torch.ones(3)}, {"step": 3})
        >>> tensors, header = read("state.safetensors")
    """
    _write(path, tensor_file.pack(tensors, header))


def read(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the newest complete state at path.

    Returns:
        tensors on the CPU, equal bit for bit to those written; header. A warning is issued if path is damaged and an
        older state is returned.

    Raises:
        ValueError: there is no complete state; describes the newest.
    """
    return _read(path, _tensors)


def write_json(path: str | PathLike[str], content: Any) -> None:
    """Write JSON values to path as `write` does, up to MAX_HEADER bytes; any JSON reader can read the file."""
    text = json.dumps(content, indent=1).encode()
    if len(text) > MAX_HEADER:
        raise ValueError(f"write_json: text must take at most {MAX_HEADER} bytes, got {len(text)}")
    rest = _JSON_MIDDLE + text + _JSON_END
    _write(path, [_JSON_PREFIX, checksum([_JSON_PREFIX, rest]), rest])


def read_json(path: str | PathLike[str]) -> Any:
    """Read the newest complete content of `write_json`; raises as `read`."""
    return _read(path, _json)


def _write(path: str | PathLike[str], parts: Iterable[bytes | memoryview]) -> None:
    path = os.fspath(path)
    new = f"{path}.new"
    if not disk.exists(path):
        # Killed between the two renames: path.new is the newest state.
        with contextlib.suppress(FileNotFoundError):
            disk.replace(new, path)
    try:
        with _opened(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            for part in parts:
                _write_all(file, memoryview(part))
            disk.fsync(file)
    except OSError:
        with contextlib.suppress(OSError):
            disk.unlink(new)
        raise
    with contextlib.suppress(FileNotFoundError):
        disk.replace(path, f"{path}.previous")
    disk.replace(new, path)
    with _opened(os.path.dirname(path) or ".", os.O_RDONLY) as folder:
        try:
            disk.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system cannot sync folders
                raise


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    file = disk.open(path, flags, 0o666)
    try:
        yield file
    finally:
        disk.close(file)


def _write_all(file: int, view: memoryview) -> None:
    while view.nbytes:
        written = disk.write(file, view)
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view = view[written:]


def _read(path: str | PathLike[str], decode: Callable[[int], T]) -> T:
    path = os.fspath(path)
    problem = None
    for generation in (path, f"{path}.new", f"{path}.previous"):
        try:
            with _opened(generation, os.O_RDONLY | os.O_NONBLOCK) as file:  # do not wait for a pipe
                content = decode(file)
        except FileNotFoundError:
            continue
        except OSError as error:
            problem = problem or f"{printable(generation)}: {error.strerror or error}"
        except Damaged as error:
            problem = problem or f"{printable(generation)}: {error}"
        except MemoryError:
            problem = problem or f"{printable(generation)}: it is larger than the memory"
        else:
            if problem:
                warnings.warn(f"read: {problem}; {printable(generation)} is used instead", stacklevel=3)
            return content
    raise ValueError(f"read: {problem or f'no such file: {printable(path)}'}")


def _tensors(file: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    size = disk.fstat(file).st_size
    start = bytes(_read_exactly(file, min(size, 8)))
    length = tensor_file.header_length(start, size)
    text = bytes(_read_exactly(file, length))
    entries, header = tensor_file.parse(text, size - 8 - length)
    data = _read_exactly(file, size - 8 - length)
    return tensor_file.unpack(start, text, data, entries), header


def _json(file: int) -> Any:
    size = disk.fstat(file).st_size
    at = len(_JSON_PREFIX)
    if size > MAX_HEADER + at + DIGITS + len(_JSON_MIDDLE + _JSON_END):
        raise Damaged(f"its text must take at most {MAX_HEADER} bytes, got {size}")
    text = bytes(_read_exactly(file, size))
    start, digits, rest = text[:at], text[at : at + DIGITS], text[at + DIGITS :]
    if start != _JSON_PREFIX or checksum([start, rest]) != digits:
        raise Damaged("its checksum is missing or wrong: it was damaged or changed")
    try:
        return json.loads(text)["content"]
    except (ValueError, LookupError, RecursionError) as error:
        raise Damaged(f"it cannot be read: {type(error).__name__}") from None


def _read_exactly(file: int, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view.nbytes:
        count = disk.readv(file, [view])
        if count == 0:
            raise Damaged("it is truncated")
        view = view[count:]
    return data
