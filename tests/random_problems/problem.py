"""Random problems: a model, data, a loss and options, as a function of a seed.

Every problem is built twice from the same choices: as a user would write it, and plain, in float64, without Functions
that have a backward of their own, hooks, conversions and wrappers. The plain twin computes the same loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockhess import ParameterSlice
from tests.random_problems import data, losses, models, modules
from tests.random_problems.choices import Choices

# Why a problem of a kind may be refused. Problems of no such kind must not be.
REFUSALS = {
    **dict.fromkeys((*modules.FAULTS, *losses.FAULTS), "the gradient, or its derivative, is not that of the loss"),
    "edits of gradients": "the gradient is not that of the loss",
    "layer under no_grad": "the gradient is not that of the loss",
    "random numbers": "the loss is not a function of the parameters",
    "weight_norm": "torch's fused weight norm has a wrong second derivative",
    "weight_norm as a parametrization": "torch's fused weight norm has a wrong second derivative",
    "reentrant checkpoint": "torch.autograd.grad does not see its parameters",
    "EmbeddingBag": "torch has no second derivative of it",
    "gradient penalty through a normalization": "torch has a wrong third derivative of it",
    "another precision than what the loss holds": "tensors outside the model keep their dtype",
    "data that are not converted": "torch refuses to mix precisions",
    "sizes of batches unknown": "the weights have to be given",
    "loss and metrics": "it is not known which is the loss",
    "outputs and loss": "it is not known which is the loss",
    "loss in a dict": "it is not known which is the loss",
    "loss of shape (1,)": "it is not a scalar",
    "not reduced": "it is not a scalar",
    "endless data": "there is no last batch",
    "samples, not batches": "a Dataset holds samples",
    "iterator": "it may never end",
    "whole model in TorchScript": "its graph is not PyTorch's",
    "traced model": "its dtype is fixed",
}


class WithScale(nn.Module):
    """A user's wrapper with a parameter of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.tensor([1.3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


@dataclass
class Problem:
    """A random problem, and what is known of it.

    Attributes:
        seed, forced: see `build`.
        model, data, loss_fn, options: the arguments of `spectrum`.
        inner: the model without the wrappers that `spectrum` takes away.
        total: the loss of all data, as a function of `inner`.
        kinds: what it is made of.
        surroundings: what holds during the call.
        held: modules that the loss function holds.
        before: what the twin does once it has the parameters of the problem.
        compute: dtype in which `spectrum` computes.
    """

    seed: int
    forced: frozenset[str]
    model: nn.Module
    inner: nn.Module
    data: Any
    loss_fn: Any
    options: dict[str, Any]
    total: Callable[[nn.Module], Tensor]
    kinds: tuple[str, ...]
    surroundings: str
    held: list[nn.Module]
    before: list[Callable[[], object]]
    compute: torch.dtype

    @property
    def refusals(self) -> list[str]:
        """The kinds for which a refusal is right."""
        return [kind for kind in self.kinds if kind in REFUSALS]

    def __str__(self) -> str:
        return f"seed {self.seed}: {', '.join(self.kinds)}"


def precision(c: Choices) -> torch.dtype | None:
    stored = c.pick({"float32 model": 0.7, "float64 model": 0.2, "bfloat16 model": 0.1})
    asked = c.pick({"dtype None": 0.65, "dtype float64": 0.3, "dtype float32": 0.05})
    c.stored = getattr(torch, stored.split()[0])
    dtype = None if asked == "dtype None" else getattr(torch, asked.split()[1])
    c.compute = dtype or (torch.float32 if c.stored == torch.bfloat16 else c.stored)
    return dtype


# Blocks of which a model in TorchScript can be made.
SCRIPTABLE = {"Linear", "Dropout", "RMSNorm", "GroupNorm", "BatchNorm", "temperature", "ReZero"}


