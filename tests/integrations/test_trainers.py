"""Callbacks of Transformers and Lightning change no bit of a training; what a missing package is reported with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import blockhess
from blockhess.integrations.watch import SpectrumMonitor
from tests.helpers.spectra_cases import random_spectra
from tests.integrations.test_watch import LOSS, OPTIONS, examples, noisy_model, same_bits


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
