"""Random losses: criteria of outputs and targets, and losses of a model and a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_problems.choices import Choices


class Scaled(nn.Module):
    """A criterion of a user, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.4))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) * self.log_scale.exp()).square().mean()


def held(make: Callable[[Choices], nn.Module]) -> Callable[[Choices], Any]:
    """A criterion that holds tensors in the dtype of the model."""

    def made(c: Choices) -> Any:
        if c.compute != c.stored:
            c.note("another precision than what the loss holds")
        return c.hold(make(c))

    return made


def weights(c: Choices) -> Tensor:
    return torch.linspace(0.5, 2.0, c.classes).to(c.stored)


Options = dict[str, tuple[float, Callable[[Choices], Any]]]

# Of int64 classes (N,); of numbers (N, C); of zeros and ones (N, C).
CRITERIA: dict[str, Options] = {
    "classes": {
        "CrossEntropyLoss": (4, lambda c: nn.CrossEntropyLoss()),
        "class weights": (1, held(lambda c: nn.CrossEntropyLoss(weight=weights(c)))),
        "label smoothing": (1, lambda c: nn.CrossEntropyLoss(label_smoothing=0.1)),
        "ignored targets": (1, lambda c: nn.CrossEntropyLoss(ignore_index=0)),
        "sum of cross-entropies": (1, lambda c: nn.CrossEntropyLoss(reduction="sum")),
        "F.cross_entropy": (1, lambda c: F.cross_entropy),
        "partial of F.cross_entropy": (1, lambda c: functools.partial(F.cross_entropy, reduction="sum")),
        "not reduced": (0.3, lambda c: nn.CrossEntropyLoss(reduction="mean" if c.plain else "none")),
    },
    "numbers": {
        "MSELoss": (3, lambda c: nn.MSELoss()),
        "sum of squares": (1, lambda c: nn.MSELoss(reduction="sum")),
        "HuberLoss": (1, lambda c: nn.HuberLoss()),
        "PoissonNLLLoss": (1, lambda c: nn.PoissonNLLLoss()),
        "F.mse_loss": (1, lambda c: F.mse_loss),
        "criterion with a parameter": (1, held(lambda c: Scaled())),
    },
    "labels": {
        "BCEWithLogitsLoss": (2, lambda c: nn.BCEWithLogitsLoss()),
        "pos_weight": (1, held(lambda c: nn.BCEWithLogitsLoss(pos_weight=weights(c)))),
    },
}


