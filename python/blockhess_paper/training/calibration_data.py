"""What the calibration measures of one architecture: spectra at initialisation, and both optimizers at their best rate.

Everything is kept in FOLDER, one file a training and one a spectrum, so that an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockhess.problem.model_state import has_batchnorm
from blockhess.results.files import writable_folder
from blockhess.spectra import Spectra
from blockhess_paper.networks.initial_spectra import POLICIES, Effort, measure_once
from blockhess_paper.networks.networks import Network
from blockhess_paper.training.architectures import ARCHITECTURES
from blockhess_paper.training.training_runs import Best, Settings, best

EFFORT = Effort(3, 40)
QUICK_EFFORT = Effort(1, 4, 4)

# Samples whose mean loss has the measured Hessian: images, windows or pairs.
IMAGES, WINDOWS = 64, 16


@dataclass(frozen=True)
class Measured:
    """An architecture of the calibration.

    Attributes:
        name: of ARCHITECTURES.
        spectra: BatchNorm policy -> spectra at the initialisation of the first seed; without BatchNorm both are one.
        sgd, adamw: both optimizers at their best rate.
    """

    name: str
    spectra: dict[str, Spectra]
    sgd: Best
    adamw: Best


def initial_spectra(folder: Path, name: str, seed: int, effort: Effort) -> dict[str, Spectra]:
    """Return spectra of every parameter tensor by BatchNorm policy, measured or as they are kept."""
    architecture = ARCHITECTURES[name]
    model = architecture.model(seed)
    images = architecture.draw.endswith("images")
    usual = IMAGES if images else WINDOWS
    batch = architecture.batches(1, seed, batch_size=usual if effort.size is None else effort.size)
    source = "Fashion-MNIST" if images else "Shakespeare"
    network = Network(name, model, batch, architecture.loss_fn, source)
    kept = writable_folder(folder / "spectra")
    if not has_batchnorm(model):
        return dict.fromkeys(POLICIES, measure_once(kept / f"{name}-none.npz", network, "none", effort, seed))
    return {policy: measure_once(kept / f"{name}-{policy}.npz", network, policy, effort, seed) for policy in POLICIES}


def measure(folder: Path, names: Sequence[str], settings: Settings, effort: Effort) -> Iterator[Measured]:
    """Yield the architectures one after the other, each as soon as it is measured."""
    for name in names:
        spectra = initial_spectra(folder, name, settings.seeds[0], effort)
        sgd, adamw = (best(folder, name, optimizer, settings) for optimizer in ("SGD", "AdamW"))
        yield Measured(name, spectra, sgd, adamw)
