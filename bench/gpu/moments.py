"""Make the float64 moments of GPT2-nano with which results of a GPU are compared, on a CPU in some minutes.

    python -m bench.gpu.moments        writes bench/gpu/nano_moments.json

For the first probe v of every block: alpha = v^T H v and beta = |H v - alpha v|.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

import blockhess
from bench.gpu import networks
from bench.gpu.networks import Network
from bench.harness.command import write_json
from bench.harness.machine import Machine
from bench.harness.timing import CPU, check
from blockhess.spectra import Spectra

FILE = Path(__file__).with_name("nano_moments.json")
ROUNDING = 1e-5  # of sums over weights in float32


def of_result(spectra: Spectra) -> dict[str, list[float]]:
    """Return block -> [alpha, beta] of the first step of the first probe."""
    q = spectra.quadrature
    return {name: [float(x[0, l, 0]) for x in (q.alpha, q.beta)] for l, name in enumerate(spectra.names)}


def reference(machine: Machine) -> dict[str, list[float]]:
    """Compute the moments in float64 by autograd on the CPU."""
    network = networks.nano(Machine(CPU, machine.size, {}), torch.float64)
    options: dict[str, Any] = {"engine": "autograd", "num_probes": 1, "num_steps": 1, "reorthogonalize": "none"}
    return of_result(blockhess.spectrum(**network.arguments(), **options, progress=False))


def expected(machine: Machine, network: Network) -> dict[str, list[float]]:
    """Return the moments of the file, after checking that it was made with these weights and data, or compute them.

    They are computed at size "tiny".
    """
    if machine.size == "tiny":
        return reference(machine)
    stored = json.loads(FILE.read_text())
    for a, b in zip(network.fingerprint(), stored["fingerprint"], strict=True):
        check(f"a sum over weights or data, {a:g}, relative to that of {FILE.name},", abs(a - b) / abs(b), ROUNDING)
    moments: dict[str, list[float]] = stored["moments"]
    return moments


def sizes(moments: dict[str, list[float]]) -> dict[str, float]:
    """Return block -> |H v| and 1e-3 of the largest one, to which errors are relative.

    Rounding in products of a small block is that of larger numbers.
    """
    norms = {name: math.hypot(alpha, beta) for name, (alpha, beta) in moments.items()}
    least = 1e-3 * max(norms.values())
    return {name: norm + least for name, norm in norms.items()}


def error(found: dict[str, list[float]], exact: dict[str, list[float]]) -> float:
    """Return the largest error of alpha and beta of a block, relative to `sizes`."""
    return max(sum(abs(x - y) for x, y in zip(found[name], exact[name])) / size for name, size in sizes(exact).items())


if __name__ == "__main__":
    machine = Machine(CPU, "full", {})
    made = {"fingerprint": networks.nano(machine, torch.float64).fingerprint(), "moments": reference(machine)}
    write_json(made, FILE)
