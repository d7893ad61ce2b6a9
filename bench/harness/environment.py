"""The environment of a measurement: machine, versions and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Name of a package that is compared -> its distribution.
PEERS = {
    "hessian-eigenthings": "hessian-eigenthings",
    "curvlinops": "curvlinops-for-pytorch",
    "PyHessian": "PyHessian",
    "imate": "imate",
    "matfree": "matfree",
    "jax": "jax",
}


def _output(*command: str) -> str:
    """Return the standard output of a command, or "unknown" if it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Return the commit of this checkout, with "-dirty" if tracked files were modified, or "unknown".

    The environment variable BLOCKHESS_COMMIT takes precedence, for copies of the sources without git.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return os.environ.get("BLOCKHESS_COMMIT") or _output(*command)


def describe() -> dict[str, str | int]:
    """Return CPU, cores, number of threads, operating system, versions and commit.

    Example:
        >>> sorted(describe())
        ['commit', 'cores', 'cpu', 'os', 'python', 'threads', 'torch']
    """
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }


def describe_device(device: torch.device) -> dict[str, str | int]:
    """Return the result of `describe` and, for a GPU, its name, memory, multiprocessors, driver and CUDA version."""
    if device.type == "cpu":
        return {"device": "cpu", **describe()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_mib": properties.total_memory // 2**20,
        "multiprocessors": properties.multi_processor_count,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "cuda": torch.version.cuda or "none",
        **describe(),
    }


def peers() -> dict[str, str]:
    """Return the version of every package that is compared, or "absent"."""
    versions = {}
    for name, distribution in PEERS.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def one_line(environment: Mapping[str, Any]) -> str:
    """Return an environment, or versions, as text."""
    return ", ".join(f"{name} {value}" for name, value in environment.items())
