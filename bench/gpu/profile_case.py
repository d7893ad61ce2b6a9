"""Run lanczos_step, reorthogonalize and tridiag_quadrature once, at sizes that fill a GPU, to be profiled by ncu.

    ncu --kernel-name regex:NAMES --launch-count COUNT python -m bench.gpu.profile_case [--device cpu] [--size tiny]

Profiling repeats every launch, so vectors have 1e8 elements in all, a tenth of those in the speed table.
"""

from __future__ import annotations

import argparse

import torch

from bench.harness.machine import Machine
from bench.harness.timing import synchronize
from bench.ops.step import Projection, Step, random_tridiagonals


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    options = parser.parse_args()
    machine = Machine(torch.device(options.device), options.size, {})
    Step.of(machine, [machine.pick(2_500_000, 2_500_000, 500)] * 4, n_probes=10).run()
    Projection.of(machine, [machine.pick(25_000, 25_000, 500)] * 4, machine.pick(100, 100, 12), n_probes=10).run()
    problems = random_tridiagonals(machine, machine.pick(10_000, 10_000, 20), machine.pick(100, 100, 12))
    torch.ops.blockhess_ext.tridiag_quadrature(*problems)
    synchronize(machine.device)


if __name__ == "__main__":
    main()
