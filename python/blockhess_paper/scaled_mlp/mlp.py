"""The MLP of section 2.4: 784-300-128-64-10, ReLU, every layer's output multiplied by c; many are trained at once.

    x_l = relu(c (W_l x_{l-1} + b_l)),   logits = c (W_4 x_3 + b_4)

All scales c and learning rates form one model with a leading axis, with one batched matrix product per layer.

With W' = c W, b' = c b this is the plain MLP started from c times the weights, and SGD with rate eta on W is SGD with
rate c^2 eta on W'.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockhess.datasets import fashion_mnist
from blockhess_paper.datasets.image_files import idx_images

WIDTHS = (784, 300, 128, 64, 10)
SCALES = tuple(range(1, 16))
BATCH_SIZE = 128

# PyTorch's defaults for Adam; the paper's Algorithm 1 is SGD with momentum, "beta_1 = 0.9 for SGD".
MOMENTUM, BETA1, BETA2, EPSILON = 0.9, 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Images:
    """Training and test images, flattened to 784 pixels, with labels, and the name of the data."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    name: str

    def to(self, device: str) -> Images:
        """Return the images on a device."""
        train, test = ((images.to(device), labels.to(device)) for images, labels in (self.train, self.test))
        return Images(train, test, self.name)


def load_images(folder: str | PathLike[str] | None = None) -> Images:
    """Return the shipped subset of Fashion-MNIST, or the idx files of a folder (MNIST, all of Fashion-MNIST).

    Raises:
        ValueError: the folder does not hold readable files of 28 x 28 pixels.
    """
    if folder is None:
        train, test, name = fashion_mnist(), fashion_mnist(split="test"), "Fashion-MNIST (shipped subset)"
    else:
        train, test, name = idx_images(folder), idx_images(folder, split="test"), str(folder)
    for images, _ in (train, test):
        if images[0].numel() != WIDTHS[0]:
            raise ValueError(f"load_images: images must have {WIDTHS[0]} pixels, got {tuple(images.shape[1:])}")
    return Images((train[0].flatten(1), train[1]), (test[0].flatten(1), test[1]), name)


class Scale(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def scaled_mlp(scale: float, seed: int | None) -> nn.Sequential:
    """Return an MLP at PyTorch's default initialization, which is the same for every scale.

    With seed None, weights are drawn from torch's global generator.

    Example:
        >>> scaled_mlp(3.0, seed=0)(torch.zeros(2, 784)).shape
        torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        modules = [m for a, b in itertools.pairwise(WIDTHS) for m in (nn.Linear(a, b), Scale(scale), nn.ReLU())]
    return nn.Sequential(*modules[:-1])


def logits(parameters: Sequence[Tensor], scales: Tensor, x: Tensor) -> Tensor:
    """Return the logits (n_models, n, 10) of all models for images x (n, 784).

    Args:
        parameters: weights (n_models, in, out) and biases (n_models, 1, out), alternating.
        scales: (n_models, 1, 1).
    """
    for weight, bias in zip(parameters[::2], parameters[1::2]):
        x = scales * (x @ weight + bias)
        if weight is not parameters[-2]:
            x = x.relu()
    return x


def batched_parameters(num_models: int, seed: int, device: torch.device) -> list[Tensor]:
    """Return the initial parameters of scaled_mlp(seed=seed), repeated for every model, for `logits`."""
    linear = [module for module in scaled_mlp(1.0, seed) if isinstance(module, nn.Linear)]
    parameters = [p for module in linear for p in (module.weight.detach().T, module.bias.detach()[None])]
    return [p.to(device).expand(num_models, -1, -1).clone().requires_grad_() for p in parameters]


@dataclass(frozen=True)
class Training:
    """Test accuracies of all models along training.

    Attributes:
        steps: (n_points,) iterations of the accuracies.
        accuracy: (n_scales, n_rates, n_points); 0 where logits are not finite.
        diverged: (n_scales, n_rates) bool, whether logits are not finite at the end.
    """

    steps: Tensor
    accuracy: Tensor
    diverged: Tensor


def train(
    images: Images,
    scales: Sequence[float],
    rates: Sequence[float],
    optimizer: str,
    *,
    num_steps: int,
    points: int = 20,
    seed: int = 0,
) -> Training:
    """Train one MLP for every scale and learning rate, all on the same batches.

    Args:
        images: training images, shuffled every epoch; an incomplete last batch is dropped. Models are on their device.
        scales, rates: the grid.
        optimizer: "SGD" with momentum 0.9, or "Adam" with PyTorch's defaults.
        num_steps: number of iterations.
        points: number of evenly spaced evaluations on the test images.
        seed: seed of weights and order of the images.

    Raises:
        ValueError: optimizer is unknown, a count is below 1, or there are fewer images than a batch.

    Example:
        >>> train(load_images(), [1, 8], [1e-3], "Adam", num_steps=4, points=2).accuracy.shape
        torch.Size([2, 1, 2])
    """
    if optimizer not in ("SGD", "Adam"):
        raise ValueError(f'train: optimizer must be "SGD" or "Adam", got {optimizer!r}')
    if min(num_steps, points) < 1 or len(images.train[0]) < BATCH_SIZE:
        raise ValueError(
            f"train: num_steps and points must be at least 1 and images at least {BATCH_SIZE}, got {num_steps}, "
            f"{points} and {len(images.train[0])}"
        )
    grid = torch.cartesian_prod(torch.tensor(scales, dtype=torch.float32), torch.tensor(rates, dtype=torch.float32))
    device = images.train[0].device
    c, rate = (column[:, None, None].to(device) for column in grid.T)
    parameters = batched_parameters(len(grid), seed, device)
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters] if optimizer == "Adam" else []
    generator = torch.Generator().manual_seed(seed)
    steps = sorted({max(1, round(num_steps * (k + 1) / points)) for k in range(points)})
    x, y = images.train
    order = torch.empty(0, dtype=torch.int64)
    accuracies, finite = [], torch.ones(len(grid), dtype=torch.bool, device=device)
    for step in range(1, num_steps + 1):
        if len(order) < BATCH_SIZE:
            order = torch.randperm(len(x), generator=generator)
        batch, order = order[:BATCH_SIZE].to(device), order[BATCH_SIZE:]
        out = logits(parameters, c, x[batch])
        # The sum of the mean losses of all models, so that every gradient is that of its own model.
        loss = F.cross_entropy(out.flatten(0, 1), y[batch].repeat(len(grid)), reduction="sum") / BATCH_SIZE
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            if optimizer == "SGD":
                for p, g, m in zip(parameters, gradients, first):
                    m.mul_(MOMENTUM).add_(g)
                    p.sub_(rate * m)
            else:
                corrected = rate / (1 - BETA1**step)
                for p, g, m, v in zip(parameters, gradients, first, second):
                    m.lerp_(g, 1 - BETA1)
                    v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
                    p.sub_((m / (v / (1 - BETA2**step)).sqrt_().add_(EPSILON)).mul_(corrected))
            if step in steps:
                out = logits(parameters, c, images.test[0])
                finite = out.isfinite().all(-1).all(-1)
                right = (out.argmax(-1) == images.test[1]).double().mean(-1)
                accuracies.append(torch.where(finite, right, 0.0))
    shape = len(scales), len(rates)
    accuracy = torch.stack(accuracies, 1).view(*shape, -1)
    return Training(torch.tensor(steps), accuracy.cpu(), ~finite.view(shape).cpu())
