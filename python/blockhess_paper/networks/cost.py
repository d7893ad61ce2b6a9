"""What the paper's six jobs take at its size: Figure 4's blocks, its batches, 10 probes of 100 steps.

Products, operations and memory are counted on torch's meta device, where nothing is computed:

    FLOPs = sum_l count_l FLOPs(H_l v) + steps * FLOPs(gradient, with its graph)       over all parts of the batch

count_l is probes * steps, or dim_l where writing the block out takes less. The products are the autograd engine's.
BatchNorm is in eval mode: where table1, fig3 and fig4 measure batch statistics too, they take this twice. Time
on the device at hand is FLOPs over the rate of a few products, measured there on a small batch. Time on an H100, which
is not at hand, is FLOPs over a share of its peak that is assumed: extrapolated, unproven on hardware. Lanczos steps
beside the products are left out.

Source: the paper's appendix C.1 for batches and GPU days, which count the full Hessian's spectrum too.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blockhess._text import format_table
from blockhess.hvp.autograd import AutogradEngine
from blockhess.hvp.exact import is_cheaper_exact
from blockhess.models import next_token_loss
from blockhess.problem.batches import tensors
from blockhess.problem.blocks import partition
from blockhess.problem.memory import size_text, time_text
from blockhess.problem.model_state import has_batchnorm
from blockhess.problem.prepare import prepared_problem
from blockhess.run.forecast import product_seconds
from blockhess_ext.slq import reorthogonalization_modes
from blockhess_paper.models import CONFIGS, masked_pair_loss, named
from blockhess_paper.models.bert import MaskedPairs
from blockhess_paper.networks.initial_spectra import EFFORTS
from blockhess_paper.networks.networks import IMAGES, IMAGES_AT_ONCE, NETWORKS, TOKENS, TOKENS_AT_ONCE, Selection

FLOAT32_BYTES = 4

# Peak of an H100 SXM, FLOP/s without sparsity, from NVIDIA's data sheet; and the share of it that is assumed.
H100_PEAK = {"float32": 67e12, "TF32": 494.7e12}
ASSUMED_SHARE = 0.4

HOUR = 3600.0

# What this project wants to reach on an H100: precision -> seconds; TF32 where no precision is named.
TARGETS: Mapping[str, Mapping[str, float]] = {
    "resnet18": {"TF32": HOUR},
    "vgg16": {"TF32": HOUR},
    "vit-base": {"TF32": HOUR},
    "bert": {"TF32": HOUR},
    "gpt2-nano": {"TF32": HOUR / 4},
    "gpt2": {"TF32": 3 * HOUR, "float32": 14 * HOUR},
}

# What the paper took: seconds on which GPU.
PAPER = {
    "resnet18": (72 * HOUR, "V100"),
    "vgg16": (72 * HOUR, "V100"),
    "vit-base": (72 * HOUR, "V100"),
    "bert": (12 * HOUR, "V100"),
    "gpt2-nano": (12 * HOUR, "V100"),
    "gpt2": (168 * HOUR, "A100"),
}

# Of text, what is measured at most on the device at hand, and of how many blocks.
MEASURED_TOKENS, MEASURED_BLOCKS = 256, 3


@dataclass(frozen=True)
class Cost:
    """What a batch of some shape takes, counted.

    Attributes:
        dims: of the blocks.
        parameters: of the model.
        products: FLOPs of one product with each block.
        gradient: FLOPs of the loss and its gradient, with the gradient's graph.
        graph_bytes: that this graph holds, beside model and batch.
    """

    dims: tuple[int, ...]
    parameters: int
    products: tuple[int, ...]
    gradient: int
    graph_bytes: int


@dataclass(frozen=True)
class Work:
    """One of the paper's jobs.

    Attributes:
        name, title: of the network.
        blocks, block_parameters, parameters: how many blocks, parameters in them, and in all.
        batch: in words. parts: into which it is cut, so that one graph holds each.
        products: with one block, vector and part.
        flops: of all of them.
        vector_bytes: of all probes at once, with the kept basis. graph_bytes: of one part's graph.
        rate: FLOP/s measured on the device at hand, None where nothing was measured.
    """

    name: str
    title: str
    blocks: int
    block_parameters: int
    parameters: int
    batch: str
    parts: int
    products: int
    flops: float
    vector_bytes: int
    graph_bytes: int
    rate: float | None = None

    def shares_needed(self) -> dict[str, float]:
        """Precision -> share of an H100's peak that the target asks for."""
        return {kind: self.flops / seconds / H100_PEAK[kind] for kind, seconds in TARGETS[self.name].items()}

    def record(self, gflops: float | None) -> dict[str, Any]:
        """JSON values, with seconds here, on an H100 or at so many GFLOP/s, wanted and in the paper."""
        seconds, gpu = PAPER[self.name]
        return {
            **dataclasses.asdict(self),
            "seconds_here": None if self.rate is None else self.flops / self.rate,
            "seconds_extrapolated": {kind: self.flops / rate for kind, rate in _rates(gflops).items()},
            "seconds_wanted_on_h100": dict(TARGETS[self.name]),
            "share_of_peak_needed": self.shares_needed(),
            "seconds_in_the_paper": {gpu: seconds},
        }


