"""The loss of a batch and the weight of the batch in the total loss.

    L(w) = sum_b weight_b L_b(w) / sum_b weight_b,   or  sum_b L_b(w)  where the loss sums over samples

With the default weights, splitting the data into batches of any size does not change L.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockhess.problem.batches import Batch, batch_size

Weight = Tensor | float | int | None


class Loss:
    """Base class of the losses that `make_loss` returns."""

    name: str
    pairs = False  # batches are (inputs, targets)
    averaged = True  # the total loss is the weighted mean over batches, otherwise the sum
    calls_model = True  # the batch is passed to the model unchanged, so it must be on the model's device

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        """Return the loss of the batch, and its weight or None if that is unknown."""
        raise NotImplementedError

    def with_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the outputs of the model, and the loss computed from them.

        Raises:
            TypeError: the outputs are not accessible.
        """
        raise TypeError(
            f"spectrum: loss_fn must be a criterion such as nn.CrossEntropyLoss(), or None for a Transformers model, "
            f"where the model's outputs matter (engine='ggn'), got {self.name}"
        )


def make_loss(loss_fn: Callable[..., Any] | None) -> Loss:
    """Wrap the `loss_fn` of a user.

    Args:
        loss_fn: None: `model(**batch).loss` (Transformers); an nn.Module such as nn.CrossEntropyLoss() or a function
            of torch.nn.functional (also in functools.partial): `loss_fn(model(inputs), targets)`; any other
            callable: `loss_fn(model, batch)`, which returns the mean loss or (mean loss, weight).

    Returns:
        The loss. The weight of a batch is the one that the callable returns; for cross-entropy and negative
        log-likelihood the number of targets that are not ignored, or the sum of their class weights; for Transformers
        the number of labels in the loss; otherwise the batch size. With reduction="sum" the total loss is the sum.

    Raises:
        TypeError: `loss_fn` is not callable.
        ValueError: a criterion with reduction="none".
    """
    if loss_fn is None:
        return TransformersLoss()
    if not callable(loss_fn):
        raise TypeError(f"spectrum: loss_fn must be callable or None, got {type(loss_fn).__name__}")
    if isinstance(loss_fn, nn.Module):
        counts_targets = isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss)
        options = vars(loss_fn) | dict(loss_fn.named_buffers())
        return CriterionLoss(loss_fn, type(loss_fn).__name__, options, counts_targets)
    function, options = (loss_fn.func, loss_fn.keywords) if isinstance(loss_fn, functools.partial) else (loss_fn, {})
    if getattr(function, "__module__", None) == F.__name__:
        return CriterionLoss(loss_fn, function.__name__, options, function in (F.cross_entropy, F.nll_loss))
    return ClosureLoss(loss_fn)


class ClosureLoss(Loss):
    """`loss_fn(model, batch)` -> mean loss or (mean loss, weight)."""

    calls_model = False

    def __init__(self, loss_fn: Callable[..., Any]) -> None:
        self.name = getattr(loss_fn, "__qualname__", type(loss_fn).__name__)
        self._loss_fn = loss_fn

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        result = self._loss_fn(model, batch)
        if isinstance(result, tuple) and len(result) == 2:
            return result
        return result, batch_size(batch)


class CriterionLoss(Loss):
    """`criterion(model(inputs), targets)`.

    Args:
        criterion, name: the criterion and its name in messages.
        options: its arguments, such as reduction and ignore_index.
        counts_targets: the mean is over the targets that are not ignored, as in cross-entropy.
    """

    pairs = True

    def __init__(
        self, criterion: Callable[..., Any], name: str, options: Mapping[str, Any], counts_targets: bool
    ) -> None:
        reduction = options.get("reduction", "mean")
        if reduction == "none":
            raise ValueError(f"spectrum: loss_fn must return one number, got {name} with reduction='none'")
        self.name, self.averaged = name, reduction != "sum"
        self._criterion, self._options, self._counts_targets = criterion, options, counts_targets

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        inputs, targets = self._pair(batch)
        loss = self._criterion(model(inputs), targets)
        return loss, self._count(targets) if self._counts_targets else batch_size(batch)

    def with_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = self._pair(batch)
        outputs = model(inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"spectrum: model must return a tensor for engine='ggn', got {type(outputs).__name__}")
        return outputs, self._criterion(outputs, targets)

    def _pair(self, batch: Batch) -> tuple[Any, Any]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"spectrum: data must hold pairs (inputs, targets) for {self.name}, got {_describe(batch)}; "
                "for other batches pass loss_fn(model, batch)"
            )
        return batch[0], batch[1]

    def _count(self, targets: Tensor) -> Weight:
        """Return the denominator of the mean in cross-entropy."""
        if targets.is_floating_point():  # class probabilities of shape (N, C, ...)
            return targets.numel() // targets.shape[1 if targets.dim() > 1 else 0]
        kept = targets != self._options.get("ignore_index", -100)
        class_weights: Tensor | None = self._options.get("weight")
        return kept.sum() if class_weights is None else class_weights[targets[kept]].sum()


