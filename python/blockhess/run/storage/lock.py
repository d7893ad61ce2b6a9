"""One process at a time in a run directory: a file "lock" that names its holder.

    holder = pid, host, start of the process

A holder counts as long as its process lives: on this host that is looked up, and a pid that now belongs to another
process is told by its start; one on another host counts until its file is removed. The file itself stays, empty when
nobody holds it; the kernel's lock on it is held only while it is read and written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

_NO_KERNEL_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(directory: str | PathLike[str]) -> Iterator[None]:
    """Hold the directory for this process.

    Args:
        directory: exists.

    Raises:
        ValueError: another process holds it.
        OSError: no file can be written there.

    Example:
        >>> with locked(folder):
        ...     written = (folder / "state").write_text("nobody else writes here")
    """
    path = Path(directory) / "lock"
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "start": process_start(os.getpid())}
    with _exclusive(path) as file:
        holder = _holder(file)
        if holder is not None and _lives(holder):
            raise ValueError(
                f"locked: directory must not be in use, got {directory}, held by process {holder['pid']!r} on "
                f"{holder['host']!r}; if that one is gone, remove {path}"
            )
        _set_content(file, json.dumps(mine).encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError), _exclusive(path) as file:
            if _holder(file) == mine:
                _set_content(file, b"")


def holder(directory: str | PathLike[str]) -> str | None:
    """Who holds the directory now, for a person to read; None where nobody does. Nothing is changed."""
    try:
        file = os.open(Path(directory) / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        found = _holder(file)
    finally:
        os.close(file)
    return f"process {found['pid']} on {found['host']}" if found and _lives(found) else None


def process_start(pid: int) -> str | None:
    """What tells this process from every other one of that pid; None where it is gone, or the system does not say.

    On Linux: the boot, and the clock ticks from there to the start.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name, in parentheses, may hold anything; field 22 is the 20th after it.
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, UnicodeDecodeError, LookupError):
        return None


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_KERNEL_LOCKS:
                raise
        yield file
    finally:
        os.close(file)


def _holder(file: int) -> dict[str, Any] | None:
    """Who holds it; None where nobody does, or a crash left something else than what `locked` writes."""
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except (ValueError, RecursionError):
        return None
    whole = isinstance(holder, dict) and holder.keys() == {"pid", "host", "start"}
    return holder if whole and type(holder["pid"]) is int and 0 < holder["pid"] < 2**31 else None


def _set_content(file: int, content: bytes) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, content, 0)


def _lives(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is another user's
        pass
    return bool(holder["start"] == process_start(holder["pid"]))
