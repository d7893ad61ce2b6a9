"""Random models: a stem from inputs to features (N, WIDTH) or (N, T, WIDTH), blocks of such features, and a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.random_problems import modules
from tests.random_problems.choices import Choices
from tests.random_problems.modules import Apply, Hook

WIDTH = 2
VOCABULARY = 5


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "Tanh": nn.Tanh,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "Sigmoid": nn.Sigmoid,
    "Softplus": nn.Softplus,
    "ELU": nn.ELU,
    "Mish": nn.Mish,
    "PReLU": nn.PReLU,
    "Softmax": lambda: nn.Softmax(-1),
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
}


def activation(c: Choices) -> nn.Module:
    return ACTIVATIONS[c.pick({name: 4 if name == "Tanh" else 1 for name in ACTIVATIONS})]()


class PlainEmbedding(nn.Embedding):
    """Rows of a matrix, of which one may be constant."""

    base: Tensor | None = None

    def renorm(self, indices: Tensor, largest: float) -> None:
        with torch.no_grad():
            torch.embedding_renorm_(self.weight, indices, largest, 2.0)

    def keep(self) -> None:
        """Take the present first row as constant."""
        self.base = self.weight[:1].detach().clone()

    def forward(self, indices: Tensor) -> Tensor:
        weight = self.weight if self.base is None else torch.cat([self.base, self.weight[1:]])
        return weight[indices]


class PlainBag(nn.Embedding):
    def forward(self, indices: Tensor) -> Tensor:
        return self.weight[indices].mean(1)


def embedding(**options: Any) -> Callable[[Choices], nn.Module]:
    def make(c: Choices) -> nn.Module:
        if not c.plain:
            made = nn.Embedding(VOCABULARY, WIDTH, **options)
            nn.init.normal_(made.weight)
            return made
        twin = PlainEmbedding(VOCABULARY, WIDTH)
        if "max_norm" in options:
            c.before.append(lambda: [twin.renorm(x.unique(), 1.0) for x in c.inputs] and None)
        if "padding_idx" in options:
            c.before.append(twin.keep)
        return twin

    return make


EMBEDDINGS: dict[str, tuple[float, Callable[[Choices], nn.Module]]] = {
    "Embedding": (3, embedding()),
    "sparse gradients": (1, embedding(sparse=True)),
    "max_norm": (1, embedding(max_norm=1.0)),
    "padding_idx": (1, embedding(padding_idx=0)),
    "EmbeddingBag": (0.5, lambda c: (PlainBag if c.plain else nn.EmbeddingBag)(VOCABULARY, WIDTH)),
}


def tokens(c: Choices) -> nn.Module:
    """An embedding; max_norm in bfloat16 or with several batches, which change the rows in turn, has no one truth."""
    renormed = c.stored != torch.bfloat16 and len(c.inputs) == 1
    usable = {name: made for name, made in EMBEDDINGS.items() if renormed or name != "max_norm"}
    return nn.Sequential(c.make(usable), nn.Identity())


def image_stem(c: Choices) -> nn.Module:
    norm = [batchnorm(c, nn.BatchNorm2d(WIDTH, eps=0.1))] if c.chance(0.4) else []
    pools = {"MaxPool2d": nn.MaxPool2d, "AvgPool2d": nn.AvgPool2d, "no pooling": lambda _: nn.Identity()}
    pool = pools[c.pick(dict.fromkeys(pools, 1.0))](2)
    return nn.Sequential(nn.Conv2d(1, WIDTH, 2), *norm, activation(c), pool, nn.Flatten(2), Apply(lambda x: x.mT))


def recurrent(layer: type[nn.RNNBase], output: Callable[[Tensor, nn.Module], Tensor]) -> Callable[..., nn.Module]:
    """A recurrent stem; LSTMs are bidirectional, which has as many features with fewer parameters."""
    two = layer is nn.LSTM
    return lambda c: Apply(output, layer(2, WIDTH // (1 + two), batch_first=True, bidirectional=two))


def convolved(x: Tensor, edges: Tensor, layer: nn.Module) -> Tensor:
    h = torch.tanh(layer(x))
    return h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])


STEMS: dict[str, tuple[float, Callable[[Choices], nn.Module]]] = {
    "vectors": (6, lambda c: nn.Sequential(nn.Linear(3, WIDTH), activation(c))),
    "sequences": (2, lambda c: nn.Sequential(linear(), activation(c))),
    "images": (1.5, image_stem),
    "signals": (0.7, lambda c: nn.Sequential(nn.Conv1d(2, WIDTH, 2), activation(c), Apply(lambda x: x.mT))),
    "tokens": (2, tokens),
    "LSTM": (0.6, recurrent(nn.LSTM, lambda x, f: f(x)[0])),
    "GRU": (0.5, recurrent(nn.GRU, lambda x, f: f(x)[0])),
    "RNN": (0.4, recurrent(nn.RNN, lambda x, f: f(x)[0])),
    "PackedSequence": (0.4, recurrent(nn.RNN, lambda x, f: f(x)[1][-1])),
    "nested tensor": (0.4, recurrent(nn.RNN, lambda x, f: f(torch.nested.to_padded_tensor(x, 0.0))[0])),
    "graph": (0.8, lambda c: Apply(lambda x, f: convolved(*x, f), nn.Linear(3, WIDTH))),
}
SEQUENCES = ("sequences", "images", "signals", "tokens", "LSTM", "GRU", "RNN", "nested tensor")


def batchnorm(c: Choices, layer: Any) -> nn.Module:
    c.note("BatchNorm")
    with torch.no_grad():
        layer.running_mean.normal_(0, 0.3)
        layer.running_var.uniform_(0.5, 1.5)
    return layer


def mapped(maps: dict[str, tuple[modules.Map, modules.Map]]) -> Callable[[Choices], nn.Module]:
    """A linear layer and one of the functions."""

    def make(c: Choices) -> nn.Module:
        written, plain = maps[c.pick(dict.fromkeys(maps, 1.0))]
        return nn.Sequential(linear(), Apply(plain if c.plain else written))

    return make


def hooked(where: tuple[str, ...], edits: tuple[modules.Map | None, ...]) -> Callable[[Choices], nn.Module]:
    def make(c: Choices) -> nn.Module:
        hook = Hook(c.random.choice(edits))
        return modules.Hooked(WIDTH, c.random.choice(where), None if c.plain else hook)

    return make


def pruned(c: Choices) -> nn.Module:
    layer = linear()
    prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    return nn.Sequential(layer, activation(c))


def parametrized(c: Choices) -> nn.Module:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", modules.Positive())
    return layer


def encoder_layer(c: Choices) -> nn.Module:
    first, act = c.chance(0.5), c.random.choice(["relu", "gelu"])
    made = nn.TransformerEncoderLayer(WIDTH, 1, 1, 0.1, act, norm_first=first, batch_first=True)
    made.norm1.eps = made.norm2.eps = 0.1
    return made


def scripted(c: Choices) -> nn.Module:
    inner = nn.Sequential(linear(), nn.Tanh())
    return inner if c.plain else torch.jit.script(inner)


HOOKS = ("output", "weight", "module", "module, before")

# name -> (weight, the block)
BLOCKS: dict[str, tuple[float, Callable[[Choices], nn.Module]]] = {
    "Linear": (3, lambda c: nn.Sequential(linear(), activation(c))),
    "residual": (2, lambda c: Apply(lambda x, f: x + f(x), nn.Sequential(linear(), activation(c)))),
    "shared module": (1, lambda c: Apply(lambda x, f: torch.tanh(f(torch.tanh(f(x)))), linear())),
    "gate": (1, lambda c: Apply(lambda x, f: x * torch.sigmoid(f(x)), linear())),
    "Bilinear": (0.7, lambda c: Apply(lambda x, f: f(x, torch.tanh(x)), nn.Bilinear(WIDTH, WIDTH, WIDTH))),
    "LayerNorm": (1, lambda c: Apply(lambda x, f: f(x + F.pad(x[..., 1:] ** 2, (1, 0))), nn.LayerNorm(WIDTH, 0.1))),
    "RMSNorm": (1, lambda c: nn.RMSNorm(WIDTH, 0.1)),
    "ReZero": (1, lambda c: modules.ReZero(WIDTH)),
    "temperature": (1, lambda c: modules.Temperature()),
    "Dropout": (1, lambda c: nn.Sequential(nn.Dropout(0.5), linear())),
    "weight_norm": (0.2, lambda c: nn.utils.weight_norm(linear())),
    "weight_norm as a parametrization": (0.2, lambda c: parametrizations.weight_norm(linear())),
    "spectral_norm": (0.5, lambda c: nn.utils.spectral_norm(linear())),
    "spectral_norm as a parametrization": (0.5, lambda c: parametrizations.spectral_norm(linear())),
    "pruning": (0.8, pruned),
    "parametrization": (0.8, parametrized),
    "frozen layer": (0.8, lambda c: modules.BesideFrozen(WIDTH)),
    "LoRA": (0.8, lambda c: modules.LoRA(WIDTH, False, c.chance(0.4))),
    "merging LoRA": (0.8, lambda c: modules.LoRA(WIDTH, True, c.chance(0.4))),
    "module in TorchScript": (0.6, scripted),
    "checkpoint": (0.6, lambda c: modules.Checkpointed(WIDTH, False, c.plain)),
    "reentrant checkpoint": (0.3, lambda c: modules.Checkpointed(WIDTH, True, c.plain)),
    "experts": (0.7, lambda c: modules.Experts(WIDTH)),
    "changing buffers": (0.7, lambda c: modules.Counting(WIDTH)),
    "own generator": (0.4, lambda c: modules.Noisy(True, torch.float32)),
    "draws that depend on the dtype": (0.5, lambda c: modules.Noisy(True, c.compute if c.plain else None)),
    "random numbers": (0.3, lambda c: modules.Noisy(False, None, c.plain)),
    "looking hooks": (1.2, hooked((*HOOKS, "accumulated"), (None,))),
    "edits of gradients": (1.0, hooked(HOOKS, modules.EDITS)),
    "layer under no_grad": (0.6, lambda c: modules.WithoutGradients(WIDTH, c.chance(0.5), c.plain)),
    "sound map": (4, mapped(modules.SOUND)),
    "fault": (3, mapped(modules.FAULTS)),
}
OF_SEQUENCES: dict[str, tuple[float, Callable[[Choices], nn.Module]]] = {
    "attention": (3, lambda c: modules.Attention(WIDTH, c.chance(0.4), c.chance(0.5))),
    "encoder layer": (3, encoder_layer),
}
OF_ROWS: dict[str, tuple[float, Callable[[Choices], nn.Module]]] = {
    "GroupNorm": (1, lambda c: nn.GroupNorm(1, WIDTH, 0.1)),
    "BatchNorm": (2, lambda c: batchnorm(c, nn.BatchNorm1d(WIDTH, 0.1))),
}


def model(c: Choices, stem: nn.Module, source: str, classes: int) -> nn.Module:
    """The model on top of a stem."""
    sequences = source in SEQUENCES and "EmbeddingBag" not in c.kinds
    few = {"no block": 1.0, "one block": 3.0, "two blocks": 1.0}
    count = list(few).index(c.pick(few))
    blocks = [c.make(BLOCKS | (OF_SEQUENCES if sequences else OF_ROWS)) for _ in range(count)]
    if classes == VOCABULARY:
        c.note("tied weights")
    head = nn.Linear(WIDTH, classes, bias=classes != VOCABULARY)
    if classes == VOCABULARY:
        head.weight = stem[0].weight  # type: ignore[index]
    return nn.Sequential(stem, *blocks, modules.Pooled(), head)
