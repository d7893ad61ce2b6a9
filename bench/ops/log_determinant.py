"""Stochastic Lanczos quadrature of an explicit matrix with known eigenvalues, next to imate and matfree."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.known_spectra import synthetic
from bench.harness.machine import Machine
from bench.harness.rows import Row, Rows
from bench.harness.timing import Rival, compare_and_time
from blockhess_ext import batched_slq

PROBES, STEPS = 10, 50
# Of the mean logarithm of the eigenvalues: several standard errors of 10 random vectors.
LARGEST_ERROR = 0.05


def dense_matrix(n: int) -> tuple[Tensor, Tensor]:
    """Return a symmetric positive definite matrix (n, n) float64 and its eigenvalues, Marchenko-Pastur + 0.1."""
    eigenvalues = synthetic(n)["Marchenko-Pastur"] + 0.1
    x = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(x).Q
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2, eigenvalues


def blockhess_logdet(A: Tensor, reorthogonalize: str) -> Callable[[], float]:
    def run() -> float:
        options: dict[str, Any] = {"num_probes": PROBES, "num_steps": STEPS, "reorthogonalize": reorthogonalize}
        q = batched_slq(lambda v: v @ A, [len(A)], dtype=A.dtype, **options)
        return float(q.integrate(torch.log)[0])

    return run


def imate_logdet(A: Tensor) -> Callable[[], float]:
    import imate

    matrix, threads = A.numpy(), torch.get_num_threads()
    options: dict[str, Any] = {"min_num_samples": PROBES, "max_num_samples": PROBES, "lanczos_degree": STEPS}
    return lambda: float(imate.logdet(matrix, method="slq", orthogonalize=-1, num_threads=threads, **options))


def matfree_logdet(A: Tensor) -> Callable[[], float]:
    import jax
    from matfree import decomp, funm, stochtrace

    jax.config.update("jax_enable_x64", True)
    matrix = jax.numpy.asarray(A.numpy())
    sampler = stochtrace.sampler_normal(matrix[0], num=PROBES)
    integrand = funm.monte_carlo_funm_sym_logdet(decomp.tridiag_sym(STEPS, reortho="full"))
    estimate = stochtrace.estimator_monte_carlo(integrand, sampler=sampler)
    compiled = jax.jit(lambda key, matrix: estimate(lambda v: matrix @ v, key))
    return lambda: float(compiled(jax.random.PRNGKey(0), matrix))


def logdet(machine: Machine) -> Row:
    """Measure a log-determinant by 10 probes of 50 steps; every package draws its own random vectors."""
    n = machine.pick(2000, 400, 200)
    A, eigenvalues = dense_matrix(n)
    truth = float(eigenvalues.log().sum())

    def error(found: float) -> float:
        return abs(found - truth) / n

    makers = {
        "blockhess": partial(blockhess_logdet, A, "full"),
        "blockhess, no reorthogonalization": partial(blockhess_logdet, A, "none"),
        "imate": partial(imate_logdet, A),
        "matfree (JAX)": partial(matfree_logdet, A),
    }
    row = Row.of(compare_and_time({name: Rival(make, error, LARGEST_ERROR) for name, make in makers.items()}))
    row.notes.append(
        "errors are of the log-determinant divided by the number of rows; every package draws its own random vectors"
    )
    return row


ROWS: Rows = {"log-determinant of a dense matrix of 2,000 rows, 10 probes of 50 steps": (logdet, [])}
