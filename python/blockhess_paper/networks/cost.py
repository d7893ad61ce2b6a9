"""Cost of the paper's six jobs at full size: blocks of Figure 4, the paper's batches, 10 probes of 100 steps.

Products, FLOPs and memory are counted on torch's meta device, where nothing is computed:

    FLOPs = sum_l count_l FLOPs(H_l v) + steps * FLOPs(gradient with its graph)       over all parts of the batch

count_l is probes * steps, or dim_l where forming the block exactly is cheaper. Products are those of the autograd
engine, with BatchNorm in eval mode; table1, fig3 and fig4 also compute batch statistics, at twice the cost.
The time on a local device is FLOPs over the rate of a few products, timed on a small batch. The time on an H100 is
FLOPs over an assumed share of its peak: extrapolated, not measured. The Lanczos recurrences are not counted.

Source: the paper's appendix C.1 for batches and GPU days, which include the spectrum of the full Hessian.
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

# Peak FLOP/s of an H100 SXM without sparsity, from NVIDIA's data sheet, and the assumed share of it.
H100_PEAK = {"float32": 67e12, "TF32": 494.7e12}
ASSUMED_SHARE = 0.4

HOUR = 3600.0

# Targets on an H100: precision -> seconds.
TARGETS: Mapping[str, Mapping[str, float]] = {
    "resnet18": {"TF32": HOUR},
    "vgg16": {"TF32": HOUR},
    "vit-base": {"TF32": HOUR},
    "bert": {"TF32": HOUR},
    "gpt2-nano": {"TF32": HOUR / 4},
    "gpt2": {"TF32": 3 * HOUR, "float32": 14 * HOUR},
}

# The paper's jobs: seconds, GPU.
PAPER = {
    "resnet18": (72 * HOUR, "V100"),
    "vgg16": (72 * HOUR, "V100"),
    "vit-base": (72 * HOUR, "V100"),
    "bert": (12 * HOUR, "V100"),
    "gpt2-nano": (12 * HOUR, "V100"),
    "gpt2": (168 * HOUR, "A100"),
}

# Products are timed with at most so many tokens of text, and so many blocks.
MEASURED_TOKENS, MEASURED_BLOCKS = 256, 3


@dataclass(frozen=True)
class BatchCost:
    """Counted cost of a batch.

    Attributes:
        dims: sizes of the blocks.
        parameters: parameters of the model.
        products: FLOPs of one product with each block.
        gradient: FLOPs of the loss and its differentiable gradient.
        graph_bytes: memory of the gradient's graph, without model and batch.
    """

    dims: tuple[int, ...]
    parameters: int
    products: tuple[int, ...]
    gradient: int
    graph_bytes: int


@dataclass(frozen=True)
class JobCost:
    """Cost of one of the paper's jobs.

    Attributes:
        name, title: name and title of the network.
        blocks, block_parameters, parameters: number of blocks, of parameters in blocks and of all parameters.
        batch: description of the batch.
        parts: number of parts of the batch, each small enough for one graph.
        products: number of products of one block with one vector on one part.
        flops: FLOPs of all products.
        vector_bytes: memory of the vectors of all probes, with the stored Krylov basis.
        graph_bytes: memory of the graph of one part.
        rate: FLOP/s measured on the local device, None if not measured.
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
        """Return precision -> share of the peak of an H100 that the target requires."""
        return {kind: self.flops / seconds / H100_PEAK[kind] for kind, seconds in TARGETS[self.name].items()}

    def to_dict(self, gflops: float | None) -> dict[str, Any]:
        """Return costs and times (here, extrapolated, target, paper) as JSON values."""
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


def _policies(jobs: Sequence[JobCost]) -> list[str]:
    """Return a line on the networks with BatchNorm, if any."""
    with torch.device("meta"):
        titles = [work.title for work in jobs if has_batchnorm(named(work.name))]
    if not titles:
        return []
    return [f"{', '.join(titles)}: BatchNorm in eval mode; table1, fig3 and fig4 add batch statistics: twice as much."]


def _image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    return nn.functional.cross_entropy(model(batch[0]), batch[1]), float(len(batch[1]))


def sample_batch(name: str, samples: int, tokens: int | None = None) -> tuple[Any, Any]:
    """Return a batch of ones of a network's shape, on torch's default device, and the loss.

    Args:
        name: a key of NETWORKS.
        samples: number of images, windows or sentence pairs.
        tokens: tokens per sample, at most the context of the model.
    """
    config = CONFIGS[name][1]
    if name in TOKENS:
        text = torch.ones(samples, min(tokens or config.context, config.context), dtype=torch.int64)
        if name == "bert":
            return MaskedPairs(text, text, text, text[:, 0]), masked_pair_loss
        return (text, text), next_token_loss
    return (torch.ones(samples, 3, 224, 224), torch.ones(samples, dtype=torch.int64)), _image_loss


