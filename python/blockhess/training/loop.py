"""One training: fixed number of steps, losses of all of them, divergence told apart from a bad loss.

    eta_t = rate  or  rate (1 + cos(pi t / T)) / 2, after a linear warm-up;  gradients clipped on request

A loss that is not finite ends the training, and one that ends above where it began has diverged: no result is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from blockhess.divergence import check_choice
from blockhess.losses import as_loss
from blockhess.training.optimizers import make_optimizer

SCHEDULES = ("constant", "cosine")


def learning_rate(step: int, num_steps: int, schedule: str = "cosine", warmup: int = 0) -> float:
    """Return the factor of the learning rate at a step, counted from 0.

    Args:
        schedule: "constant", or "cosine" from 1 towards 0 over the steps after the warm-up.
        warmup: steps of a linear rise before.

    Example:
        >>> [round(learning_rate(t, 4), 3) for t in range(4)]
        [1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2


@dataclass(frozen=True)
class Training:
    """What a training did.

    Attributes:
        losses: of every step's batch before the step, as long as they were finite.
        initial: mean loss of the last `window` batches at the initial parameters.
        final: mean of the last `window` losses, or None where the training diverged.
        diverged: a loss was not finite, or the final one is above the initial.
        num_steps: that were asked for.
    """

    losses: tuple[float, ...]
    initial: float
    final: float | None
    diverged: bool
    num_steps: int


def train(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[..., Any] | None = None,
    *,
    optimizer: str,
    rate: float,
    num_steps: int,
    schedule: str = "cosine",
    warmup: int = 0,
    clip: float | None = None,
    weight_decay: float = 0.0,
    window: int = 10,
    at_steps: Mapping[int, Callable[[nn.Module], object]] | None = None,
) -> Training:
    """Train a model in place, in train mode.

    Args:
        model: its parameters that require gradients are trained.
        batches: drawn one a step; a list is gone through again and again.
        loss_fn: as of `blockhess.spectrum`.
        optimizer: "SGD", "AdamW" or "Adam", see make_optimizer.
        rate, schedule, warmup: the learning rate, see learning_rate.
        num_steps: how many.
        clip: largest norm of the whole gradient, as language models are trained with; None means any.
        weight_decay: of AdamW.
        window: how many last losses are averaged to the final one; the same batches give the initial one.
        at_steps: step -> what to call with the model after so many steps; 0 is before the first.

    Returns:
        Training. The model is left in train mode, with whatever parameters it reached.

    Raises:
        ValueError: an argument breaks its rule, or the batches end too early.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> train(model, [batch], nn.CrossEntropyLoss(), optimizer="SGD", rate=0.1, num_steps=5).diverged
        False
    """
    check_choice("train", "schedule", schedule, SCHEDULES)
    if num_steps < 1 or not 0 <= warmup < num_steps or window < 1:
        raise ValueError(
            "train: num_steps and window must be at least 1 and warmup in 0 ... num_steps - 1, got "
            f"{num_steps}, {window}, {warmup}"
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"train: clip must be positive, got {clip}")
    loss_of = as_loss(loss_fn)
    parameters = [p for p in model.parameters() if p.requires_grad]
    update = make_optimizer(optimizer, parameters, rate, weight_decay)
    source = _repeated(batches)
    drawn = [next(source) for _ in range(num_steps)]
    hooks = at_steps or {}
    model.train()
    first = [_value(loss_of, model, batch) for batch in drawn[-window:]]
    initial = sum(first) / len(first)
    if 0 in hooks:
        hooks[0](model)

    losses: list[float] = []
    for step, batch in enumerate(drawn):
        loss, _ = loss_of(model, batch)
        value = loss.item()
        if not math.isfinite(value):
            break
        losses.append(value)
        update.zero_grad()
        loss.backward()
        if clip is not None:
            clip_grad_norm_(parameters, clip)
        for group in update.param_groups:
            group["lr"] = rate * learning_rate(step, num_steps, schedule, warmup)
        update.step()
        if step + 1 in hooks:
            hooks[step + 1](model)
    final = sum(losses[-window:]) / len(losses[-window:]) if losses else math.nan
    diverged = len(losses) < num_steps or not final <= initial
    return Training(tuple(losses), initial, None if diverged else final, diverged, num_steps)


@torch.no_grad()
def _value(loss_of: Any, model: nn.Module, batch: Any) -> float:
    """The loss without a trace in the model: BatchNorm's running statistics stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    value = float(loss_of(model, batch)[0])
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return value


def _repeated(batches: Iterable[Any]) -> Iterator[Any]:
    if isinstance(batches, list | tuple):
        if not batches:
            raise ValueError("train: batches must hold one at least, got none")
        while True:
            yield from batches
    yield from batches
    raise ValueError("train: batches must last for num_steps, got fewer")