def wrapped(c: Choices, inner: nn.Module, x: Any) -> tuple[nn.Module, nn.Module]:
    """The model as it is given, and without what `spectrum` takes away."""
    simple = not c.kinds.keys() & {"loss of the model", "data of another precision"}
    simple = simple and "vectors" in c.kinds and not (models.BLOCKS.keys() & c.kinds.keys() - SCRIPTABLE)
    wrappers = {"no wrapper": 12, "DataParallel": 1, "torch.compile": 0.6}
    if simple:
        wrappers |= {"whole model in TorchScript": 1, "traced model": 1}
    wrapper = c.pick(wrappers)
    if c.plain or wrapper == "no wrapper":
        return inner, inner
    if wrapper == "DataParallel":
        return nn.DataParallel(inner), inner
    if wrapper == "torch.compile":
        return torch.compile(inner, backend="eager"), inner
    made = torch.jit.script(inner) if wrapper == "whole model in TorchScript" else torch.jit.trace(inner.eval(), x)
    return made, made


def blocks(c: Choices, inner: nn.Module) -> Any:
    names = [name for name, p in inner.named_parameters() if p.requires_grad]
    how = c.pick({"blocks of parameters": 6, "one block of all": 1, "groups": 1, "slices": 1.5, "some blocks": 1})
    if how in ("blocks of parameters", "one block of all"):
        return "parameter" if how == "blocks of parameters" else "full"
    if how == "groups":
        numbered = [bool(re.search(r"\d+\.", name)) for name in names]
        return [(r"(\d+)\.", r"part \1")] * any(numbered) + [("", "others")] * (not all(numbered))
    if how == "some blocks":
        return {name: name for name in c.random.sample(names, max(1, len(names) // 2))}
    sizes = {name: len(p) for name, p in inner.named_parameters() if p.requires_grad and p.dim() and len(p) > 1}
    if not sizes or len(names) < 2:
        return "parameter"
    name = c.random.choice(list(sizes))
    cut = {
        f"{name}, {part}": ParameterSlice(name, *ends) for part, ends in (("first", (0, 1)), ("rest", (1, sizes[name])))
    }
    return cut | {"others": [other for other in names if other != name]}


def options(c: Choices, dtype: torch.dtype | None, inner: nn.Module) -> dict[str, Any]:
    engine = c.pick({"engine auto": 4, "engine autograd": 2.5, "engine exact": 1.5, "engine traced": 1.2})
    made: dict[str, Any] = {"dtype": dtype, "engine": engine.split()[1], "blocks": blocks(c, inner)}
    if "BatchNorm" in c.kinds:
        policy = c.pick({"running statistics": 1, "batch statistics": 1.5, "frozen batch statistics": 1})
        made["batchnorm"] = {"running statistics": "eval", "batch statistics": "batch"}.get(
            policy, "frozen_batch_stats"
        )
    return made | {"num_probes": c.random.choice([1, 2, 3]), "num_steps": 60, "progress": False}


SURROUNDINGS = {"nothing around": 8, "no_grad": 1, "inference_mode": 0.7, "float64 by default": 1, "autocast": 0.7}


def build(seed: int, plain: bool = False, forced: frozenset[str] = frozenset()) -> Problem:
    """Build the problem of a seed, or its plain twin.

    Args:
        forced: kinds that are chosen where they can be.
    """
    torch.manual_seed(seed)
    c = Choices(seed, plain, forced)
    dtype = precision(c)
    source = c.pick({name: weight for name, (weight, _) in models.STEMS.items()})
    c.task = c.pick({"classes": 3, "numbers": 2, "labels": 1})
    c.classes = c.random.choice([2, 3])
    if source == "tokens" and c.task == "classes" and c.chance(0.4):
        c.classes = models.VOCABULARY  # tied
    raw = data.raw_batches(c, source)
    c.inputs = [x for x, _ in raw]
    inner = models.model(c, models.STEMS[source][1](c), source, c.classes)
    c.inner = inner
    if c.pick({"no scale": 8, "wrapper with a parameter": 1}) != "no scale":
        inner = c.inner = WithScale(inner)
    if c.chance(0.15):
        c.note("frozen parameters")
        trainable = [p for p in inner.parameters() if p.requires_grad and p.dim()]
        for p in trainable[: 1 + len(trainable) // 3]:
            p.requires_grad_(False)
    inner.to(torch.float64 if plain else c.stored)
    loss = c.make(usable_losses(source))
    if loss.form == "model":
        inner = c.inner = losses.WithLoss(inner, losses.mean(c))
    if c.chance(0.2):
        c.note("gradients present")
        for p in inner.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
    model, inner = wrapped(c, inner, raw[0][0])
    if c.chance(0.5) and "merging LoRA" not in c.kinds:
        model.eval()
    given, loss_fn = packed(c, raw, loss, source)
    return Problem(
        seed=seed,
        forced=forced,
        model=model,
        inner=inner,
        data=given,
        loss_fn=loss_fn,
        options=options(c, dtype, inner),
        total=total(raw, loss),
        surroundings=c.pick(SURROUNDINGS),
        kinds=tuple(c.kinds),
        held=c.held,
        before=c.before,
        compute=c.compute,
    )


# Models whose outputs depend on how samples are put into batches.
OF_BATCHES = {"BatchNorm", "own generator", "draws that depend on the dtype", "branch on values"}


def usable_losses(source: str) -> dict[str, tuple[float, Callable[[Choices], losses.Loss]]]:
    found = dict(losses.LOSSES)
    if source not in ("vectors", "sequences", "images", "signals"):
        del found["gradient penalty"]
    return found


def packed(c: Choices, raw: data.Raw, loss: losses.Loss, source: str) -> tuple[Any, Any]:
    """The data and the loss function as `spectrum` is given them."""
    pack, unpack = data.CONTAINERS["tuple"][1:]
    if loss.form == "closure":
        pack, unpack = data.CONTAINERS[c.pick({name: weight for name, (weight, *_) in data.CONTAINERS.items()})][1:]
    elif loss.form == "model":
        name = c.pick({"dict": 1, "mapping with attributes": 1})
        pack = (lambda x, y: {"x": x, "labels": y}) if name == "dict" else lambda x, y: data.Encoding(x=x, labels=y)
    batches = [pack(x, y) for x, y in raw]
    sizes = {len(y) for _, y in raw}
    counted = loss.form != "closure" and c.task == "classes"
    unclear = source in ("graph", "PackedSequence", "nested tensor") or "another tensor first" in c.kinds
    hidden = len(raw) > 1 and c.kinds.keys() & {"object", "object without .to"}
    if not (loss.weighted or counted) and (hidden or (unclear and len(sizes) > 1)):
        c.note("sizes of batches unknown")
    collections = data.COLLECTIONS
    tensors = isinstance(raw[0][0], Tensor) and source != "nested tensor"
    if loss.form == "criterion" and tensors and len(raw) > 1 and not OF_BATCHES & c.kinds.keys():
        collections = collections | data.LOADERS
    if len(raw) == 1 and c.chance(0.8):
        given = batches[0]
    else:
        given = collections[c.pick({name: weight for name, (weight, _) in collections.items()})][1](batches)
    if loss.form == "model":
        return given, None
    return given, loss.criterion if loss.form == "criterion" else lambda m, batch: loss.body(m, *unpack(batch))


def total(raw: data.Raw, loss: losses.Loss) -> Callable[[nn.Module], Tensor]:
    """The loss of all data: of all outputs and targets together, or the mean weighted by the sizes of the batches."""

    def of_all(model: nn.Module) -> Tensor:
        if loss.form == "criterion":
            outputs, targets = zip(*((model(x), y) for x, y in raw))
            return loss.criterion(torch.cat(outputs), torch.cat(targets))
        found = [(loss.body(model, x, y), len(y)) for x, y in raw]
        if loss.weighted:
            found = [(value, float(weight)) for (value, weight), _ in found]
        return sum(value * weight for value, weight in found) / sum(weight for _, weight in found)

    return of_all
