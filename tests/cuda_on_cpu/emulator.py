"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ with the cuda_runtime.h of this folder, called like the ops.

Every array is copied into memory of its own with guard zones of NaN on both sides: a write there raises an error, and a
read there gives NaN. With BLOCKHESS_SANITIZE=1 the address sanitizer detects every read and write out of bounds; Python
must then be started with its library in LD_PRELOAD.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockhess_ext.layout import Layout
from blockhess_ext.ops import DISTRIBUTIONS
from blockhess_ext.recurrences import Recurrences

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered"]
INCLUDES = [HERE, ROOT / "csrc", ROOT / "csrc/cuda"]
SOURCES = (".cu", ".cuh", ".cpp", ".h")
ORDERS = ("forward", "reverse", "shuffled")
MAX_SHARED = 232448
SANITIZE = os.environ.get("BLOCKHESS_SANITIZE") == "1"


def obstacle() -> str | None:
    """Return the reason why csrc/cuda cannot be compiled for the CPU here, or None."""
    return (
        None if shutil.which(COMPILER) else f"needs g++ to compile csrc/cuda for the CPU, '{COMPILER}' is not on PATH"
    )


def build(sanitize: bool) -> Path:
    """Return the shared library, compiled unless it exists for the same sources and flags."""
    flags = FLAGS + (["-fsanitize=address"] if sanitize else [])
    folders = (HERE, ROOT / "csrc/cuda", ROOT / "csrc/ops")
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in SOURCES]
    digest = hashlib.sha256(repr(flags).encode() + b"".join(path.read_bytes() for path in files))
    folder = ROOT / "build/cuda_on_cpu" / digest.hexdigest()[:16]
    target = folder / "cuda_on_cpu.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be compiling; closing the file unlocks it
        if not target.exists():
            _compile(files, flags, folder, target)
    return target


def _compile(files: list[Path], flags: list[str], folder: Path, target: Path) -> None:
    def compiled(source: Path) -> str:
        output = folder / f"{source.name}.o"
        includes = [f"-I{path}" for path in INCLUDES]
        subprocess.run([COMPILER, *flags, *includes, "-x", "c++", "-c", source, "-o", output], check=True)
        return str(output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [path for path in files if path.suffix in (".cu", ".cpp")]))
    fresh = folder / f"{os.getpid()}.so"
    subprocess.run([COMPILER, *flags, "-shared", *objects, "-o", fresh], check=True)
    fresh.rename(target)  # atomic: other processes see the whole file or none


@functools.cache
def library() -> ctypes.CDLL:
    """Return the shared library, loaded."""
    target = build(SANITIZE)
    loaded = ctypes.CDLL(str(target))
    loaded.guarded_malloc.restype = ctypes.c_void_p
    loaded.guarded_malloc.argtypes = [ctypes.c_size_t]
    loaded.guarded_free.restype = ctypes.c_bool
    loaded.guarded_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return loaded


