"""The stand-in for the CUDA runtime detects every kind of mistake, each planted in a kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.cuda_on_cpu import emulator
from tests.cuda_on_cpu.emulator import COMPILER, ORDERS, ROOT, Emulator

pytestmark = pytest.mark.skipif(emulator.obstacle() is not None, reason=str(emulator.obstacle()))

NONE, READ_BEYOND, WRITE_BEYOND, EARLY_RETURN, TWO_BARRIERS, MISSING_BARRIER, MISSING_LANE, UNSET, EARLY_REUSE = range(
    -1, 8
)


def sums(mistake: int, order: str = "forward") -> torch.Tensor:
    """Return the sum of 64 numbers as computed by each of 64 threads."""
    numbers = torch.arange(64, dtype=torch.float64)
    out = torch.zeros_like(numbers)
    Emulator(order=order).call("broken", [64, mistake], [numbers, out], [out])
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_a_right_kernel_passes(order):
    assert sums(NONE, order).unique().tolist() == [63 * 32]


def test_a_write_beyond_an_array():
    with pytest.raises(RuntimeError, match="array 1 was written beyond its ends"):
        sums(WRITE_BEYOND)


def test_a_read_beyond_an_array_is_nan():
    assert sums(READ_BEYOND).isnan().all()


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (EARLY_RETURN, r"divergent barrier: thread 0 waits at broken_kernels.cu:\d+ \(block\), thread 5 has returned"),
        (TWO_BARRIERS, r"divergent barrier: thread 0 waits at broken_kernels.cu:\d+ \(block\), thread 32 waits at"),
        (MISSING_LANE, r"divergent barrier: thread 0 waits at broken_kernels.cu:\d+ \(warp\), thread 7 waits at"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_a_divergent_barrier_is_reported(mistake, text, order):
    with pytest.raises(RuntimeError, match=text):
        sums(mistake, order)


@pytest.mark.parametrize("mistake", [MISSING_BARRIER, EARLY_REUSE])
def test_a_missing_barrier_depends_on_the_order(mistake):
    results = [sums(mistake, order) for order in ORDERS]
    assert not torch.equal(results[0].nan_to_num(), results[1].nan_to_num())


def test_shared_memory_that_nobody_set_is_nan():
    assert sums(UNSET).isnan().all()


def sanitized(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with the address sanitizer, in the project's root."""
    # The C++ library too: the sanitizer looks up the functions that throw exceptions when it starts.
    names = ("libasan.so", "libstdc++.so.6")
    libraries = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip(f"{COMPILER} has no address sanitizer here")
    emulator.build(sanitize=True)  # here, where the compiler itself is not sanitized
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:detect_stack_use_after_return=0",
        "BLOCKHESS_SANITIZE": "1",
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [READ_BEYOND, WRITE_BEYOND])
def test_the_address_sanitizer_sees_every_byte(mistake):
    run = sanitized(["-c", f"from tests.cuda_on_cpu.test_shim import sums; sums({mistake})"])
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
    assert "sum_kernel" in run.stderr


@pytest.mark.slow
def test_the_kernels_under_the_address_sanitizer():
    # With short blocks only the bases of one row and of nine, which are filled completely.
    run = sanitized(
        [
            "-m",
            "pytest",
            "-q",
            "-x",
            "-k",
            "not loop and not many and not dims1 and not dims3 and not 1000",
            "tests/cuda_on_cpu/test_kernels.py",
        ]
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