def _rates(gflops: float | None) -> dict[str, float]:
    if gflops is not None:
        return {f"{gflops:g} GFLOP/s": gflops * 1e9}
    return {f"H100, {kind}": ASSUMED_SHARE * peak for kind, peak in H100_PEAK.items()}


def _policies(works: Sequence[Work]) -> list[str]:
    """A line about the networks that have BatchNorm, if any."""
    with torch.device("meta"):
        titles = [work.title for work in works if has_batchnorm(named(work.name))]
    if not titles:
        return []
    return [f"{', '.join(titles)}: BatchNorm in eval mode; table1, fig3 and fig4 add batch statistics: twice as much."]


def _image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    return nn.functional.cross_entropy(model(batch[0]), batch[1]), float(len(batch[1]))


def sample_batch(name: str, samples: int, tokens: int | None = None) -> tuple[Any, Any]:
    """Return a batch of ones of a network's shape, on torch's default device, and the loss.

    Args:
        name: of NETWORKS.
        samples: images, windows or sentence pairs.
        tokens: of each, at most the model's context.
    """
    config = CONFIGS[name][1]
    if name in TOKENS:
        text = torch.ones(samples, min(tokens or config.context, config.context), dtype=torch.int64)
        if name == "bert":
            return MaskedPairs(text, text, text, text[:, 0]), masked_pair_loss
        return (text, text), next_token_loss
    return (torch.ones(samples, 3, 224, 224), torch.ones(samples, dtype=torch.int64)), _image_loss


def counted(name: str, samples: int, tokens: int | None = None) -> Cost:
    """Count what a batch takes; nothing is computed.

    Example:
        >>> counted("resnet18", 2).parameters
        11689512
    """
    held: dict[int, Tensor] = {}

    def hold(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.device("meta"):
        model: Any = named(name).eval()
        batch, loss_fn = sample_batch(name, samples, tokens)
        cut = partition(model, model.paper_blocks(figure=True))
        parameters = [piece.tensor for block in cut.blocks for piece in block.pieces]
        with (
            sdpa_kernel(SDPBackend.MATH),
            saved_tensors_hooks(hold, lambda tensor: tensor),
            FlopCounterMode(display=False) as gradient,
        ):
            loss, _ = loss_fn(model, batch)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        products = []
        for g, parameter in zip(gradients, parameters):
            with FlopCounterMode(display=False) as product:
                torch.autograd.grad(g, parameter, torch.zeros_like(parameter), retain_graph=True)
            products.append(product.get_total_flops())
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *tensors(batch))}
    graph_bytes = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)
    dims = tuple(parameter.numel() for parameter in parameters)
    whole = sum(p.numel() for p in model.parameters())
    return Cost(dims, whole, tuple(products), gradient.get_total_flops(), graph_bytes)


