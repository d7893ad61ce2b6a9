"""Run all ops once on small ragged batches and compare them with the CPU implementation, for compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 86 python -m tests.gpu.sanitizer_case

Tensors are created on the CPU and copied, so that few other kernels run. Without torch's cache every tensor has an
allocation of its own, so that any access beyond it is an error. `--cpu` runs without a GPU.
"""

from __future__ import annotations

import argparse
import sys

import torch

from blockhess_ext import ops
from blockhess_ext.layout import Layout
from tests.gpu.cases import SHORT, combinations, density_arguments, projection, shifted, state, step_case, tridiagonals
from tests.gpu.device import assert_near, on

# Blocks of one tile with odd tails, and one of more than a tile.
DIMS = (*SHORT, 32_771)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    device = "cpu" if parser.parse_args().cpu else "cuda"
    for dtype in (torch.float32, torch.float64):
        rtol = 32 * torch.finfo(dtype).eps
        for by in (0, 1):
            case, expected_case = on(device, step_case(dtype, DIMS)), step_case(dtype, DIMS)
            case = shifted(case, by) if by else case
            for each in (case, expected_case):
                ops.lanczos_step(*each.arguments())
            assert_near(state(case), state(expected_case), rtol)
        start = projection(dtype, DIMS, 9, 10)
        moved = on(device, start)
        for each in (moved, start):
            each.run(ops)
        assert_near(moved.results(), start.results(), rtol)
        for by in (0, 1):
            for combination, expected in zip(combinations(dtype, device, by), combinations(dtype)):
                assert_near([combination.after(ops)], [expected.after(ops)], 64 * rtol)
        for distribution in ops.DISTRIBUTIONS:
            made = []
            for where in (device, "cpu"):
                layout = Layout.of(DIMS, where)
                ids = torch.arange(len(DIMS)).to(where)
                made.append(ops.random_probes(layout, 2, seed=1, block_ids=ids, distribution=distribution, dtype=dtype))
            assert_near(made[:1], made[1:], 64 * torch.finfo(dtype).eps)
    for m in (1, 40):
        problems = tridiagonals(m)
        nodes, _ = torch.ops.blockhess_ext.tridiag_quadrature(*on(device, problems))
        expected, _ = ops.tridiag_quadrature(*problems)
        scale = expected.abs().amax(1, keepdim=True).clamp(min=1e-300)
        assert_near([nodes.cpu() / scale], [expected / scale], 8 * m * torch.finfo(torch.float64).eps)
    arguments = density_arguments()
    sigma = arguments[-1][:, None]
    got = ops.gaussian_density(*on(device, arguments)).cpu()
    assert_near([got * sigma], [ops.gaussian_density(*arguments) * sigma], 1e-12)
    print(f"all ops on {device} equal the CPU implementation")


if __name__ == "__main__":
    sys.exit(main())
