"""Runs of a second or less that pass through every kind of work, and the bits of their results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockhess
from blockhess.run.storage import checkpoint
from tests.helpers.tiny_models import labeled, mlp

# One probe at a time fits 1,200 bytes of a budget, all blocks of it together.
SCENARIOS: dict[str, dict[str, Any]] = {
    "several passes": {"engine": "autograd", "num_probes": 4, "num_steps": 8, "memory_budget": 1200},
    "tolerance": {"engine": "autograd", "num_probes": 12, "num_steps": 9, "tol": 0.1},
    "traced, full basis": {"engine": "traced", "num_probes": 2, "num_steps": 9, "reorthogonalize": "full"},
    "written out and estimated": {"engine": "auto", "num_probes": 2, "num_steps": 5},
    "all written out": {"engine": "exact", "num_probes": 2, "num_steps": 5},
    "Gauss-Newton, partial, float64, vectors kept": {
        "engine": "ggn", "num_probes": 3, "num_steps": 8, "reorthogonalize": "partial", "dtype": torch.float64,
        "keep_vectors": True, "distribution": "rademacher",
    },
}  # fmt: skip


def run(name: str, directory: Path | None) -> blockhess.Spectra:
    """One run; in a directory its state is saved after every step."""
    torch.manual_seed(0)
    model, data = mlp(), [labeled(5), labeled(4)]
    checkpoint.SHARE, checkpoint.LEAST_SECONDS = float("inf"), 0.0
    return blockhess.spectrum(
        model, data, nn.CrossEntropyLoss(), run_dir=directory, progress=False, **SCENARIOS[name]
    )  # fmt: skip


def same_bits(a: blockhess.Spectra, b: blockhess.Spectra) -> bool:
    """Whether two results are the same, but for the seconds that they took."""
    tensors = ("nodes", "weights", "alpha", "beta", "steps", "nonfinite")
    equal = all(torch.equal(getattr(a.quadrature, name), getattr(b.quadrature, name)) for name in tensors)
    return equal and a.blocks == b.blocks and _timeless(a.provenance) == _timeless(b.provenance)


def _timeless(provenance: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in provenance.items() if name not in ("seconds", "same_bits_on_resume")}
    return kept | {"plan": {name: value for name, value in kept["plan"].items() if name != "seconds"}}
