"""Configurations: what they build, what they refuse, and that they run no code that the command line did not name."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import blockhess
from blockhess.cli.config import OPTIONS, load_config
from blockhess.cli.main import main
from blockhess.models import GPT, GPTConfig

GPT_RUN = """
[model]
name = "gpt"
seed = 3
num_layers = 1
num_heads = 2
width = 8
context = 4

[data]
name = "shakespeare"
batch_size = 2
context = 4

[spectrum]
num_probes = 1
num_steps = 2
engine = "autograd"
"""
RESNET_RUN = """
[model]
name = "resnet"
width = 4
blocks_per_stage = [1]
[data]
name = "fashion_mnist"
num_images = 4
[spectrum]
tol = 1
dtype = "float64"
blocks = [['^(.*)\\.weight$', '\\1']]
"""
JOB = """
from blockhess.cli.demo import gpt_job
open({marker!r}, "w").close()
make = gpt_job
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    message = str(caught.value)
    assert str(path) in message and message.isprintable() and len(message) < 500
    return message


def test_a_built_in_model_and_data(path: Path) -> None:
    path.write_text(GPT_RUN)
    arguments = load_config(path).arguments()
    torch.manual_seed(3)
    same = GPT(GPTConfig(vocab_size=76, num_layers=1, num_heads=2, width=8, context=4))
    assert all(torch.equal(a, b) for a, b in zip(arguments["model"].parameters(), same.parameters()))
    [(tokens, _)] = arguments["data"]
    assert tokens.shape == (2, 4) and arguments["num_steps"] == 2
    spectra = blockhess.spectrum(**arguments, progress=False)
    assert spectra.quadrature.num_probes == 1 and spectra.provenance["model"] == "GPT"


def test_another_one(path: Path) -> None:
    path.write_text(RESNET_RUN)
    arguments = load_config(path).arguments()
    assert arguments["dtype"] == torch.float64 and arguments["blocks"] == [(r"^(.*)\.weight$", r"\1")]
    assert arguments["model"](arguments["data"][0]).shape == (4, 10)


def test_building_leaves_the_random_state_alone(path: Path) -> None:
    path.write_text(GPT_RUN)
    before = torch.get_rng_state()
    load_config(path).arguments()
    assert torch.equal(torch.get_rng_state(), before)


def test_every_option_is_one_of_spectrum() -> None:
    known = inspect.signature(blockhess.spectrum).parameters.keys() - {"model", "data", "loss_fn", "progress"}
    assert OPTIONS.keys() <= known
    assert known - OPTIONS.keys() == {"run_dir", "parallel"}, "an option that configurations lack"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("num_probes = 1", "num_probes = '1'"), "spectrum: num_probes must be an integer, got '1'"),
        (("num_probes = 1", "num_probes = true"), "spectrum: num_probes must be an integer, got True"),
        (("num_probes = 1", "num_probes = 1.0"), "spectrum: num_probes must be an integer, got 1.0"),
        (("num_probes = 1", "probes = 1"), "spectrum: 'probes' is no key; there are blocks, num_probes"),
        (("num_probes = 1", "blocks = [['a']]"), "blocks must be pairs"),
        (("num_probes = 1", "blocks = [1]"), "blocks must be text or a table, each text or an array, each text or"),
        (("num_probes = 1", "dtype = 'float16'"), "dtype must be float32 or float64, got 'float16'"),
        (("num_probes = 1", "seed = -1"), "spectrum: seed must be in 0 ... 2^63 - 1, got -1"),
        (("num_probes = 1", "tol = nan\nmodel = 1"), "spectrum: 'model' is no key"),
        (("seed = 3", "seed = 9223372036854775808"), "model: seed must be in 0"),
        (('"gpt"', '"bert"'), "model: name must be one of gpt, resnet, got 'bert'"),
        (('"gpt"', "[]"), "model: name must be one of gpt, resnet, got []"),
        (('"gpt"', '"resnet"'), "data: name must be fashion_mnist for model resnet, got shakespeare"),
        (("width = 8", "width = 8\nwidth_ = 8"), "model: 'width_' is no key"),
        (("width = 8", "mlp_width = 'x'"), "model: mlp_width must be an integer, got 'x'"),
        (("width = 8", "bias = 1"), "model: bias must be true or false, got 1"),
        (("batch_size = 2", "split = 'test'"), "data: 'split' is no key; there are name, num_batches"),
        (("[data]", "[other]"), "'other' is no key; there are job, model, data, spectrum"),
        (("[model]", "job = 'a:b'\n[model]"), "either job or both"),
        (("[model]", "model = 3\n[model2]"), "model must be a table, got 3"),
        (("[model]", "[model"), "is no TOML"),
        (("width = 8", "width = 8\nwidth = 8"), "is no TOML"),
        (("width = 8", "'\x1b[2J' = 8"), "is no TOML"),
        (("width = 8", "'\\u001b[2J' = 8"), "is no key"),
        (("width = 8", '"\\u001b[2J" = 8'), "is no key"),
        (("width = 8", "width = " + "[" * 10**5), "is no TOML"),
        (("width = 8", "width = " + "9" * 5000), "is no TOML"),
        (("width = 8", "#" + "x" * 2**20), "at most 1048576 bytes"),
    ],
)
def test_keys_and_values_are_checked(path: Path, change: tuple[str, str], text: str) -> None:
    assert change[0] in GPT_RUN
    assert text in refused(path, GPT_RUN.replace(*change, 1))