def work(name: str) -> Work:
    """Return what a network's job takes, counted."""
    effort = EFFORTS["paper"]
    if name in TOKENS:
        context = CONFIGS[name][1].context
        samples, together, batch = TOKENS[name] // context, TOKENS_AT_ONCE // context, f"{TOKENS[name]:,} tokens"
    else:
        samples, together, batch = IMAGES, IMAGES_AT_ONCE, f"{IMAGES:,} images"
    cost = counted(name, together)
    parts = -(-samples // together)
    counts = [
        dim if is_cheaper_exact(dim, effort.num_probes, effort.num_steps)
        else effort.num_probes * min(dim, effort.num_steps)
        for dim in cost.dims
    ]  # fmt: skip
    whole = sum(n * flops for n, flops in zip(counts, cost.products)) + effort.num_steps * cost.gradient
    vectors = effort.num_probes * FLOAT32_BYTES
    words = reorthogonalization_modes("auto", list(cost.dims), effort.num_steps, bytes_per_element=vectors)
    kept = [effort.num_steps * dim for dim, word in zip(cost.dims, words) if word not in ("none", "exact")]
    return Work(
        name=name,
        title=NETWORKS[name][0],
        blocks=len(cost.dims),
        block_parameters=sum(cost.dims),
        parameters=cost.parameters,
        batch=batch,
        parts=parts,
        products=parts * sum(counts),
        flops=samples / together * whole,
        vector_bytes=vectors * (3 * sum(cost.dims) + sum(kept)),
        graph_bytes=cost.graph_bytes,
    )


def measured_rate(
    name: str, device: torch.device, precision: str = "highest", clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the FLOP/s of products with the first, a middle and the last block, measured on a small batch."""
    model: Any = named(name).to(device)
    with device:
        batch, loss_fn = sample_batch(name, 1, MEASURED_TOKENS)
    blocks = model.paper_blocks(figure=True)
    with prepared_problem(model, batch, loss_fn, blocks, "eval", None, None, precision) as (problem, *_):
        last = len(problem.dims) - 1
        numbers = sorted({last * i // (MEASURED_BLOCKS - 1) for i in range(MEASURED_BLOCKS)})
        seconds = product_seconds(problem, AutogradEngine(problem, retain=True), clock, numbers)
    cost = counted(name, 1, MEASURED_TOKENS)
    return sum(cost.products[number] for number in numbers) / sum(seconds)


def plans(selection: Selection, *, measure: bool, clock: Callable[[], float] = time.perf_counter) -> list[Work]:
    """Return what the jobs take.

    Args:
        selection: of the networks; and the device and precision in which a few products are measured.
        measure: whether they are.
        clock: in seconds; time.process_time where others use the machine.
    """
    found = []
    for name in selection.of(NETWORKS, "plan"):
        job = work(name)
        if measure:
            rate = measured_rate(name, torch.device(selection.device), selection.precision, clock)
            job = dataclasses.replace(job, rate=rate)
        found.append(job)
    return found


def as_records(works: Sequence[Work], gflops: float | None = None) -> dict[str, Any]:
    """Return the jobs as JSON values, with what was assumed of a device that is not at hand."""
    assumed = {"share of peak": ASSUMED_SHARE, "peak FLOP/s": H100_PEAK} if gflops is None else {"GFLOP/s": gflops}
    return {
        "jobs": [work.record(gflops) for work in works],
        "extrapolated, unproven on hardware": assumed,
    }


def told(works: Sequence[Work], device: str, gflops: float | None) -> str:
    """Return both tables, what it takes and how long, in words that keep measured and extrapolated apart."""
    takes = [
        [
            w.title,
            str(w.blocks),
            f"{w.block_parameters / 1e6:.1f}M of {w.parameters / 1e6:.1f}M",
            w.batch,
            str(w.parts),
            f"{w.products:,}",
            f"{w.flops:.2g}",
            size_text(w.vector_bytes),
            size_text(w.graph_bytes),
        ]
        for w in works
    ]
    rates = _rates(gflops)
    lasts = []
    for w in works:
        seconds, gpu = PAPER[w.name]
        here = "-" if w.rate is None else f"{time_text(w.flops / w.rate)} ({w.rate / 1e9:.3g} GFLOP/s)"
        wanted = ", ".join(f"{time_text(s)} {kind}" for kind, s in TARGETS[w.name].items())
        needed = ", ".join(f"{100 * share:.0f} %" for share in w.shares_needed().values())
        lasts.append(
            [
                w.title,
                here,
                *(time_text(w.flops / rate) for rate in rates.values()),
                wanted,
                needed,
                f"{time_text(seconds)} {gpu}",
            ]
        )
    effort = EFFORTS["paper"]
    header = ["network", "blocks", "parameters", "batch", "parts", "products", "FLOPs", "vectors", "graph of a part"]
    basis = "the rate given" if gflops is not None else f"{100 * ASSUMED_SHARE:g} % of its peak, an assumption"
    return "\n".join(
        [
            f"The paper's jobs: {effort.num_probes} probes of {effort.num_steps} steps, counted",
            format_table(header, takes),
            *_policies(works),
            "",
            f"How long on {device}: by the rate of a few products, measured. {', '.join(rates)}: extrapolated, by",
            f"{basis}; unproven on hardware. Nobody has run these jobs at full size yet.",
            "Needed: the share of an H100's peak that what is wanted takes. The paper's includes the full Hessian's.",
            format_table(
                ["network", f"here, {device}", *(f"{kind}, extrapolated" for kind in rates), "wanted on H100",
                 "needed", "the paper's"],
                lasts,
            ),
        ]
    )  # fmt: skip
