"""Write the counted part of docs/large_models.md from the shapes of Llama models on the meta device.

python -m docs._generate.large_models_page      # rewrite the part between the markers

No weight is allocated, no process but this one exists, and nothing is measured.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from blockhess.problem.blocks import partition
from blockhess.problem.memory import size_text, time_text
from blockhess.run.sharding import BANDWIDTH, block_bytes, block_traffic, sharding
from docs._generate.readme import ROOT, replaced

PAGE = ROOT / "docs" / "large_models.md"
NUM_STEPS = 30
ITEMSIZE = 4
# FLOPs of a gradient per parameter and token: a forward pass, and two passes back.
GRADIENT_FLOPS = 6


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model and the number of processes that hold it."""

    processes: int
    layers: int
    width: int
    mlp_width: int
    key_width: int
    vocabulary: int = 32_000


SHAPES = {"7B": Shape(8, 32, 4096, 11008, 4096), "70B": Shape(64, 80, 8192, 28672, 1024)}


def linear(into: int, out: int) -> nn.Linear:
    return nn.Linear(into, out, bias=False)


class Layer(nn.Module):
    """The parameters of a layer; it does not run."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, hidden, keys = shape.width, shape.mlp_width, shape.key_width
        self.q_proj, self.o_proj = linear(width, width), linear(width, width)
        self.k_proj, self.v_proj = linear(width, keys), linear(width, keys)
        self.gate_proj, self.up_proj, self.down_proj = (
            linear(width, hidden),
            linear(width, hidden),
            linear(hidden, width),
        )
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)


def llama(shape: Shape) -> nn.Module:
    """Return a model that has the parameters of a Llama model, on the meta device; it does not run."""
    with torch.device("meta"):
        parts = {
            "embed_tokens": nn.Embedding(shape.vocabulary, shape.width),
            "layers": nn.ModuleList(Layer(shape) for _ in range(shape.layers)),
            "norm": nn.RMSNorm(shape.width),
            "lm_head": linear(shape.width, shape.vocabulary),
        }
    return nn.Sequential(OrderedDict(parts))


@contextmanager
def processes(number: int) -> Iterator[None]:
    """Let this process be one of so many, which exchange nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def counts(shape: Shape) -> dict[str, str]:
    """Return what the plan counts for a model, by what it is."""
    with processes(shape.processes):
        model, mesh = llama(shape), dist.init_device_mesh("cpu", (shape.processes,))
        for layer in model.get_submodule("layers").children():
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)  # as the root is in training
        found, blocks = sharding(model), partition(model).blocks
        largest = max(blocks, key=lambda block: block.info.dim)
        size, total = largest.info.dim, sum(block.info.dim for block in blocks)
        steps = sum(min(NUM_STEPS, block.info.dim) for block in blocks)
        gathers = sum(min(NUM_STEPS, block.info.dim) * block_traffic(block) for block in blocks)
        sent = 2 * steps * found.gradient_traffic + gathers
        vectors = 3 * ITEMSIZE * size
        return {
            "parameters": f"{total:,}",
            "processes": f"{found.processes}",
            "wrapped modules, with the root": f"{found.modules}",
            "blocks, one per parameter": f"{len(blocks)}",
            "largest block": f"{largest.info.name}, {size:,}",
            "**memory of every process**": "",
            "its shards": size_text(found.shard_bytes),
            "their copy and gradients": size_text(2 * found.shard_bytes),
            "parameters and gradients gathered at a time": size_text(found.gathered_bytes),
            "gathered gradient of the largest block": size_text(block_bytes(largest, ITEMSIZE)),
            "three Lanczos vectors of the largest block": size_text(vectors),
            f"with reorthogonalization, {NUM_STEPS} steps": size_text(vectors + NUM_STEPS * ITEMSIZE * size),
            "**sent by every process**": "",
            "for a gradient of the model": size_text(found.gradient_traffic),
            "for the gather of the largest block": size_text(block_traffic(largest)),
            "for a product of the largest block": size_text(2 * found.gradient_traffic + block_traffic(largest)),
            f"the same at {BANDWIDTH / 1e9:.3g} GB/s": time_text(
                (2 * found.gradient_traffic + block_traffic(largest)) / BANDWIDTH
            ),
            f"**all blocks, one probe of {NUM_STEPS} steps**": "",
            "products for each batch": f"{steps:,}",
            "sent by every process": size_text(sent),
            f"the same at {BANDWIDTH / 1e9:.3g} GB/s, without computation": time_text(sent / BANDWIDTH),
            "FLOPs of every process for each token": f"{2 * GRADIENT_FLOPS * total * steps:.2g}",
        }


def counted_part() -> str:
    """Return the table of all models."""
    of = {name: counts(shape) for name, shape in SHAPES.items()}
    lines = [f"| float32 | {' | '.join(f'Llama {name}' for name in of)} |", f"|---|{'--:|' * len(of)}"]
    rows = list(zip(*(found.items() for found in of.values())))
    return "\n".join([*lines, *(f"| {row[0][0]} | {' | '.join(value for _, value in row)} |" for row in rows)])


def page(text: str) -> str:
    """Return the page with the counted part rewritten."""
    return replaced(text, "counted", counted_part())


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
