"""A run directory has one holder; holders that are gone are recognised."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from blockhess.run.storage import lock
from blockhess.run.storage.lock import locked, process_start

HOLD = """
import sys
from blockhess.run.storage.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def write_holder(directory: Path, **changes: Any) -> None:
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "start": process_start(os.getpid())}
    (directory / "lock").write_text(json.dumps(mine | changes))


def refused(directory: Path) -> str:
    with pytest.raises(ValueError, match="must not be in use") as caught, locked(directory):
        pass
    return str(caught.value)


def test_a_second_process_is_told_of_the_first(tmp_path: Path) -> None:
    process = hold(tmp_path)
    text = refused(tmp_path)
    assert f"process {process.pid} on {socket.gethostname()!r}" in text and str(tmp_path / "lock") in text
    process.communicate("")
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert (tmp_path / "lock").read_text() == ""


def test_a_killed_holder_is_stale(tmp_path: Path) -> None:
    process = hold(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "lock").read_text() != ""
    with locked(tmp_path):
        pass


def test_nobody_holds_it_twice(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert f"process {os.getpid()}" in refused(tmp_path)
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError  # released on errors too
    with locked(tmp_path):
        pass


def test_a_pid_that_is_used_again_is_stale(tmp_path: Path) -> None:
    write_holder(tmp_path)
    refused(tmp_path)  # control
    write_holder(tmp_path, start="other boot 5")
    with locked(tmp_path):
        pass


def test_starts_tell_processes_apart(tmp_path: Path) -> None:
    process = hold(tmp_path)
    assert process_start(os.getpid()) == process_start(os.getpid()) != process_start(process.pid)
    process.communicate("")
    assert process_start(process.pid) is None


def test_a_holder_on_another_host_counts(tmp_path: Path) -> None:
    write_holder(tmp_path, host="elsewhere", pid=2**22 + 1)
    assert "on 'elsewhere'" in refused(tmp_path)
    write_holder(tmp_path, pid=2**22 + 1)  # control: larger than any pid of this one
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"{", b"5", b"\xff", b'{"pid": 1}', b'{"pid": "1", "host": "", "start": ""}', b"[" * 4096]
)
def test_what_a_crash_left_is_no_holder(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    with locked(tmp_path):
        pass


def test_terminal_escapes_of_a_foreign_host_are_not_printed(tmp_path: Path) -> None:
    write_holder(tmp_path, host="\x1b[2J")
    assert refused(tmp_path).isprintable()


def test_the_lock_of_another_is_not_released(tmp_path: Path) -> None:
    with locked(tmp_path):
        write_holder(tmp_path, host="elsewhere")
    assert "elsewhere" in refused(tmp_path)


def test_of_many_one_gets_it(tmp_path: Path) -> None:
    # All find the same stale holder at once.
    write_holder(tmp_path, start="stale")
    barrier, end, results = threading.Barrier(8), threading.Event(), list[bool]()

    def contend() -> None:
        barrier.wait()
        try:
            with locked(tmp_path):
                results.append(True)
                end.wait()
        except ValueError:
            results.append(False)
            if len(results) == 8:
                end.set()

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    end.wait(timeout=5)
    end.set()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 7 + [True]


def test_file_systems_without_kernel_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> Any:
        def flock(file: int, kind: int) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(lock.fcntl, "flock", fail(lock._NO_KERNEL_LOCKS[0]))
    with locked(tmp_path):
        refused(tmp_path)
    monkeypatch.setattr(lock.fcntl, "flock", fail(5))
    with pytest.raises(OSError, match="output error"), locked(tmp_path):
        pass


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lock"), locked(tmp_path / "missing"):
        pass
