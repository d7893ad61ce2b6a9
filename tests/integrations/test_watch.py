"""Watching a training changes no bit of it; callbacks, logs and frames say what the result says."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import blockhess
from blockhess.integrations import pandas, tensorboard
from blockhess.integrations.watch import SpectrumMonitor
from tests.helpers.spectra_cases import make_spectra, random_spectra

LOSS = nn.CrossEntropyLoss()
OPTIONS: dict[str, Any] = {"num_probes": 2, "num_steps": 3}


def noisy_model() -> nn.Module:
    """Its training draws random numbers and keeps statistics."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def examples(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def trained(watch: SpectrumMonitor | None, disturb: bool = False) -> list[Tensor]:
    """Parameters, buffers, gradients, momenta and random state after a training whose batches come shuffled."""
    model = noisy_model()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples(20)), batch_size=5, shuffle=True)
    step = 0
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
            step += 1
            if watch is not None:
                watch(model, step)
            if disturb:
                torch.rand(1)
    gradients = [p.grad for p in model.parameters()]
    momenta = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    return [*model.state_dict().values(), *gradients, *momenta, torch.get_rng_state()]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
def test_watching_changes_no_bit_of_a_training(batchnorm: str, tmp_path: Path) -> None:
    watch = SpectrumMonitor(examples(8, seed=1), LOSS, every=2, folder=tmp_path, batchnorm=batchnorm, **OPTIONS)
    alone = trained(None)
    assert same_bits(alone, trained(watch))
    assert not same_bits(alone, trained(None, disturb=True))  # the comparison would notice
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"step_{i:08d}.npz" for i in (2, 4, 6, 8)]


def test_what_is_watched_is_the_model_at_that_step(tmp_path: Path) -> None:
    batch = examples(8, seed=1)
    watch, model = SpectrumMonitor(batch, LOSS, every=10, folder=tmp_path, **OPTIONS), noisy_model()
    spectra = watch(model, 20)
    assert spectra is not None and spectra.provenance["step"] == 20
    expected = blockhess.spectrum(model, batch, LOSS, **OPTIONS)
    kept = blockhess.load(tmp_path / "step_00000020.npz")
    assert torch.equal(spectra.quadrature.nodes, expected.quadrature.nodes)
    assert torch.equal(kept.quadrature.nodes, expected.quadrature.nodes)
    assert watch(model, 20) is None  # seen
    assert watch(model, 25) is None  # not due
    assert watch(model, 30) is not None


