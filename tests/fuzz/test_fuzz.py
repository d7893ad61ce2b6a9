"""The fuzzing of `python -m tests.fuzz`, bounded; and that it would see a reader that breaks its promises."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from blockhess.results import files
from blockhess.run.storage import store, tensor_file
from tests.fuzz.__main__ import TARGETS, fuzz, main
from tests.fuzz.result_files import ResultFiles
from tests.fuzz.state_crashes import StateCrashes
from tests.fuzz.state_files import StateFiles


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("inputs", [80, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_or_sound(name: str, inputs: int, tmp_path: Path) -> None:
    count = inputs // 4 if name == "crashes" else inputs  # every one syncs some ten times
    result = fuzz(TARGETS[name](tmp_path), 1, range(count))
    assert result["findings"] == 0, json.dumps(result["found"], indent=1)
    # Control: the damage is neither always noticed nor without effect.
    assert result["accepted"] > count / 40 and result["refused"] > count / 4


def test_an_input_is_a_function_of_seed_and_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = ResultFiles(tmp_path)
    files = []
    for index, now in ((5, 1e9), (6, 1e9), (5, 2e9)):
        monkeypatch.setattr(time, "localtime", lambda _, now=now: time.gmtime(now))  # which is not of the clock
        target.run(1, index)
        files.append(target.path.read_bytes())
    assert files[0] == files[2] != files[1]


def finds(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any, target: Any, *texts: str) -> bool:
    """Whether it finds one of these texts among 400 inputs."""
    monkeypatch.setattr(module, name, value)
    rounds = (" ".join(fuzz(target, 1, range(first, first + 20))["found"]) for first in range(0, 400, 20))
    return any(text in found for found in rounds for text in texts)


def test_it_sees_a_result_that_is_not_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = ResultFiles(tmp_path)
    assert finds(monkeypatch, files, "_require", lambda rule, text: None, target, "not finite", "sum to 1")


def test_it_sees_a_checksum_that_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = StateFiles(tmp_path)
    monkeypatch.setattr(tensor_file, "checksum", lambda parts: b"0" * tensor_file.DIGITS)
    store.write(target.path, target.tensors, {})
    target.data = target.path.read_bytes()
    assert finds(monkeypatch, tensor_file, "MAX_DIMS", 16, target, "damaged bytes were taken for a state")


def test_it_sees_a_write_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(path: Any, parts: Any) -> None:
        with store._opened(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            for part in parts:
                store._write_all(file, memoryview(part))

    assert finds(monkeypatch, store, "_write", careless, StateCrashes(tmp_path), "ValueError: read: ")


def test_it_sees_an_error_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = ResultFiles(tmp_path)
    assert finds(monkeypatch, files, "_DAMAGE", (), target, "OSError")


def test_it_sees_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tests.fuzz.__main__.LIMIT_SECONDS", 1)
    monkeypatch.setattr(StateFiles, "read", lambda self: time.sleep(3))
    monkeypatch.setattr("sys.argv", ["fuzz", "--only", "state", "--inputs", "1", "--out", str(tmp_path / "x.json")])
    assert main() == 1 and "Hang" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["state"]["findings"] == 1
