"""Training for a fixed number of steps, with the loss of every step and detection of divergence.

    eta_t = rate  or  rate (1 + cos(pi t / T)) / 2  or  rate / 10^floor(3 t / T), after a linear warm-up
    g_t = sum_i weight_i g_i / sum_i weight_i    over the parts of a batch too large for one graph;  clipped

A training ends at the first loss that is not finite. It has diverged then, and also if a parameter is not finite after
the last step or if the final loss is above the initial one. No result is NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from blockhess.problem.batches import batch_size, split_batch
from blockhess.problem.losses import Loss, checked_weight, make_loss
from blockhess.run.storage.signals import Catcher, caught
from blockhess_ext.arguments import choice
from blockhess_paper.training.optimizers import BETA2, make_optimizer
from blockhess_paper.training.saved_state import SavedState

SCHEDULES = ("constant", "cosine", "thirds")


def learning_rate(step: int, num_steps: int, schedule: str = "cosine", warmup: int = 0) -> float:
    """Return the factor of the learning rate at a step, counted from 0.

    Args:
        schedule: "constant"; "cosine", from 1 towards 0 after the warm-up; or "thirds", divided by 10 after every
            third of the steps.
        warmup: steps of linear warm-up.

    Example:
        >>> [round(learning_rate(t, 4), 3) for t in range(4)]
        [1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "thirds":
        return 0.1 ** (3 * step // num_steps)
    return (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2


@dataclass(frozen=True)
class Training:
    """The losses of a training.

    Attributes:
        losses: loss of every step's batch before the step, up to the first that is not finite.
        initial: mean loss of the last `window` batches at the initial parameters.
        final: mean of the last `window` losses, None if the training diverged.
        diverged: a loss, or a parameter after the last step, was not finite, or the final loss is above the initial.
        num_steps: number of steps that were requested.
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
    beta2: float = BETA2,
    at_once: int | None = None,
    window: int = 10,
    at_steps: Mapping[int, Callable[[nn.Module], object]] | None = None,
    state: SavedState | None = None,
) -> Training:
    """Train a model in place, in train mode.

    Args:
        model: its parameters that require gradients are trained.
        batches: one per step; a sequence is repeated as often as needed, and indexed only when a batch is used.
        loss_fn: as in `blockhess.spectrum`.
        optimizer: "SGD", "AdamW" or "Adam", see make_optimizer.
        rate, schedule, warmup: the learning rate, see learning_rate.
        num_steps: number of steps.
        clip: largest norm of the gradient; None means no clipping.
        weight_decay, beta2: of AdamW; see make_optimizer.
        at_once: samples per autograd graph; the gradient of a larger batch is accumulated over parts, and BatchNorm
            uses the statistics of each part. None means the whole batch.
        window: number of last losses that are averaged; the initial loss is the mean over the same batches.
        at_steps: step -> function called with the model after this many steps; 0 is before the first step.
        state: file in which an unfinished training is saved and from which it resumes; functions of `at_steps` are not
            called again. SIGTERM, SIGINT and SIGHUP save the state, then raise `signals.Interrupted`.

    Returns:
        Training. The model is left in train mode at the last parameters.

    Raises:
        ValueError: an argument is invalid, or there are too few batches.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> batch = torch.randn(16, 4), torch.randint(3, (16,))
        >>> train(model, [batch], nn.CrossEntropyLoss(), optimizer="SGD", rate=0.1, num_steps=5).diverged
        False
    """
    choice("schedule", schedule, SCHEDULES, op="train")
    if num_steps < 1 or not 0 <= warmup < num_steps or window < 1:
        raise ValueError(
            "train: num_steps and window must be at least 1 and warmup in 0 ... num_steps - 1, got "
            f"{num_steps}, {window}, {warmup}"
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"train: clip must be positive, got {clip}")
    if at_once is not None and at_once < 1:
        raise ValueError(f"train: at_once must be at least 1, got {at_once}")
    loss_of = make_loss(loss_fn)
    parameters = [p for p in model.parameters() if p.requires_grad]
    update = make_optimizer(optimizer, parameters, rate, weight_decay, beta2)
    drawn = _indexed(batches, num_steps)
    hooks = at_steps or {}
    model.train()
    begun = None if state is None else state.load(model, update)
    if begun is None:
        first = [_value(loss_of, model, drawn[step % len(drawn)], at_once) for step in range(num_steps)[-window:]]
        begun = [], sum(first) / len(first)
        if 0 in hooks:
            hooks[0](model)
    losses, initial = begun

    with ExitStack() as stack:
        catcher: Catcher | None = None
        if state is not None:
            catcher = stack.enter_context(caught())
            stack.enter_context(catcher.working())
        for step in range(len(losses), num_steps):
            update.zero_grad()
            value = _loss(loss_of, model, drawn[step % len(drawn)], at_once, backward=True)
            if not math.isfinite(value):
                break
            losses.append(value)
            if clip is not None:
                clip_grad_norm_(parameters, clip)
            for group in update.param_groups:
                group["lr"] = rate * learning_rate(step, num_steps, schedule, warmup)
            update.step()
            if step + 1 in hooks:
                hooks[step + 1](model)
            if state is not None and catcher is not None:
                if catcher.pending is not None:
                    state.save(model, update, losses, initial)
                    catcher.check()
                state.after_step(model, update, losses, initial)
    final = sum(losses[-window:]) / len(losses[-window:]) if losses else math.nan
    # Losses are taken before each step, so the effect of the last step shows only in the parameters.
    finite = len(losses) == num_steps and all(bool(p.isfinite().all()) for p in parameters)
    diverged = not (finite and final <= initial)
    return Training(tuple(losses), initial, None if diverged else final, diverged, num_steps)


def _loss(loss_of: Loss, model: nn.Module, batch: Any, at_once: int | None, *, backward: bool) -> float:
    """Return the loss of a batch; with backward, accumulate its gradient in the parameters."""
    size = batch_size(batch)
    parts = [batch] if at_once is None or size is None else split_batch(batch, -(-size // at_once))
    if len(parts) == 1:
        loss, _ = loss_of(model, batch)
        if backward:
            loss.backward()
        return float(loss.item())
    total = value = 0.0
    for index, part in enumerate(parts):
        loss, weight = loss_of(model, part)
        weight = batch_size(loss_of.averaged_over(part)) if weight is None else weight
        share = checked_weight(weight, index, len(parts)) if loss_of.averaged else 1.0
        if backward:
            (share * loss).backward()
        total, value = total + share, value + share * loss.item()
    if not loss_of.averaged:
        return value
    for parameter in model.parameters() if backward else ():
        if parameter.grad is not None:
            parameter.grad /= total
    return value / total


@torch.no_grad()
def _value(loss_of: Loss, model: nn.Module, batch: Any, at_once: int | None) -> float:
    """Return the loss of a batch without changing the model: BatchNorm's running statistics are restored."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    value = _loss(loss_of, model, batch, at_once, backward=False)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return value


def _indexed(batches: Iterable[Any], num_steps: int) -> Sequence[Any]:
    """Return the batches as a sequence; of an iterable, the first num_steps."""
    if isinstance(batches, Sequence):
        if not batches:
            raise ValueError("train: batches must hold one at least, got none")
        return batches
    drawn = list(itertools.islice(batches, num_steps))
    if len(drawn) < num_steps:
        raise ValueError("train: batches must last for num_steps, got fewer")
    return drawn
