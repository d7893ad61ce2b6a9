"""What the device can do: copies of memory, and matrix products in float32, TF32 and bfloat16, by PyTorch.

    python -m bench.gpu.ceilings --out FILE [--device cpu] [--size tiny]

blockhess is not imported, so that this runs while it is being built.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.harness.command import write_json
from bench.harness.environment import describe_device
from bench.harness.machine import copy_bandwidth
from bench.harness.timing import measure

PRODUCTS = {
    "gemm float32": (torch.float32, "highest"),
    "gemm TF32": (torch.float32, "high"),
    "gemm bfloat16": (torch.bfloat16, "highest"),
}


def ceilings(device: torch.device, size: str) -> dict[str, float]:
    """Return bytes per second, read and written, of a copy, and FLOPs per second of products of square matrices."""
    found = {"copy": copy_bandwidth(device, {"full": 2**29, "quick": 2**28, "tiny": 2**14}[size])}
    n = {"full": 8192, "quick": 8192, "tiny": 64}[size]
    for name, (dtype, precision) in PRODUCTS.items():
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        times = measure(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds=2.0)  # type: ignore[misc]
        found[name] = 2 * n**3 / times.median
    torch.set_float32_matmul_precision("highest")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    options = parser.parse_args()
    device = torch.device(options.device)
    write_json({"environment": describe_device(device), "limits": ceilings(device, options.size)}, options.out)


if __name__ == "__main__":
    main()