class TransformersLoss(Loss):
    """`model(**batch).loss`, the loss that Transformers models compute from `labels`."""

    name = "model(**batch).loss"

    def __init__(self) -> None:
        self._shifted: bool | None = None  # position t is compared with label t + 1

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        output, loss = self._run(model, batch)
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            return loss, batch_size(batch)
        if self._shifted is None and bool(labels.ne(-100).any()):  # undecidable if all labels are ignored
            self._shifted = labels.dim() == 2 and _labels_are_shifted(output, labels)
        return loss, (labels[:, 1:] if self._shifted else labels).ne(-100).sum()

    def with_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        output, loss = self._run(model, batch)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(f"spectrum: model must return logits for engine='ggn', got {type(output).__name__}")
        return logits, loss

    def _run(self, model: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
        if not isinstance(batch, Mapping):
            raise ValueError(
                "spectrum: data must hold mappings for loss_fn=None, which means model(**batch).loss, got "
                f"{_describe(batch)}; pass loss_fn="
            )
        output = model(**batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"spectrum: loss_fn must be given where model(**batch) returns no loss; got {type(output).__name__} "
                f"from a batch with keys {sorted(batch)} (Transformers models need 'labels')"
            )
        return output, loss


def _labels_are_shifted(output: Any, labels: Tensor) -> bool:
    """Return whether the model compares the logits at position t with label t + 1, as causal language models do.

    Then the gradient with respect to the logits is zero at the last position of every run of labels. Neither class
    names nor configurations identify all such models.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape or not logits.requires_grad:
        return False
    counted = labels != -100
    last = counted & ~F.pad(counted[:, 1:], (0, 1))
    (gradient,) = torch.autograd.grad(output.loss, logits, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(last.any()) and not bool(gradient[last].any())


def checked(loss: Any, batch: int) -> Tensor:
    """Return `loss`; raise a TypeError or ValueError unless it is a real scalar tensor with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"spectrum: loss_fn must return a tensor, got {type(loss).__name__} for batch {batch}")
    if loss.dim() != 0:
        raise ValueError(
            f"spectrum: loss_fn must return a 0-dimensional tensor, got shape {tuple(loss.shape)} for batch {batch}; "
            "take the mean"
        )
    if not loss.is_floating_point():
        raise ValueError(f"spectrum: loss_fn must return a real number, got {loss.dtype} for batch {batch}")
    if not loss.requires_grad:
        raise ValueError(
            f"spectrum: loss_fn must depend on the parameters, got a loss that requires no gradient for batch {batch}; "
            "is there a detach(), item() or no_grad() on the way?"
        )
    return loss


def checked_weight(weight: Weight, batch: int, batches: int) -> float:
    """Return `weight` as a float, 1 if it is None and the batch is the only one.

    Raises:
        TypeError, ValueError: not a number, negative, not finite, or None with several batches.
    """
    if weight is None:
        if batches > 1:
            raise ValueError(
                f"spectrum: loss_fn must return (mean loss, weight), since batch {batch} has no tensor that tells its "
                "size"
            )
        return 1.0
    try:
        value = float(weight)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"spectrum: loss_fn must return a number as weight, got {weight!r} for batch {batch}") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"spectrum: loss_fn must return a finite weight of at least 0, got {value} for batch {batch}")
    return value


def _describe(batch: Batch) -> str:
    length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
    return f"a {type(batch).__name__}{length}"
