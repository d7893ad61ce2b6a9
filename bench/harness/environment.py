"""What a benchmark result must say about where it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit of this checkout, with "-dirty" where tracked files differ from it, or "unknown".

    A copy of the sources without their history is told by BLOCKHESS_COMMIT.
    """
    if told := os.environ.get("BLOCKHESS_COMMIT"):
        return told
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> dict[str, str | int]:
    """Return CPU, cores and threads in use, operating system, versions and commit.

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


# Name of a peer -> how its distribution is called.
PEERS = {
    "hessian-eigenthings": "hessian-eigenthings",
    "curvlinops": "curvlinops-for-pytorch",
    "PyHessian": "PyHessian",
    "imate": "imate",
    "matfree": "matfree",
    "jax": "jax",
}


def peers() -> dict[str, str]:
    """The versions of the peers."""
    found = {}
    for name, distribution in PEERS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def describe_device(device: torch.device) -> dict[str, str | int]:
    """Return what `describe` does, and for a GPU its name, memory, driver, CUDA and multiprocessors."""
    if device.type == "cpu":
        return {"device": "cpu", **describe()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "memory_mib": properties.total_memory // 2**20,
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda or "none",
        **describe(),
    }
