"""The CPU kernels give the same results on every instruction set, to rounding.

The installed library selects the instruction set at run time; here each has a build of its own.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import blockhess_ext
from blockhess_ext import ops

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-Wall", "-fPIC", "-shared", "-DBLOCKHESS_ONE_VERSION"]
SOURCES = ("vector_kernels", "tridiag_lanes", "tridiag_quadrature", "gaussian_density", "linear_combination")
LEVELS = ("x86-64", "x86-64-v3", "x86-64-v4")
EPS, EPS32 = torch.finfo(torch.float64).eps, torch.finfo(torch.float32).eps

processor = blockhess_ext.build_info()["instruction_set"].split()[0]
pytestmark = pytest.mark.skipif(processor not in LEVELS or shutil.which(COMPILER) is None, reason="needs g++ on x86-64")


class Build:
    """The CPU kernels for one instruction set, called with tensors."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def __call__(self, name: str, *arguments: Tensor | int | float) -> float:
        function = getattr(self._library, f"run_{name}")
        function.restype = ctypes.c_int64 if name == "tridiag_quadrature" else ctypes.c_double
        c = {int: ctypes.c_int64, float: ctypes.c_double}
        result: float = function(
            *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else c[type(a)](a) for a in arguments)
        )
        return result


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> list[Build]:
    """Return a build for every instruction set of this processor, the oldest first."""
    folder = tmp_path_factory.mktemp("instruction_sets")
    levels = LEVELS[: LEVELS.index(processor) + 1]

    def compiled(level: str) -> Path:
        target = folder / f"{level}.so"
        sources = [str(HERE / "driver.cpp"), *(str(CSRC / "cpu" / f"{name}.cpp") for name in SOURCES)]
        subprocess.run([COMPILER, *FLAGS, f"-march={level}", f"-I{CSRC}", *sources, "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        return [Build(path) for path in pool.map(compiled, levels)]


def vectors(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng)


@pytest.mark.parametrize("n", [1, 7, 31, 32, 1000, 4097])
def test_dots_and_three_terms(builds, n, rng):
    w, v, p = (vectors(rng, n) for _ in range(3))

    def run(build: Build) -> list[Tensor]:
        out = p.clone()
        square = build("three_term", w, v, out, 0.3, 0.7, n)
        assert abs(square / out.double().square().sum().item() - 1) < 1e-13  # of the rounded values in memory
        return [torch.tensor(x, dtype=torch.float64) for x in (build("dot", w, v, n), square)] + [out]

    first, *others = map(run, builds)
    for other in others:
        assert torch.equal(first[0], other[0])  # products of float32 are exact: nothing to fuse differently
        for x, y in zip(first[1:], other[1:]):
            torch.testing.assert_close(x, y, rtol=2 * EPS32, atol=2 * EPS32)


def test_scaling_by_a_factor_that_is_no_float32(builds, rng):
    x, factor = vectors(rng, 5001).abs(), 1457.0 / 2048.0 + 0.24 * EPS32  # in float32 the last term is lost
    for build in builds:
        out = x.clone()
        build("scale", out, factor, len(out))
        torch.testing.assert_close(out.double(), factor * x.double(), rtol=EPS32, atol=0)
        assert (
            abs(out.double().sum() / x.double().sum() - factor) < EPS32 / 50
        )  # rounding errors cancel, a lost term does not


def test_gram_schmidt(builds, rng):
    n, count = 5000, 7
    basis, x = vectors(rng, count, n) / math.sqrt(n), vectors(rng, n)
    c = torch.randn(count, generator=rng, dtype=torch.float64)

    def run(build: Build) -> list[Tensor]:
        out, d = x.clone(), torch.empty(count, dtype=torch.float64)
        build("gram_schmidt", out, basis, count, n, c, d)
        return [out, d]

    first, *others = map(run, builds)
    for other in others:
        torch.testing.assert_close(first[0], other[0], rtol=2 * EPS32, atol=2 * EPS32)
        torch.testing.assert_close(first[1], other[1], rtol=0, atol=2 * EPS32 * x.norm().item())


def test_tridiag_quadrature(builds, rng):
    n_problems, m = 37, 60
    alpha = torch.randn(n_problems, m, generator=rng, dtype=torch.float64)
    beta = torch.rand(n_problems, m, generator=rng, dtype=torch.float64)
    steps = torch.randint(0, m + 1, (n_problems,), generator=rng)

    def run(build: Build) -> list[Tensor]:
        nodes, weights = torch.empty_like(alpha), torch.empty_like(alpha)
        assert build("tridiag_quadrature", n_problems, m, alpha, beta, steps, nodes, weights) == -1
        return [nodes, weights]

    first, *others = map(run, builds)
    for other in others:
        torch.testing.assert_close(first[0], other[0], rtol=0, atol=10 * m * EPS)
        torch.testing.assert_close(first[1], other[1], rtol=0, atol=1e-10)  # close nodes may share weight


def test_gaussian_density(builds, rng):
    nodes = torch.randn(3, 40, generator=rng, dtype=torch.float64)
    weights = torch.rand(3, 40, generator=rng, dtype=torch.float64)
    grid = torch.linspace(-4, 4, 9001, dtype=torch.float64)
    sigma = torch.tensor([1e-3, 0.1, 2.0], dtype=torch.float64)

    def run(build: Build) -> list[Tensor]:
        density = torch.empty(3, len(grid), dtype=torch.float64)
        build("gaussian_density", 3, 40, len(grid), nodes, weights, grid, sigma, density)
        return [density]

    (first,), *others = map(run, builds)
    peak = weights.sum(1) / (sigma * math.sqrt(2 * math.pi))
    for (other,) in others:
        assert ((first - other).abs() <= 8 * EPS * peak[:, None]).all()
    if others:  # the builds are not the same code: only the newer ones fuse multiplications with additions
        assert not torch.equal(first, others[0][0])


@pytest.mark.parametrize("n", [1, 7, 64, 133])
def test_linear_combination(builds, n, rng):
    x, y = vectors(rng, n, n), vectors(rng, n, n)
    expected = x.double() * y.double() + 0.5 * x.double() - 2 * x.double().T
    size = (x * y).abs() + 0.5 * x.abs() + 2 * x.abs().T
    for build in builds:
        out, sums = torch.empty_like(x), torch.empty(n)
        build("linear_combination", x, y, n, 0, out)
        build("linear_combination", x, y, n, 1, sums)
        assert ((out - expected).abs() <= 4 * EPS32 * size).all()
        assert ((sums - expected.sum(1)).abs() <= 16 * EPS32 * size.sum(1)).all()


def test_the_library_agrees_with_the_newest(builds, rng):
    nodes = torch.randn(2, 30, generator=rng, dtype=torch.float64)
    grid, sigma = torch.linspace(-4, 4, 501, dtype=torch.float64), torch.full((2,), 0.2, dtype=torch.float64)
    chosen = ops.gaussian_density(nodes, nodes.abs(), grid, sigma)

    def density(build: Build) -> Tensor:
        out = torch.empty_like(chosen)
        build("gaussian_density", 2, 30, len(grid), nodes, nodes.abs(), grid, sigma, out)
        return out

    torch.testing.assert_close(chosen, density(builds[-1]), rtol=0, atol=8 * EPS * nodes.abs().sum().item() / 0.2)
    if len(builds) > 1:  # the library did not select the oldest, which has no fused multiply-add
        assert not torch.equal(chosen, density(builds[0]))
