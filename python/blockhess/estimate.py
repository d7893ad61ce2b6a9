"""From a model to its block spectra: `blockhess.spectrum`.

For every block l of the parameters, stochastic Lanczos quadrature of H_l = d2 Loss / d w_l^2 (the paper's Algorithm 5).

Promises: the model is left as it was; a block's probes do not depend on which other blocks are asked for, nor does its
result, except that reorthogonalize="auto" shares one budget among the blocks. One seed gives the same bits as far as
torch's own kernels do: some backward passes (LayerNorm's) depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import operator
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import blockhess
import blockhess_ext
from blockhess.batches import as_batches
from blockhess.blocks import BlockSpec, partition, unwrap
from blockhess.hvp import BlockHessian
from blockhess.losses import as_loss
from blockhess.model_state import fixed_state, has_batchnorm
from blockhess.progress import progress_bar
from blockhess.spectra import Spectra


class NonFiniteError(ValueError):
    """Hessian-vector products of some blocks were NaN or infinite; `partial` holds the Spectra of what was computed."""

    def __init__(self, message: str, partial: Spectra) -> None:
        super().__init__(message)
        self.partial = partial


def spectrum(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    blocks: BlockSpec = "parameter",
    num_probes: int = 10,
    num_steps: int = 100,
    seed: int | None = 0,
    distribution: str = "gaussian",
    reorthogonalize: str = "auto",
    batchnorm: str = "eval",
    on_nonfinite: str = "raise",
    progress: bool | str = "auto",
) -> Spectra:
    """Estimate the eigenvalue density of the Hessian of every parameter block.

    The Hessian is that of the loss averaged over all data, at the model's present parameters, in eval mode.

    Args:
        model: any module with float32 or float64 parameters.
        data: one batch (a tuple, mapping or tensor) or a list, DataLoader or other collection of batches, on the
            model's device. They are drawn once and kept. One batch is fastest; several need memory for one at a time.
        loss_fn: None: `model(**batch).loss` (Transformers). An nn.Module such as nn.CrossEntropyLoss() or a function of
            torch.nn.functional: `loss_fn(model(inputs), targets)`. Any other callable: `loss_fn(model, batch)`,
            which returns the mean loss, or (mean loss, weight of the batch); see `losses.as_loss`.
        blocks: "parameter" (one block per parameter tensor), "full", a dict from block name to parameter names and
            `Part`s, or a list of (regex, group) pairs; see `blocks.partition`.
        num_probes: random vectors per block.
        num_steps: Lanczos steps per vector; a block makes no more than it has entries.
        seed: of the random vectors, which also depend on the blocks' names; None takes a fresh one and records it.
        distribution: of the random vectors, "gaussian" or "rademacher".
        reorthogonalize: "none", "full" or "auto"; see `blockhess_ext.batched_slq`.
        batchnorm: statistics that BatchNorm uses: "eval", the running ones, or "batch", those of each batch.
        on_nonfinite: "raise" or "report": what to do where Hessian-vector products are not finite.
        progress: True, False, or "auto": a bar on stderr where tqdm is installed and it takes more than a few seconds.

    Returns:
        Spectra of the blocks, in the order of the model's parameters or of `blocks`.

    Raises:
        ValueError, TypeError: an argument is not as described.
        NonFiniteError: see `on_nonfinite`; `.partial` holds what was computed.
        NotImplementedError: an operation of the model has no second derivative.

    Source: the paper's Algorithms 4 and 5.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> spectra = spectrum(model, batch, torch.nn.CrossEntropyLoss(), num_probes=2)
        >>> list(spectra)
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"spectrum: model must be a torch.nn.Module, got {type(model).__name__}")
    num_probes = _count("num_probes", num_probes)
    num_steps = _count("num_steps", num_steps)
    for name, value, choices in (
        ("distribution", distribution, blockhess_ext.ops.DISTRIBUTIONS),
        ("reorthogonalize", reorthogonalize, ("none", "full", "auto")),
        ("on_nonfinite", on_nonfinite, ("raise", "report")),
    ):
        if value not in choices:
            raise ValueError(f"spectrum: {name} must be one of {', '.join(choices)}, got {value!r}")

    start = time.perf_counter()
    model = unwrap(model)
    cut = partition(model, blocks)
    loss = as_loss(loss_fn)
    with fixed_state(model, batchnorm):
        batches = as_batches(data, pairs=loss.pairs)  # in here, since a DataLoader draws random numbers
        hessian = BlockHessian(model, loss, batches, cut.blocks)
        with progress_bar(hessian.most_hvps(num_probes, num_steps), "HVP", progress) as hessian.on_hvp:
            quadrature = blockhess_ext.batched_slq(
                hessian,
                hessian.dims,
                num_probes=num_probes,
                num_steps=num_steps,
                block_ids=[_block_id(info.name) for info in hessian.infos],
                distribution=distribution,
                reorthogonalize=reorthogonalize,
                seed=seed,
                dtype=hessian.dtype,
                device=hessian.device,
                on_nonfinite="report",
            )
    spectra = Spectra(
        hessian.infos,
        quadrature,
        {
            "model": type(model).__name__,
            "loss": loss.name,
            "loss_value": hessian.loss_value,
            "weight": hessian.weight,
            "batchnorm": batchnorm if has_batchnorm(model) else "none",
            "dtype": quadrature.dtype,
            "seed": quadrature.seed,
            "num_probes": num_probes,
            "num_steps": num_steps,
            "distribution": distribution,
            "reorthogonalize": reorthogonalize,
            "frozen": list(cut.frozen),
            "tied": {name: list(aliases) for name, aliases in cut.tied.items()},
            "unused": list(hessian.unused),
            "hvps": hessian.hvps,
            "seconds": time.perf_counter() - start,
            "torch": str(torch.__version__),
            "blockhess": blockhess.__version__,
        },
    )
    if on_nonfinite == "raise" and quadrature.nonfinite.any():
        failed = [info.name for info, bad in zip(hessian.infos, quadrature.nonfinite.any(0)) if bad]
        names = ", ".join(failed[:5]) + (", ..." if len(failed) > 5 else "")
        raise NonFiniteError(
            f"spectrum: Hessian-vector products must be finite, got NaN or inf in {len(failed)} of "
            f"{len(hessian.infos)} blocks: {names}; the error's .partial holds the others",
            spectra,
        )
    return spectra


def _count(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"spectrum: {name} must be an integer, got {value!r}") from None
    if number < 1:
        raise ValueError(f"spectrum: {name} must be at least 1, got {value}")
    return number


def _block_id(name: str) -> int:
    """What keys a block's probes: its name, so that they are the same in any partition."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