def count_cost(name: str, samples: int, tokens: int | None = None) -> BatchCost:
    """Count the cost of a batch without computing anything.

    Example:
        >>> count_cost("resnet18", 2).parameters
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
    return BatchCost(dims, whole, tuple(products), gradient.get_total_flops(), graph_bytes)


def job_cost(name: str) -> JobCost:
    """Return the counted cost of the job of a network."""
    effort = EFFORTS["paper"]
    if name in TOKENS:
        context = CONFIGS[name][1].context
        samples, together, batch = TOKENS[name] // context, TOKENS_AT_ONCE // context, f"{TOKENS[name]:,} tokens"
    else:
        samples, together, batch = IMAGES, IMAGES_AT_ONCE, f"{IMAGES:,} images"
    cost = count_cost(name, together)
    parts = -(-samples // together)
    counts = [
        dim if is_cheaper_exact(dim, effort.num_probes, effort.num_steps)
        else effort.num_probes * min(dim, effort.num_steps)
        for dim in cost.dims
    ]  # fmt: skip
    whole = sum(n * flops for n, flops in zip(counts, cost.products)) + effort.num_steps * cost.gradient
    vectors = effort.num_probes * FLOAT32_BYTES
    modes = reorthogonalization_modes("auto", list(cost.dims), effort.num_steps, bytes_per_element=vectors)
    stored = [effort.num_steps * dim for dim, mode in zip(cost.dims, modes) if mode not in ("none", "exact")]
    return JobCost(
        name=name,
        title=NETWORKS[name][0],
        blocks=len(cost.dims),
        block_parameters=sum(cost.dims),
        parameters=cost.parameters,
        batch=batch,
        parts=parts,
        products=parts * sum(counts),
        flops=samples / together * whole,
        vector_bytes=vectors * (3 * sum(cost.dims) + sum(stored)),
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
    cost = count_cost(name, 1, MEASURED_TOKENS)
    return sum(cost.products[number] for number in numbers) / sum(seconds)


def plans(selection: Selection, *, measure: bool, clock: Callable[[], float] = time.perf_counter) -> list[JobCost]:
    """Return the costs of the jobs.

    Args:
        selection: the networks; device and precision of the timed products.
        measure: whether products are timed.
        clock: returns seconds; time.process_time on a busy machine.
    """
    found = []
    for name in selection.of(NETWORKS, "plan"):
        job = job_cost(name)
        if measure:
            rate = measured_rate(name, torch.device(selection.device), selection.precision, clock)
            job = dataclasses.replace(job, rate=rate)
        found.append(job)
    return found


def plans_to_dict(jobs: Sequence[JobCost], gflops: float | None = None) -> dict[str, Any]:
    """Return the jobs and the assumptions on the extrapolated device as JSON values."""
    assumed = {"share of peak": ASSUMED_SHARE, "peak FLOP/s": H100_PEAK} if gflops is None else {"GFLOP/s": gflops}
    return {
        "jobs": [job.to_dict(gflops) for job in jobs],
        "extrapolated, unproven on hardware": assumed,
    }


def format_plans(jobs: Sequence[JobCost], device: str, gflops: float | None) -> str:
    """Return tables of costs and times as text; measured and extrapolated times are labeled."""
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
        for w in jobs
    ]
    rates = _rates(gflops)
    lasts = []
    for w in jobs:
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
    basis = "the given rate" if gflops is not None else f"{100 * ASSUMED_SHARE:g} % of its peak, assumed"
    return "\n".join(
        [
            f"The paper's jobs, counted: {effort.num_probes} probes of {effort.num_steps} steps",
            format_table(header, takes),
            *_policies(jobs),
            "",
            f"Time on {device}: from the measured rate of a few products. {', '.join(rates)}: extrapolated with",
            f"{basis}; unproven on hardware. No job has been run at full size.",
            "Share: of the peak of an H100, needed to reach the target. The paper's times include the full Hessian.",
            format_table(
                ["network", f"here, {device}", *(f"{kind}, extrapolated" for kind in rates), "target on H100",
                 "share", "the paper"],
                lasts,
            ),
        ]
    )  # fmt: skip
