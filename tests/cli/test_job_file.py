"""Job files: what a job may return, and one line for each that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blockhess.cli.job_file import load, on_device
from blockhess.cli.main import main

JOB = """
import torch

def make():
    data = torch.ones(4, 3), torch.ones(4, 2)
    return {"model": torch.nn.Linear(3, 2), "data": data, "loss_fn": torch.nn.MSELoss(), "num_steps": 4}

def no_data():
    return {"model": torch.nn.Linear(3, 2)}

def unknown_argument():
    return make() | {"num_step": 4}

def keys_of_other_types():
    return make() | {1: 2, None: 3}

def nothing():
    pass

number = 3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("job.py").write_text(JOB)
    Path("needs.py").write_text("import no_such_dependency\n")
    Path("job.toml").write_text("[model]\nname = 'gpt'\n")
    Path("folder.py").mkdir()
    return tmp_path / "job.py"


def test_a_file_and_a_module(file: Path) -> None:
    for place in ("job.py", str(file), "job"):
        arguments = load(f"{place}:make")
        assert arguments.keys() == {"model", "data", "loss_fn", "num_steps"} and arguments["num_steps"] == 4


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("job", "must be FILE.py:FUNCTION or MODULE:FUNCTION, got 'job'"),
        ("job.py", "must be FILE.py:FUNCTION or MODULE:FUNCTION, got 'job.py'"),
        (":make", "must be FILE.py:FUNCTION or MODULE:FUNCTION, got ':make'"),
        ("job.py:", "must be FILE.py:FUNCTION or MODULE:FUNCTION, got 'job.py:'"),
        ("job.toml", "TOML files are not supported, got 'job.toml'; write FILE.py with a function that returns"),
        ("missing.toml", "TOML files are not supported"),
        ("job.toml:make", "TOML files are not supported"),
        ("other.py:make", "no such file: other.py"),
        ("folder.py:make", "no such file: folder.py"),
        ("no_such_module:make", "cannot import 'no_such_module': No module named 'no_such_module'"),
        ("job.inner:make", "cannot import 'job.inner': No module named 'job.inner'; 'job' is not a package"),
        ("needs.py:make", "'needs.py' imports the module 'no_such_dependency', which must be installed"),
        ("needs:make", "'needs' imports the module 'no_such_dependency', which must be installed"),
        ("job.py:other", "'job.py' must define a function 'other', got None"),
        ("job.py:number", "'job.py' must define a function 'number', got 3"),
        ("job.py:nothing", "'job.py:nothing' must return a mapping with 'model' and 'data'"),
        ("job.py:no_data", "'job.py:no_data' must return a mapping with 'model' and 'data'"),
        ("job.py:unknown_argument", "must return arguments of spectrum only, got ['num_step'"),
        ("job.py:keys_of_other_types", "must return arguments of spectrum only, got ['1', 'None'"),
        ("os:getcwd", "'os:getcwd' must return a mapping with 'model' and 'data', got str"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_what_is_no_job(command: str, job: str, message: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, job]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("blockhess: job: ") and captured.err.count("\n") == 1
    assert message in captured.err and not Path("run").exists()


@pytest.mark.parametrize("data", ["batch", "batches", "loader"])
def test_a_job_on_another_device(data: str) -> None:
    pair = torch.randn(4, 3), torch.randn(4, 1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair), batch_size=2)
    given = {"batch": pair, "batches": [pair, pair], "loader": loader}[data]
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.ones(1))
    moved = on_device({"model": torch.nn.Linear(3, 1), "data": given, "loss_fn": loss, "seed": 3}, "meta")
    assert moved["seed"] == 3 and moved["model"].weight.is_meta and moved["loss_fn"].pos_weight.is_meta
    assert len(moved["data"]) == (1 if data == "batch" else 2)
    assert all(tensor.is_meta for batch in moved["data"] for tensor in batch)


def test_no_such_device() -> None:
    with pytest.raises(ValueError, match="--device: device must be one of this machine's, got 'gpu9'"):
        on_device({}, "gpu9")
