"""A disk that fails: stands in for `blockhess.run.storage.store.disk`.

calls are counted from 0 over open, write, fsync, replace, unlink, exists, close
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from blockhess.run.storage.store import Disk


class Killed(BaseException):
    """The process is dead: nothing it would still do reaches the disk."""


class FaultyDisk(Disk):
    """A disk that runs `fault` in place of the call of that number; see kill, error, short.

    Args:
        at: number of the call.
        fault: of the real call and its arguments.
    """

    def __init__(self, at: int = -1, fault: Callable[..., Any] | None = None) -> None:
        self.at, self.fault, self.log, self.dead = at, fault, list[str](), False

    def _call(self, name: str, *arguments: Any) -> Any:
        if self.dead:
            raise Killed
        real = getattr(Disk, name)
        self.log.append(name)
        if len(self.log) - 1 != self.at or self.fault is None:
            return real(*arguments)
        try:
            return self.fault(real, *arguments)
        except Killed:
            self.dead = True
            raise

    def open(self, *arguments: Any) -> Any:
        return self._call("open", *arguments)

    def write(self, *arguments: Any) -> Any:
        return self._call("write", *arguments)

    def fsync(self, *arguments: Any) -> Any:
        return self._call("fsync", *arguments)

    def close(self, *arguments: Any) -> Any:
        if self.dead:  # the system closes what a dead process had open
            os.close(*arguments)
        return self._call("close", *arguments)

    def exists(self, *arguments: Any) -> Any:
        return self._call("exists", *arguments)

    def replace(self, *arguments: Any) -> Any:
        return self._call("replace", *arguments)

    def unlink(self, *arguments: Any) -> Any:
        return self._call("unlink", *arguments)


def kill(real: Callable[..., Any], *arguments: Any) -> Any:
    """kill -9 before the call."""
    raise Killed


def kill_halfway(real: Callable[..., Any], *arguments: Any) -> Any:
    """kill -9 within a write that has half of its bytes; before any other call."""
    if real is os.write:
        file, data = arguments
        real(file, data[: len(data) // 2])
    raise Killed


def kill_after(real: Callable[..., Any], *arguments: Any) -> Any:
    """kill -9 right after the call."""
    real(*arguments)
    raise Killed


def short(real: Callable[..., Any], *arguments: Any) -> Any:
    """A write that takes the first byte only; any other call as it is."""
    if real is os.write:
        file, data = arguments
        return real(file, data[:1])
    return real(*arguments)


def error(number: int) -> Callable[..., Any]:
    """The call fails with that errno; a write has taken half of its bytes by then."""

    def fail(real: Callable[..., Any], *arguments: Any) -> Any:
        if real is os.write:
            file, data = arguments
            real(file, data[: len(data) // 2])
        if real is os.close:
            real(*arguments)
        raise OSError(number, os.strerror(number))

    return fail


disk_full, broken = error(errno.ENOSPC), error(errno.EIO)
