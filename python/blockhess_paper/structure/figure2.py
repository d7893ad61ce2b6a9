"""Figure 2: exact initial Hessians of Transformers with 1, 2 and 4 layers, and their block structure.

The paper's configuration (appendix C.2): context 2, 2 heads, width 4, MLP width 4, no LayerNorm, nanoGPT's
initialization, no biases, and the Hessian of the attention and MLP parameters on 4 consecutive tokens. Here the tokens
are characters of Shakespeare, not of OpenWebText. Three partitions are compared: one block per parameter tensor (the
paper's blocks elsewhere), the boxes of Figure 2 (query and key; value and projection; MLP), and layers.

In addition: exact Hessians of an MLP before and after training, by layer and by hidden unit (Figure 9 repeats that they
are near block-diagonal); and, beyond the paper, a GPT of 10.7M and a ResNet18 of 11M parameters, by estimated norms of
block pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockhess._text import format_table
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess.problem.batches import map_tensors
from blockhess.problem.blocks import ParameterSlice
from blockhess_paper.results import Claim, Result, new_figure, verdict
from blockhess_paper.structure.hessian import exact_hessian
from blockhess_paper.structure.pair_norms import PairNorms, estimate_pair_norms, exact_pair_norms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAYERS = (1, 2, 4)
NUM_TOKENS = 4

# "Near block-diagonal": at most this share of |H|_F^2 outside the blocks.
NEAR = 0.1

# Widths of the MLP on images of 7 x 7 pixels, and its training.
MLP_WIDTHS = (49, 16, 12, 10)
MLP_IMAGES, MLP_STEPS, MLP_RATE = 512, 300, 1e-2

# Entries below this share of the largest are plotted as 0.
FLOOR = 1e-4


def layer_of(name: str) -> str:
    """Return the layer of a GPT's parameter; a parameter outside the layers is its own group."""
    return f"layer {name.split('.')[1]}" if name.startswith("layers.") else name


def box_of(name: str) -> str:
    """Return the box of Figure 2: query and key, value and projection, or MLP of a layer."""
    if not name.startswith("layers."):
        return name
    part = "QK" if "query" in name or "key" in name else "VO" if "attn" in name else "MLP"
    return f"{layer_of(name)} {part}"


PARTITIONS: Mapping[str, Callable[[str], str]] = {"parameter": str, "box of Figure 2": box_of, "layer": layer_of}


def transformer_hessian(num_layers: int, seed: int, device: str = "cpu") -> tuple[Tensor, PairNorms]:
    """Return the exact Hessian of one of the small Transformers, and its pair norms by parameter."""
    text = shakespeare()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = GPTConfig(
            len(text.vocabulary), context=2, num_layers=num_layers, num_heads=2, width=4, mlp_width=4, layer_norm=False
        )
        model = GPT(size).double().to(device)
        start = int(torch.randint(len(text.tokens) - NUM_TOKENS, ()))
    tokens = text.tokens[start : start + NUM_TOKENS].to(device)
    windows = tokens.unfold(0, 3, 1)  # of 2 tokens and the one after
    names = [name for name, _ in model.named_parameters() if name.startswith("layers.")]
    batch = windows[:, :2].contiguous(), windows[:, 1:].contiguous()
    hessian, blocks = exact_hessian(model, batch, next_token_loss, blocks={name: name for name in names})
    return hessian, exact_pair_norms(hessian, blocks)


def mlp_hessians(seed: int, num_steps: int, device: str) -> dict[str, tuple[Tensor, PairNorms, PairNorms]]:
    """Return an MLP's Hessian before and after training, ordered by hidden unit, and its norms by unit and by layer."""
    images, labels = (tensor.to(device) for tensor in fashion_mnist(MLP_IMAGES))
    data = F.avg_pool2d(images, 4).flatten(1).double(), labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pairs = list(itertools.pairwise(MLP_WIDTHS))
        modules = [module for a, b in pairs for module in (nn.Linear(a, b), nn.Tanh())][:-1]
        model = nn.Sequential(*modules).double().to(device)
    loss = nn.CrossEntropyLoss()
    units = {
        f"layer {2 * l}, unit {unit}": [
            ParameterSlice(f"{2 * l}.weight", unit, unit + 1),
            ParameterSlice(f"{2 * l}.bias", unit, unit + 1),
        ]
        for l, width in enumerate(MLP_WIDTHS[1:])
        for unit in range(width)
    }

    def measured() -> tuple[Tensor, PairNorms, PairNorms]:
        hessian, blocks = exact_hessian(model, data, loss, blocks=units)
        by_unit = exact_pair_norms(hessian, blocks)
        return hessian, by_unit, by_unit.merged(lambda name: name.split(",")[0])

    found = {"MLP at initialization": measured()}
    optimizer = torch.optim.Adam(model.parameters(), lr=MLP_RATE)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss(model(data[0]), labels).backward()
        optimizer.step()
    found["MLP after training"] = measured()
    return found


