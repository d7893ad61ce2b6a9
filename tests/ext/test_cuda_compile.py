"""Plain nvcc compiles all of csrc/cuda for every architecture, without a warning and without a spill."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

NVCC = shutil.which("nvcc") or str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin/nvcc")
ARCHITECTURES = ("sm_80", "sm_90")
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
FLAGS = ["-O3", "-Xptxas", "-v", "-Werror", "all-warnings", f"-I{ROOT / 'csrc'}", "-Xcompiler", "-Wall"]

pytestmark = pytest.mark.skipif(
    not Path(NVCC).exists(), reason="needs nvcc to compile csrc/cuda: set CUDA_HOME or PATH"
)


def compile_report(source: Path, architecture: str, output: Path) -> str:
    """Compile a file as C++17, which .ci/cuda_link does as C++20; return the report of ptxas on its kernels."""
    command = [NVCC, f"-arch={architecture}", "-std=c++17", *FLAGS, "-c", str(source), "-o", str(output)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def spills(report: str) -> list[int]:
    """Return the bytes of spill stores and loads, two numbers per kernel."""
    return [
        int(number)
        for pair in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
        for number in pair
    ]


CASES = [
    pytest.param(source, architecture, id=f"{source.stem}-{architecture}", marks=() if is_quick else pytest.mark.slow)
    for source in KERNELS
    for architecture in ARCHITECTURES
    for is_quick in [(source.stem, architecture) == ("gaussian_density", "sm_90")]
]


@pytest.mark.parametrize(("source", "architecture"), CASES)
def test_compiles_without_warnings_and_spills(source, architecture, tmp_path):
    numbers = spills(compile_report(source, architecture, tmp_path / "kernel.o"))
    assert numbers and not any(numbers)


def disassembler() -> str | None:
    """Return the path of cuobjdump, of the toolkit or of Triton, or None."""
    found = shutil.which("cuobjdump") or str(Path(NVCC).parent / "cuobjdump")
    if Path(found).exists():
        return found
    triton = importlib.util.find_spec("triton")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return str(tool) if tool and tool.exists() else None


def memory_instructions(code: Path) -> dict[str, set[str]]:
    """Return the kinds of loads and stores of every kernel: generic (LD, ST), global (LDG, ...), shared (LDS, ...)."""
    listing = subprocess.run([str(disassembler()), "-sass", str(code)], capture_output=True, text=True, check=True)
    kinds: dict[str, set[str]] = {}
    for part in listing.stdout.split("Function : ")[1:]:
        name, _, text = part.partition("\n")
        kinds[name.strip()] = set(re.findall(r"\b(LD[GSL]?|ST[GSL]?)(?:\.[A-Z0-9.]+)? ", text))
    return kinds


@pytest.mark.slow
@pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump, of the CUDA toolkit or of Triton")
def test_tridiagonal_problems_in_shared_memory_are_addressed_as_such(tmp_path):
    code = tmp_path / "kernel.o"
    compile_report(ROOT / "csrc/cuda/tridiag_quadrature.cu", "sm_90", code)
    of_kernel = memory_instructions(code)
    (shared,) = [kinds for name, kinds in of_kernel.items() if "Lb1" in name]
    (others,) = [kinds for name, kinds in of_kernel.items() if "Lb0" in name]
    assert shared == {"LDG", "STG", "LDS", "STS"} and others == {"LDG", "STG"}


def test_a_spill_is_detected(tmp_path):
    source = tmp_path / "spill.cu"
    body = "".join(f"double x{i} = in[{i} + threadIdx.x];" for i in range(64)) + "__syncthreads();"
    body += "".join(f"out[{i} + threadIdx.x] = x{i} * x{(i * 7 + 3) % 64};" for i in range(64))
    source.write_text(f"__global__ void __launch_bounds__(1024, 2) k(const double* in, double* out) {{ {body} }}")
    assert any(spills(compile_report(source, "sm_90", tmp_path / "spill.o")))
