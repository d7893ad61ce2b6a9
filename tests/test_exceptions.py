"""Exceptions with attributes reach the parent of a process pool."""

from __future__ import annotations

import multiprocessing
import pickle

import pytest
import torch
from torch import nn

import blockhess
import blockhess_ext
from blockhess.run.storage.signals import Interrupted


def slq_error() -> blockhess_ext.NonFiniteError:
    with pytest.raises(blockhess_ext.NonFiniteError) as caught:
        blockhess_ext.batched_slq(lambda v: v.clone().fill_(float("inf")), [2], num_probes=1, num_steps=1)
    return caught.value


class Kinked(nn.Linear):
    """Has infinite second derivatives at its weights, 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.weight.abs().pow(1.5).sum()


def spectrum_error() -> blockhess.NonFiniteError:
    model = Kinked(2, 2)
    nn.init.zeros_(model.weight)
    with pytest.raises(blockhess.NonFiniteError) as caught:
        blockhess.spectrum(model, (torch.ones(2, 2), torch.zeros(2, 2)), nn.MSELoss(), num_probes=1, num_steps=1)
    return caught.value


def raise_error(kind: str) -> None:
    raise {"slq": slq_error, "spectrum": spectrum_error, "interrupted": lambda: Interrupted(15)}[kind]()


class Mute(ValueError):
    """As such an exception was: the arguments of __init__ are not those of __reduce__."""

    def __init__(self, message: str, partial: object) -> None:
        super().__init__(message)


def test_exceptions_reach_the_parent_of_spawned_processes() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with pytest.raises(blockhess_ext.NonFiniteError, match="block 0 at step 1") as slq:
            pool.apply_async(raise_error, ["slq"]).get(timeout=120)
        with pytest.raises(blockhess.NonFiniteError, match="weight") as whole:
            pool.apply_async(raise_error, ["spectrum"]).get(timeout=120)
    assert slq.value.partial.nonfinite.all()
    assert isinstance(whole.value.partial, blockhess.Spectra)


def test_exceptions_survive_pickling() -> None:
    again = pickle.loads(pickle.dumps(Interrupted(15)))
    assert (type(again), again.signal, str(again)) == (Interrupted, 15, "interrupted by SIGTERM")
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(Mute("text", None)))
