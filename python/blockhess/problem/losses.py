"""The loss of a batch and the weight of the batch in the total loss.

    L(w) = sum_b weight_b L_b(w) / sum_b weight_b,   or  sum_b L_b(w)  where the loss sums over samples

With the default weights, splitting the data into batches of any size does not change L.
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockhess.problem.batches import Batch, batch_size, first_line

Weight = Tensor | float | int | None


class Loss:
    """Base class of the losses that `make_loss` returns.

    Parameters and buffers of a loss that is a module are converted with those of the model. Only parameters of the
    model are differentiated; others are constants.
    """

    name: str
    call: str  # how it is called, and what to do if that fails
    advice: str
    module: nn.Module | None = None  # that computes the loss
    pairs = False  # batches are (inputs, targets)
    averaged = True  # the total loss is the weighted mean over batches, otherwise the sum
    calls_model = True  # the batch is passed to the model unchanged, so it must be on the model's device

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        """Return the loss of the batch, and its weight or None if only its size is known."""
        raise NotImplementedError

    def averaged_over(self, batch: Batch) -> Any:
        """Return the part of a batch whose first dimension is its weight, where the loss returns none."""
        return batch

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
        the number of labels in the loss; otherwise the first dimension of the targets of a criterion, or of most
        tensors in the batch. With reduction="sum" the total loss is the sum.

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
    call, advice = "loss_fn(model, batch)", "try that call alone"

    def __init__(self, loss_fn: Callable[..., Any]) -> None:
        self.name = getattr(loss_fn, "__qualname__", type(loss_fn).__name__)
        owner = getattr(loss_fn, "__self__", None)  # of a method, such as module.forward
        self.module = owner if isinstance(owner, nn.Module) else None
        self._loss_fn = loss_fn

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        result = self._loss_fn(model, batch)
        if isinstance(result, tuple) and len(result) == 2:
            if isinstance(result[1], Tensor) and result[1].requires_grad:  # the loss after the outputs, or another loss
                raise TypeError(
                    f"spectrum: loss_fn must return the mean loss or (mean loss, weight of the batch), got "
                    f"{_kind(result)} whose second depends on the parameters; return the loss alone"
                )
            return result
        return result, None


class CriterionLoss(Loss):
    """`criterion(model(inputs), targets)`.

    Args:
        criterion, name: the criterion and its name in messages.
        options: its arguments, such as reduction and ignore_index.
        counts_targets: the mean is over the targets that are not ignored, as in cross-entropy.
    """

    pairs = True
    call, advice = "loss_fn(model(inputs), targets)", "for other calls pass loss_fn(model, batch)"

    def __init__(
        self, criterion: Callable[..., Any], name: str, options: Mapping[str, Any], counts_targets: bool
    ) -> None:
        reduction = options.get("reduction", "mean")
        if reduction == "none":
            raise ValueError(f"spectrum: loss_fn must return one number, got {name} with reduction='none'")
        self.name, self.averaged = name, reduction != "sum"
        self.module = criterion if isinstance(criterion, nn.Module) else None
        self._criterion, self._options, self._counts_targets = criterion, options, counts_targets

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        inputs, targets = self._pair(batch)
        loss = self._apply(model(inputs), targets)
        return loss, self._count(targets) if self._counts_targets else None

    def averaged_over(self, batch: Batch) -> Any:
        inputs, targets = self._pair(batch)
        return targets if batch_size(targets) == batch_size(inputs) is not None else batch

    def with_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = self._pair(batch)
        outputs = model(inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"spectrum: model must return a tensor for engine='ggn', got {type(outputs).__name__}")
        return outputs, self._apply(outputs, targets)

    def _apply(self, outputs: Any, targets: Any) -> Any:
        try:
            return self._criterion(outputs, targets)
        except (TypeError, AttributeError) as error:
            took = f"{_kind(outputs)} and {_kind(targets)}: {first_line(error)}"
            if not isinstance(outputs, Tensor):
                parts = [name for name in ("logits", "loss") if isinstance(getattr(outputs, name, None), Tensor)]
                raise TypeError(
                    f"spectrum: loss_fn {self.name} must take what the model returns, got {took}; pass "
                    f"loss_fn(model, batch) that takes {' or '.join(parts) or 'the right part'} of the model's outputs"
                ) from error
            if self.module is not None and not type(self.module).__module__.startswith("torch."):
                raise TypeError(
                    f"spectrum: loss_fn {self.name} is a module, called as loss_fn(model(inputs), targets), got "
                    f"{took}; if its forward takes (model, batch), pass loss_fn.forward"
                ) from error
            raise

    def _pair(self, batch: Batch) -> tuple[Any, Any]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"spectrum: data must hold pairs (inputs, targets) for {self.name}, got {_describe(batch)}; "
                "for other batches pass loss_fn(model, batch), or the forward of a module that takes these"
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

    name = call = "model(**batch).loss"
    advice = "take out of the batch what the model does not take, or pass loss_fn(model, batch)"

    def __init__(self) -> None:
        self._shifted: bool | None = None  # position t is compared with label t + 1

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        output, loss = self._run(model, batch)
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            return loss, None
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
        raise TypeError(
            f"spectrum: loss_fn must return a tensor, got {_kind(loss)} for batch {batch}; {_instead(loss)}"
        )
    if loss.dim() != 0:
        raise ValueError(
            f"spectrum: loss_fn must return a 0-dimensional tensor, got shape {tuple(loss.shape)} for batch {batch}; "
            + ("return loss.squeeze()" if loss.numel() == 1 else "take the mean")
        )
    if not loss.is_floating_point():
        raise ValueError(f"spectrum: loss_fn must return a real number, got {loss.dtype} for batch {batch}")
    if not loss.requires_grad:
        raise ValueError(
            f"spectrum: loss_fn must depend on the parameters, got a loss that requires no gradient for batch {batch}; "
            "is there a detach(), item() or no_grad() on the way?"
        )
    return loss


def _kind(value: Any) -> str:
    """Return the type of a returned value, with those of its parts."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {reprlib.repr(list(value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} ({', '.join(map(_kind, value[:5]))}{', ...' * (len(value) > 5)})"
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _instead(loss: Any) -> str:
    """Return what to return in place of something that is no tensor."""
    if isinstance(loss, Mapping) and "loss" in loss:
        return "return its entry 'loss'"
    if isinstance(getattr(loss, "loss", None), Tensor):
        return "return its attribute loss"
    if isinstance(loss, float | int):
        return "return the tensor, without item()"
    return "return the mean loss, or (mean loss, weight of the batch)"


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
        raise TypeError(
            f"spectrum: loss_fn must return a number as weight, got {_kind(weight)} for batch {batch}; "
            "return the loss alone, or (mean loss, weight of the batch)"
        ) from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"spectrum: loss_fn must return a finite weight of at least 0, got {value} for batch {batch}")
    return value


def _describe(batch: Batch) -> str:
    length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
    several = isinstance(batch, tuple) and all(isinstance(part, tuple | list | Mapping) for part in batch)
    return f"a {type(batch).__name__}{length}" + " (a tuple is one batch, several are a list)" * several
