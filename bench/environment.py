"""What a benchmark result must say about where it was measured."""

from __future__ import annotations

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
    """The commit of this checkout, with "-dirty" where tracked files differ from it, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe() -> dict[str, str | int]:
    """Return CPU, thread count, operating system, versions and commit.

    Example:
        >>> sorted(describe())
        ['commit', 'cpu', 'os', 'python', 'threads', 'torch']
    """
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
