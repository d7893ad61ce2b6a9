"""Exclusive use of a run directory: a kernel lock on its file "lock", which names the holder.

The kernel releases the lock when its holder ends, however it ends. The file remains, empty when it is not locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from blockhess._text import printable

_NO_KERNEL_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(directory: str | PathLike[str]) -> Iterator[None]:
    """Lock an existing directory for this process.

    Raises:
        ValueError: another process has locked it.
        OSError: no file can be written there.

    Example:
        >>> with locked(folder):
        ...     written = (folder / "state").write_text("no other process writes here")
    """
    path = Path(directory) / "lock"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _acquire(file, fcntl.LOCK_EX, path):
            shown = f"{printable(directory)}, held by {_read(file)} ({printable(path)})"
            raise ValueError(f"locked: directory must not be in use, got {shown}")
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()!r}".encode(), 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(file, 0)
                fcntl.flock(file, fcntl.LOCK_UN)  # also for forked processes, which share the lock
    finally:
        os.close(file)


def holder(directory: str | PathLike[str]) -> str | None:
    """Return process and host that have locked the directory, or None if it is not locked."""
    path = Path(directory) / "lock"
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # do not wait for a pipe
    except OSError:
        return None
    try:
        return None if _acquire(file, fcntl.LOCK_SH, path) else _read(file)
    finally:
        os.close(file)


def _acquire(file: int, kind: int, path: Path) -> bool:
    for _ in range(5):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)  # `holder` locks for an instant
        except OSError as error:
            if error.errno not in _NO_KERNEL_LOCKS:
                raise
            warnings.warn(
                f"run_dir: the file system cannot lock {printable(path)}: use it in one process only", stacklevel=4
            )
            return True
    return False


def _read(file: int) -> str:
    return printable(os.pread(file, 256, 0).decode(errors="replace")) or "another process"