def test_what_is_no_configuration(path: Path) -> None:
    assert "either job or both" in refused(path, "")
    assert "either job or both" in refused(path, GPT_RUN[: GPT_RUN.index("[data]")])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no TOML"):
        load_config(path)
    with pytest.raises(ValueError, match=r"cannot read .*No such file"):
        load_config(path.with_name("missing"))
    with pytest.raises(ValueError, match=r"cannot read .*Is a directory"):
        load_config(path.parent)


def test_sizes_that_no_model_has_are_refused_by_it(path: Path) -> None:
    path.write_text(GPT_RUN.replace("width = 8", "width = 7"))
    with pytest.raises(ValueError, match="width must be a multiple of num_heads"):
        load_config(path).arguments()


def test_a_job_runs_only_where_the_command_line_allows_that_very_one(path: Path) -> None:
    marker, code = path.with_name("executed"), path.with_name("job.py")
    code.write_text(JOB.format(marker=str(marker)))
    job = f"{code}:make"
    path.write_text(f"job = '{job}'\n[spectrum]\nnum_probes = 1")
    for allow in ((), ("job:make",), (f"{code}:other",), (job + " ",)):
        with pytest.raises(ValueError, match="job must be allowed on the command line"):
            load_config(path).arguments(allow)
    assert not marker.exists()
    arguments = load_config(path).arguments((job,))  # control
    assert marker.exists() and arguments["num_probes"] == 1 and arguments["num_steps"] > 1


def test_reading_imports_nothing_that_is_named(path: Path) -> None:
    path.write_text("job = 'this:s'")
    assert load_config(path).job == "this:s" and "this" not in sys.modules


def test_the_command(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text(GPT_RUN)
    run, out = tmp_path / "run", tmp_path / "run/spectra.npz"
    assert main(["run", str(path), "--out", str(run)]) == 0
    assert str(out) in capsys.readouterr().out
    assert main(["run", str(path), "--out", str(run)]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main(["run", str(path), "--out", str(run), "--resume"]) == 0
    arguments: dict[str, Any] = load_config(path).arguments()
    assert torch.equal(
        blockhess.load(out).quadrature.nodes, blockhess.spectrum(**arguments, progress=False).quadrature.nodes
    )
    path.write_text("job = 'os:getcwd'")
    other = str(tmp_path / "other")
    assert main(["run", str(path), "--out", other]) == 2
    assert "--allow 'os:getcwd'" in capsys.readouterr().err
    assert main(["run", str(path), "--out", other, "--allow", "os:getcwd"]) == 2
    assert "must return a mapping" in capsys.readouterr().err