class Emulator:
    """The functions of `blockhess_ext.ops`, computed by the CUDA kernels.

    Args:
        max_grid: maximum number of CTAs per launch.
        order: order in which threads and CTAs run, one of ORDERS.
        shift: offset of every vector from 16-byte alignment, in elements.
        max_shared: maximum shared memory of a CTA in bytes.
    """

    def __init__(self, max_grid: int = 2**31 - 1, order: str = "forward", shift: int = 0, max_shared: int = MAX_SHARED):
        self.max_grid, self.order, self.shift, self.max_shared = max_grid, order, shift, max_shared

    def call(self, name: str, sizes: list[int], arrays: list[Tensor], written: list[Tensor]) -> None:
        """Run an op on guarded copies of the arrays and copy back those that it may write."""
        lib = library()
        lib.set_options(ORDERS.index(self.order), self.max_shared)
        guards = []
        for x in arrays:
            offset = self.shift * x.element_size() if x.is_floating_point() and x.dim() > 1 else 0
            bytes_ = x.numel() * x.element_size()
            guards.append((lib.guarded_malloc(bytes_ + offset), offset, bytes_))
            ctypes.memmove(guards[-1][0] + offset, x.data_ptr(), bytes_)
        pointers = (ctypes.c_void_p * len(arrays))(*(base + offset for base, offset, _ in guards))
        numbers = (ctypes.c_int64 * len(sizes))(*sizes)
        run = getattr(lib, f"run_{name}")
        run.restype = ctypes.c_char_p
        is_double = any(x.dtype == torch.float64 for x in written[:1])
        error = run(int(is_double), numbers, pointers, ctypes.c_int64(self.max_grid))
        violations = []
        for i, (x, (base, offset, bytes_)) in enumerate(zip(arrays, guards)):
            after = torch.empty_like(x)
            ctypes.memmove(after.data_ptr(), base + offset, bytes_)
            if any(x is y for y in written):
                x.copy_(after)
            elif not torch.equal(after.nan_to_num(7.0), x.nan_to_num(7.0)):
                violations.append(f"array {i} is an input and was written")
            if not lib.guarded_free(base, offset + bytes_):
                violations.append(f"array {i} was written beyond its ends")
        if error is not None:
            raise RuntimeError(f"{name}: {error.decode()}")
        if violations:
            raise RuntimeError(f"{name}: {'; '.join(violations)}")

    def lanczos_step(
        self,
        w: Tensor,
        v: Tensor,
        v_prev: Tensor,
        recurrences: Recurrences,
        layout: Layout,
        partial: Tensor,
    ) -> None:
        *state, limits = vars(recurrences).values()
        arrays = [*tables(layout), w, v, v_prev, *state, limits, layout.basis_offsets, partial]
        sizes = [*shape(layout, len(w)), len(recurrences.alpha)]
        self.call("lanczos_step", sizes, arrays, [v_prev, *state, partial])

    def reorthogonalize(
        self,
        r: Tensor,
        basis: Tensor,
        recurrences: Recurrences,
        layout: Layout,
        partial: Tensor,
        project: Tensor | None = None,
    ) -> None:
        *state, limits = vars(recurrences).values()
        arrays = [*tables(layout), r, basis, layout.basis_offsets, layout.basis_tiles, *state, limits, partial]
        arrays += [] if project is None else [project]
        sizes = [*shape(layout, len(r)), len(recurrences.alpha), basis.shape[0], basis.shape[2]]
        sizes += [len(layout.basis_tiles), project is not None]
        self.call("reorthogonalize", sizes, arrays, [r, basis, *state, partial])

    def tridiag_quadrature(self, alpha: Tensor, beta: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        nodes, weights, couplings = (torch.full_like(alpha, -7.0) for _ in range(3))
        arrays = [alpha, beta, steps, nodes, weights, couplings]
        self.call("tridiag_quadrature", list(alpha.shape), arrays, [nodes, weights, couplings])
        return nodes, weights

    def gaussian_density(self, nodes: Tensor, weights: Tensor, grid: Tensor, sigma: Tensor) -> Tensor:
        density = nodes.new_full((len(nodes), len(grid)), -7.0)
        self.call("gaussian_density", [*nodes.shape, len(grid)], [nodes, weights, grid, sigma, density], [density])
        return density

    def random_probes(
        self,
        layout: Layout,
        num_probes: int,
        *,
        seed: int,
        block_ids: Tensor,
        first_probe: int = 0,
        distribution: str = "gaussian",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        probes = torch.full((num_probes, layout.n), -7.0, dtype=dtype)
        partial = torch.full((num_probes, layout.n_tiles), -7.0, dtype=torch.float64)
        sizes = [*shape(layout, num_probes), seed, first_probe, DISTRIBUTIONS.index(distribution)]
        self.call("random_probes", sizes, [*tables(layout), block_ids, probes, partial], [probes, partial])
        return probes

    def linear_combination(
        self,
        out: Tensor,
        bases: list[Tensor],
        coefficients: list[Tensor | None],
        scalars: list[float],
        first_rows: list[int],
        summed: bool = False,
    ) -> None:
        lasts = {x.shape[-1] for x in [*bases, *coefficients] if x is not None and x.shape[-1] != 1} if summed else ()
        shape = [*out.shape[1:-1], *lasts] if lasts else list(out.shape[1:])
        whole = out.expand(-1, *shape)
        sizes, arrays = [len(out), whole.stride(0), *shape, *strides(whole)[1:]], [memory(out)]
        used = []
        for base, coefficient, scalar, first in zip(bases, coefficients, scalars, first_rows, strict=True):
            begin, end = max(0, first), min(len(out), first + len(base))
            if begin >= end or 0 in shape:
                continue
            base = base[begin - first : end - first].expand(-1, *shape)
            factor = torch.zeros((), dtype=out.dtype) if coefficient is None else coefficient
            sizes += [begin, end, base.stride(0), coefficient is not None]
            sizes += [*strides(base)[1:], *strides(factor.expand(shape))]
            arrays += [memory(base), memory(factor)]
            used.append(scalar)
        arrays.insert(1, torch.tensor(used, dtype=torch.float64))
        self.call("linear_combination", [summed, len(used), len(shape), *sizes], arrays, arrays[:1])

    def linear_combination_sum(self, *arguments: Any) -> None:
        self.linear_combination(*arguments, summed=True)


def memory(x: Tensor) -> Tensor:
    """Return the elements from the first to the last one of a tensor, as one row."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) if x.numel() else 0
    return x.as_strided((1, span), (span, 1))


def strides(x: Tensor) -> list[int]:
    """Return the strides, 0 in dimensions of size 1."""
    return [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride())]


def tables(layout: Layout) -> list[Tensor]:
    return [layout.offsets, layout.tiles, layout.tile_offsets]


def shape(layout: Layout, n_probes: int) -> list[int]:
    return [n_probes, layout.n_blocks, layout.n, layout.n_tiles]