def large_norms(seed: int, quick: bool, device: str) -> dict[str, PairNorms]:
    """Return estimated pair norms, by weight tensor, of GPT2-nano and ResNet18 at initialization.

    Of the GPT only attention and MLP weights are included, as in Figure 2.
    """
    text = shakespeare()
    images, labels = fashion_mnist(4 if quick else 32)
    images = F.interpolate(images, size=(56, 56), mode="bilinear")
    small = GPTConfig(len(text.vocabulary), context=16, num_layers=1, num_heads=2, width=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gpt = GPT(small if quick else GPTConfig(len(text.vocabulary)))
        resnet = ResNet(
            ResNetConfig(4 if quick else 64, (1, 1) if quick else (2, 2, 2, 2), num_classes=10, in_channels=1)
        )
    [window] = text.batches(batch_size=1, context=gpt.config.context, seed=seed)
    gpt, resnet = gpt.to(device), resnet.to(device)
    window, images, labels = map_tensors(lambda tensor: tensor.to(device), (window, images, labels))
    layers = {
        name: name for name, parameter in gpt.named_parameters() if name.startswith("layers.") and parameter.ndim > 1
    }
    weights = {name: name for name, parameter in resnet.named_parameters() if parameter.ndim > 1}
    loss = nn.CrossEntropyLoss()
    return {
        "GPT2-nano (10.7M)": estimate_pair_norms(gpt, window, next_token_loss, blocks=layers, seed=seed),
        "ResNet18 (11M)": estimate_pair_norms(resnet, (images, labels), loss, blocks=weights, seed=seed),
    }


def run(*, seed: int = 0, quick: bool = False, device: str = "cpu") -> Result:
    """Compute and plot the Hessians and measure their block structure.

    Args:
        seed: first of the seeds of weights and token positions; the figure shows the first.
        quick: one seed, tiny "large" models.
        device: of models and data.
    """
    seeds = range(seed, seed + (1 if quick else 10))
    rows, numbers, pictures = [], {}, []
    outside: dict[str, list[float]] = {}
    entries: dict[str, float] = {}

    def add(title: str, partition: str, norms: Sequence[PairNorms]) -> None:
        key, shares = f"{title}, {partition}", [norm.outside() for norm in norms]
        outside[key], entries[key] = shares, norms[0].entries_outside()
        numbers[key] = {"outside": shares, "entries_outside": entries[key]}
        mean = sum(shares) / len(shares)
        rows.append(
            [title, partition, f"{mean:.2g}", f"{min(shares):.2g}", f"{max(shares):.2g}", f"{entries[key]:.2f}"]
        )

    layer_pairs: list[list[float]] = []
    for num_layers in LAYERS:
        found = [transformer_hessian(num_layers, s, device) for s in seeds]
        title = f"{num_layers}-layer Transformer"
        for partition, group in PARTITIONS.items():
            add(title, partition, [norms.merged(group) for _, norms in found])
        layers = sum(norms.merged(layer_of).squares for _, norms in found)
        assert isinstance(layers, Tensor)
        layer_pairs = (layers / layers.sum()).tolist()
        boxes = [block.dim for block in found[0][1].merged(box_of).blocks]
        pictures.append((f"({'abc'[LAYERS.index(num_layers)]}) {title}", found[0][0], boxes))
    for title, (hessian, by_unit, by_layer) in mlp_hessians(seed, 5 if quick else MLP_STEPS, device).items():
        add(title, "hidden unit", [by_unit])
        add(title, "layer", [by_layer])
        pictures.append((title, hessian, [block.dim for block in by_layer.blocks]))
    for title, norms in large_norms(seed, quick, device).items():
        for partition, group in PARTITIONS.items() if title.startswith("GPT") else [("parameter", str)]:
            add(title, partition, [norms.merged(group)])

    def shares_of(keys: Sequence[str]) -> str:
        return ", ".join(f"{sum(v) / len(v):.2g} ({key.split(',')[0]})" for key in keys for v in [outside[key]])

    def near(keys: Sequence[str]) -> list[bool]:
        return [max(outside[key]) <= NEAR for key in keys]

    def better_than_chance(keys: Sequence[str]) -> list[bool]:
        return [max(outside[key]) <= entries[key] / 2 for key in keys]

    transformers = [f"{n}-layer Transformer" for n in LAYERS]
    boxed = [f"{title}, box of Figure 2" for title in transformers]
    plain = [f"{title}, parameter" for title in transformers]
    mlps = [f"MLP {when}, layer" for when in ("at initialization", "after training")]
    units = [f"MLP {when}, hidden unit" for when in ("at initialization", "after training")]
    large = ["GPT2-nano (10.7M), box of Figure 2", "GPT2-nano (10.7M), parameter", "ResNet18 (11M), parameter"]
    measure = "share of |H|_F^2 outside the blocks"
    claims = (
        Claim(
            "Figure 2: the Hessian is near block-diagonal in the boxes query and key, value and projection, MLP.",
            f"{measure}: {shares_of(boxed)}.",
            verdict(all(near(boxed)), any(near(boxed))),
        ),
        Claim(
            "Section 2.3: its principal blocks are the parameter blocks (query, key, value, ... each one).",
            f"{measure}: {shares_of(plain)}. Without LayerNorm and with weights near 0 the loss is nearly bilinear in "
            "query and key, value and projection, and the two MLP matrices: the curvature is between the two, not "
            "within either.",
            verdict(all(near(plain)), any(near(plain))),
        ),
        Claim(
            "Figure 9, from the literature: the Hessian of a trained MLP is near block-diagonal.",
            f"{measure}, by layer: {shares_of(mlps)}; by hidden unit: {shares_of(units)}.",
            verdict(all(near([mlps[1], units[1]])), any(better_than_chance([mlps[1], units[1]]))),
        ),
        Claim(
            "Section 2.3: near block-diagonal Hessians might be common (left open for larger models, appendix C.2).",
            f"{measure}: {outside[large[0]][0]:.2g} (GPT2-nano, boxes of Figure 2), {outside[large[1]][0]:.2g} "
            f"(GPT2-nano, parameters), {outside[large[2]][0]:.2g} (ResNet18, parameters).",
            verdict(all(near(large)), any(better_than_chance(large))),
        ),
    )
    return Result(
        "fig2",
        "Figure 2: block structure of exact Hessians",
        {"seed": seed, "seeds": len(seeds), "layers": LAYERS, "near": NEAR},
        claims,
        f"{measure}; entries: the share of entries there, what a Hessian without structure has\n"
        + format_table(["model", "blocks", "mean", "min", "max", "entries"], rows, left=2)
        + "\n\nshare of |H|_F^2 of every pair of layers, 4-layer Transformer\n"
        + format_table(
            ["layer", *map(str, range(LAYERS[-1]))],
            [[str(k), *(f"{share:.1e}" for share in row)] for k, row in enumerate(layer_pairs)],
        ),
        {**numbers, "layer pairs of the 4-layer Transformer": layer_pairs},
        {title: hessian.float() for title, hessian, _ in pictures},
        _draw(pictures),
    )


def _draw(pictures: Sequence[tuple[str, Tensor, list[int]]]) -> Figure:
    from matplotlib.colors import LogNorm

    figure = new_figure(4.2 * len(pictures), 4.4, dpi=80)
    panels = figure.subplots(1, len(pictures))
    for panel, (title, hessian, dims) in zip(panels, pictures):
        size = hessian.abs() / hessian.abs().max()
        image = panel.imshow(
            size.clamp(min=FLOOR).numpy(), cmap="magma", norm=LogNorm(FLOOR, 1.0), interpolation="nearest"
        )
        _boxes(panel, dims)
        panel.set_title(f"{title}\n{len(hessian)} parameters", fontsize="medium")
        panel.set_xticks([])
        panel.set_yticks([])
    figure.colorbar(image, ax=panels, shrink=0.8, label="|entry| over the largest")
    figure.suptitle(
        "Boxes: query and key, value and projection, MLP of every layer (a-c); layers, ordered by hidden unit (MLP)",
        fontsize="medium",
    )
    return figure


def _boxes(panel: Axes, dims: Sequence[int]) -> None:
    from matplotlib.patches import Rectangle

    start = 0
    for dim in dims:
        panel.add_patch(Rectangle((start - 0.5, start - 0.5), dim, dim, fill=False, edgecolor="#6baed6", linewidth=1.2))
        start += dim
