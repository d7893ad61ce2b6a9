"""A run directory has one holder; the lock of a process that has ended is free."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from blockhess.run.storage import lock
from blockhess.run.storage.lock import holder, locked

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


def refused(directory: Path) -> str:
    with pytest.raises(ValueError, match="must not be in use") as caught, locked(directory):
        pass
    return str(caught.value)


def test_a_second_process_is_told_of_the_first(tmp_path: Path) -> None:
    process = hold(tmp_path)
    name = f"process {process.pid} on {socket.gethostname()!r}"
    text = refused(tmp_path)
    assert name in text and str(tmp_path / "lock") in text and holder(tmp_path) == name
    process.communicate("")
    assert holder(tmp_path) is None
    with locked(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
    assert (tmp_path / "lock").read_text() == ""


def test_a_killed_holder_is_stale(tmp_path: Path) -> None:
    process = hold(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "lock").read_text() != "" and holder(tmp_path) is None
    with locked(tmp_path):
        pass


def test_nobody_holds_it_twice(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert f"process {os.getpid()}" in refused(tmp_path)
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError  # released on errors too
    with locked(tmp_path):
        pass


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_does_not_keep_it(tmp_path: Path) -> None:
    with locked(tmp_path):
        reading, writing = os.pipe()
        if not (child := os.fork()):
            os.read(reading, 1)
            os._exit(0)
    with locked(tmp_path):
        pass
    os.write(writing, b"x")
    os.waitpid(child, 0)


def test_reading_the_holder_does_not_disturb(tmp_path: Path) -> None:
    end = threading.Event()

    def read() -> None:
        while not end.wait(0.001):
            holder(tmp_path)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(100):
            with locked(tmp_path):
                pass
    finally:
        end.set()
        thread.join()


@pytest.mark.parametrize("content", [b"", b"{", b"5", b"\xff", b'{"pid": 1}', b"[" * 4096])
def test_what_a_crash_left_is_no_holder(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lock").write_bytes(content)
    with locked(tmp_path):
        pass


def test_terminal_escapes_in_the_file_are_not_printed(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / "lock").write_text("process 1 on \x1b[2J")
        assert refused(tmp_path).isprintable()


def test_of_many_one_gets_it(tmp_path: Path) -> None:
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
    with pytest.warns(UserWarning, match="use it in one process only"), locked(tmp_path):
        pass
    monkeypatch.setattr(lock.fcntl, "flock", fail(5))
    with pytest.raises(OSError, match="output error"), locked(tmp_path):
        pass


def test_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="lock"), locked(tmp_path / "missing"):
        pass


def test_a_copy_of_a_directory_in_use_is_not_in_use(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert holder(tmp_path / "run") and holder(tmp_path / "copy") is None
        with locked(tmp_path / "copy"):
            pass


def test_a_pipe_in_place_of_the_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    code = "import sys; from blockhess.run.storage.lock import holder; print(holder(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.stdout == "None\n", done.stderr