def test_a_shuffling_loader_is_drawn_once() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples(8)), batch_size=4, shuffle=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    watch = SpectrumMonitor(loader, LOSS, every=1, folder=None, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    model = noisy_model()
    seen = [watch(model, step) for step in range(2)]
    assert seen[0].provenance["fingerprints"]["data"] == seen[1].provenance["fingerprints"]["data"]


def test_a_training_outlives_what_is_not_finite() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return LOSS(model(batch[0]), batch[1]) + model.bias.abs().pow(1.5).sum()  # infinite curvature at 0

    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.bias.zero_()
    with pytest.raises(blockhess.NonFiniteError):
        blockhess.spectrum(model, examples(8), loss_fn, **OPTIONS)
    spectra = SpectrumMonitor(examples(8), loss_fn, every=1, folder=None, **OPTIONS)(model, 0)
    assert spectra is not None and spectra.quadrature.nonfinite.any(0).tolist() == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "SpectrumMonitor: every must be at least 1, got 0"),
        ({"every": 1, "folder": "{file}/x"}, "output folder: cannot make"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = {k: v.format(file=tmp_path / "file") if isinstance(v, str) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        SpectrumMonitor(examples(8), LOSS, **{"folder": None} | given)


class Writer:
    """What log_spectra may use of a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.figures: list[str] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert math.isfinite(value)
        self.scalars[tag] = (value, step)

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        assert figure.axes
        self.figures.append(tag)


def test_log_has_js0_and_every_block() -> None:
    spectra, writer = random_spectra(), Writer()
    tensorboard.log_spectra(writer, spectra, 5)
    assert writer.scalars["blockhess/js0"] == (float(spectra.js0()), 5)
    for name in spectra:
        assert writer.scalars[f"blockhess/lambda_max/{name}"] == (spectra[name].lambda_max, 5)
        assert writer.scalars[f"blockhess/trace/{name}"][0] == pytest.approx(spectra[name].trace)
    assert len(writer.scalars) == 1 + 4 * len(spectra) and not writer.figures


def test_log_of_one_block_and_of_nothing_known() -> None:
    unknown = make_spectra([[[0.0]]], [[[0.0]]], steps=[[0]], nonfinite=[[True]])
    writer = Writer()
    tensorboard.log_spectra(writer, unknown, 0)
    assert writer.scalars == {}


def test_figures_are_logged() -> None:
    pytest.importorskip("matplotlib")
    writer = Writer()
    tensorboard.log_spectra(writer, random_spectra(), 0, figures=True, prefix="H")
    assert writer.figures == ["H/spectra", "H/heatmap"]


def test_a_watch_logs(tmp_path: Path) -> None:
    writer = Writer()
    SpectrumMonitor(examples(8), LOSS, every=1, folder=None, writer=writer, **OPTIONS)(noisy_model(), 3)
    assert writer.scalars["blockhess/js0"][1] == 3


def test_frames() -> None:
    pytest.importorskip("pandas")
    spectra = random_spectra()
    blocks = pandas.block_dataframe(spectra)
    assert list(blocks.index) == list(spectra.names) and list(blocks["dim"]) == list(spectra.dims)
    assert blocks.loc["block2", "lambda_max"] == spectra["block2"].lambda_max
    assert np.array_equal(blocks["trace_error"], spectra.trace()[1])
    pairs = pandas.pair_dataframe(spectra, axis="asinh", kind="divergence")
    assert list(pairs.columns) == ["block_a", "block_b", "divergence"] and len(pairs) == 6
    row = pairs[(pairs.block_a == "block1") & (pairs.block_b == "block3")]
    assert row["divergence"].item() == float(spectra.js_matrix("divergence", axis="asinh")[1, 3])


@pytest.mark.parametrize(
    ("missing", "needs", "advice"),
    [
        ("pandas", "pandas", r'pip install "blockhess\[frames\]"'),
        ("transformers", "transformers", "pip install transformers"),
        ("lightning", "lightning", "pip install lightning"),
    ],
)
def test_a_missing_package_says_what_to_type(
    missing: str, needs: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, f"blockhess.integrations.{needs}", raising=False)
    with pytest.raises(ImportError, match=advice):
        module = __import__(f"blockhess.integrations.{needs}", fromlist=["x"])
        module.block_dataframe(random_spectra())


def trainer_states(watch: SpectrumMonitor | None, folder: Path) -> tuple[list[Tensor], list[float]]:
    """Parameters and random state after a training by Transformers' Trainer, and the losses on the way."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from blockhess.integrations.transformers import SpectrumCallback

    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=6, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    tokens = torch.randint(11, (12, 6))
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=4, report_to=[], logging_steps=1, use_cpu=True, seed=3,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    callbacks = [] if watch is None else [SpectrumCallback(watch)]
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=callbacks)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*model.state_dict().values(), torch.get_rng_state()], losses


def test_transformers_trainer_is_undisturbed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    tokens = torch.arange(12).reshape(2, 6) % 11
    batch = {"input_ids": tokens, "labels": tokens}
    watch = SpectrumMonitor(batch, every=2, folder=tmp_path / "spectra", num_probes=1, num_steps=2)
    states, losses = trainer_states(None, tmp_path / "a")
    watched, watched_losses = trainer_states(watch, tmp_path / "b")
    assert same_bits(states, watched) and losses == watched_losses and len(losses) == 4
    files = sorted((tmp_path / "spectra").iterdir())
    assert [blockhess.load(f).provenance["step"] for f in files] == [0, 2, 4]


def test_lightning_trainer_is_undisturbed(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from blockhess.integrations.lightning import SpectrumCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = noisy_model()

        def loss(self, batch: Any) -> Tensor:
            return LOSS(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.loss(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.05)

    def states(watch: SpectrumMonitor | None) -> list[Tensor]:
        module = Module()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples(20)), batch_size=5, shuffle=True)
        trainer = pl.Trainer(
            max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accumulate_grad_batches=2, max_epochs=-1, default_root_dir=tmp_path,
            callbacks=[] if watch is None else [SpectrumCallback(watch)],
        )  # fmt: skip
        torch.manual_seed(0)
        trainer.fit(module, loader)
        return [*module.state_dict().values(), torch.get_rng_state()]

    watch = SpectrumMonitor(
        examples(8, seed=1), lambda m, b: m.loss(b), every=2, folder=tmp_path / "spectra", **OPTIONS
    )
    assert same_bits(states(None), states(watch))
    files = sorted((tmp_path / "spectra").iterdir())
    assert [blockhess.load(f).provenance["step"] for f in files] == [0, 2, 4]
    assert "net.0.weight" in blockhess.load(files[0])