class FusedLoss(torch.autograd.Function):
    """Half the mean square, with a gradient that is computed in forward."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, targets: Tensor) -> Tensor:
        ctx.gradient = (outputs - targets) / len(outputs)
        return 0.5 * (outputs - targets).square().sum() / len(outputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.gradient, None


Body = Callable[[nn.Module, Any, Tensor], Any]  # model, inputs, targets -> loss


@dataclass(frozen=True)
class Loss:
    """A loss of model, inputs and targets, and how `spectrum` is to be given it.

    Attributes:
        body: what it computes.
        form: "criterion" for a function of outputs and targets, "closure", or "model" if the model returns the loss.
        criterion: the criterion.
        weighted: whether it returns the weight of the batch.
    """

    body: Body
    form: str = "closure"
    criterion: Any = None
    weighted: bool = False


def criterion(c: Choices) -> Loss:
    made = c.make(CRITERIA[c.task])
    return Loss(lambda m, x, y: made(m(x), y), "criterion", made)


def mean(c: Choices) -> Callable[[Tensor, Tensor], Tensor]:
    """A mean over samples."""
    functions = {"classes": F.cross_entropy, "numbers": F.mse_loss, "labels": F.binary_cross_entropy_with_logits}
    return functions[c.task]


def closure(c: Choices) -> Loss:
    of = mean(c)
    return Loss(lambda m, x, y: of(m(x), y))


def weighted(c: Choices) -> Loss:
    of = mean(c)
    kind = c.random.choice([int, float, torch.tensor])
    return Loss(lambda m, x, y: (of(m(x), y), kind(1 + len(y) ** 2)), weighted=True)


def two_calls(c: Choices) -> Loss:
    """The model is called for the inputs twice, the second time with two of the columns exchanged."""
    of = mean(c)

    def body(m: nn.Module, x: Any, y: Tensor) -> Tensor:
        other = x[:, [1, 0]] if isinstance(x, Tensor) and x.dim() == 3 and not x.is_nested else x
        return of(m(x), y) + 0.3 * (m(x) - m(other).tanh()).square().mean()

    return Loss(body)


def penalized(c: Choices) -> Loss:
    of = mean(c)
    return Loss(lambda m, x, y: of(m(x), y) + 0.2 * sum(p.square().sum() for p in m.parameters() if p.requires_grad))


def captured_parameters(c: Choices) -> Loss:
    of, parameters = mean(c), [p for p in c.inner.parameters() if p.requires_grad]
    if c.compute != c.stored:
        c.note("another precision than what the loss holds")
    return Loss(lambda m, x, y: of(m(x), y) + 0.2 * sum(p.square().sum() for p in parameters))


def captured_model(c: Choices) -> Loss:
    of, model = mean(c), c.inner
    return Loss(lambda m, x, y: of(model(x), y))


def proximal(c: Choices) -> Loss:
    """The distance from a copy of the parameters."""
    of = mean(c)
    names = [name for name, p in c.inner.named_parameters() if p.requires_grad]
    centers = {name: c.randn(*dict(c.inner.named_parameters())[name].shape) for name in names}
    if c.compute != c.stored:
        c.note("another precision than what the loss holds")

    def body(m: nn.Module, x: Any, y: Tensor) -> Tensor:
        own = dict(m.named_parameters())
        return of(m(x), y) + 0.2 * sum((own[name] - center).square().sum() for name, center in centers.items())

    return Loss(body)


def distilled(c: Choices) -> Loss:
    """A frozen teacher of the outputs and a matrix of prototypes, that are no part of the model."""
    of, teacher = mean(c), c.hold(nn.Linear(c.classes, c.classes))
    prototypes = c.randn(c.classes, 3)
    if c.compute != c.stored:
        c.note("another precision than what the loss holds")

    def body(m: nn.Module, x: Any, y: Tensor) -> Tensor:
        outputs = m(x)
        with torch.no_grad():
            wanted = teacher(torch.ones_like(outputs)) @ prototypes
        return of(outputs, y) + 0.3 * (outputs @ prototypes - wanted).square().mean()

    return Loss(body)


def gradient_penalty(c: Choices) -> Loss:
    of = mean(c)
    if {"LayerNorm", "encoder layer"} & c.kinds.keys():
        c.note("gradient penalty through a normalization")

    def body(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        outputs = m(x)
        (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        return of(outputs, y) + 0.3 * slope.square().mean()

    return Loss(body)


def fused(c: Choices) -> Loss:
    plain = lambda a, b: 0.5 * (a - b).square().sum() / len(a)  # noqa: E731
    of = plain if c.plain else FusedLoss.apply
    shift = lambda a, y: y if y.is_floating_point() else torch.ones_like(a)  # noqa: E731
    return Loss(lambda m, x, y: (lambda a: of(2 * a, shift(a, y)))(m(x)))


def own_targets(c: Choices) -> Loss:
    """Targets from the model itself, without gradients."""
    of, enabled = mean(c), c.plain

    def body(m: nn.Module, x: Any, y: Tensor) -> Tensor:
        with torch.set_grad_enabled(enabled):
            wanted = m(x).square()
        return of(m(x), y) + (m(x) - wanted).square().mean()

    return Loss(body)


def detached_weight(c: Choices) -> Loss:
    """A focal loss whose weights are detached."""

    def body(m: nn.Module, x: Any, y: Tensor) -> Tensor:
        each = F.softplus(m(x))
        weight = (1 - (-each).exp()).square()
        return ((weight if c.plain else weight.detach()) * each).mean()

    return Loss(body)


def returning(how: Callable[[Tensor, Tensor], Any]) -> Callable[[Choices], Loss]:
    def make(c: Choices) -> Loss:
        of = mean(c)

        def body(m: nn.Module, x: Any, y: Tensor) -> Any:
            outputs = m(x)
            return of(outputs, y) if c.plain else how(of(outputs, y), outputs)

        return Loss(body)

    return make


@dataclass
class Output:
    """As models of Transformers return."""

    loss: Tensor
    logits: Tensor


class WithLoss(nn.Module):
    """A model that computes its loss from labels."""

    def __init__(self, inner: nn.Module, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.of = inner, of

    def forward(self, x: Any, labels: Tensor) -> Output:
        outputs = self.inner(x)
        return Output(self.of(outputs, labels), outputs)


LOSSES: dict[str, tuple[float, Callable[[Choices], Loss]]] = {
    "criterion": (8, criterion),
    "closure": (3, closure),
    "loss and weight": (2, weighted),
    "loss of the model": (1, lambda c: Loss(lambda m, x, y: m(x, y).loss, "model")),
    "two calls of the model": (0.7, two_calls),
    "penalty on parameters": (1, penalized),
    "captured parameters": (1, captured_parameters),
    "captured model": (0.7, captured_model),
    "captured copy": (0.7, proximal),
    "captured teacher": (1, distilled),
    "gradient penalty": (0.7, gradient_penalty),
    "fused loss": (0.7, fused),
    "targets from the model": (0.5, own_targets),
    "detached weights of samples": (0.5, detached_weight),
    "loss and metrics": (0.2, returning(lambda loss, outputs: (loss, {"accuracy": 0.5}))),
    "outputs and loss": (0.2, returning(lambda loss, outputs: (outputs, loss))),
    "loss in a dict": (0.2, returning(lambda loss, outputs: {"loss": loss})),
    "loss of shape (1,)": (0.2, returning(lambda loss, outputs: loss.view(1))),
}
FAULTS = ("fused loss", "targets from the model", "detached weights of samples")
