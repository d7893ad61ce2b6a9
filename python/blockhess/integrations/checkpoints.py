"""Checkpoints: the tensors of a model in one file, never unpickled; and the block spectra of a series of them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockhess._text import printable
from blockhess.estimate import spectrum
from blockhess.spectra import Spectra


def save_checkpoint(model: nn.Module, path: str | PathLike[str]) -> Path:
    """Write the model's parameters and buffers to a file, which is replaced atomically.

    Example:
        >>> save_checkpoint(torch.nn.Linear(2, 2), "step-100.pt")
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    torch.save(model.state_dict(), temporary)
    os.replace(temporary, path)
    return path


def load_checkpoint(model: nn.Module, path: str | PathLike[str]) -> None:
    """Load a state_dict into a model, from a file of torch.save or, named *.safetensors, of safetensors.

    Raises:
        ValueError: the file does not hold a state_dict of this model.
        ImportError: safetensors is missing.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except ImportError:
        raise ImportError("checkpoint: *.safetensors needs safetensors; type: pip install safetensors") from None
    except (OSError, EOFError, RuntimeError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"checkpoint: {printable(path)} must hold the tensors of {type(model).__name__}: {line}"
        ) from None


def spectra_of_checkpoints(
    model: nn.Module,
    checkpoints: Sequence[str | PathLike[str]],
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    **options: Any,
) -> Iterator[tuple[Path, Spectra]]:
    """Estimate the spectra of existing checkpoints; nothing is trained.

    Args:
        model: of the checkpoints' architecture; its own state is restored at the end of the iteration.
        checkpoints: files, see load_checkpoint.
        data, loss_fn, options: as for `spectrum`. All checkpoints use the same probes, so two spectra differ only by
            the change of the model.

    Yields:
        (checkpoint, spectra), in order.

    Raises:
        ValueError: see load_checkpoint and `spectrum`.

    Example:
        >>> for path, spectra in spectra_of_checkpoints(model, ["0.pt", "1000.pt"], batch, nn.CrossEntropyLoss()):
        ...     print(path, spectra.js0())
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        for path in map(Path, checkpoints):
            load_checkpoint(model, path)
            yield path, spectrum(model, data, loss_fn, **options)
    finally:
        model.load_state_dict(before)
