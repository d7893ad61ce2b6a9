"""Stochastic Lanczos quadrature of an explicit matrix of known eigenvalues, against packages that do just that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.known_spectra import synthetic
from bench.harness.machine import Machine
from bench.harness.rows import Row, Target
from bench.harness.timing import Rival, contest
from blockhess_ext import batched_slq

PROBES, STEPS = 10, 50
# Of the mean logarithm of an eigenvalue: what 10 random vectors leave open, several times over.
LARGEST_ERROR = 0.05


def dense_matrix(n: int) -> tuple[Tensor, Tensor]:
    """A symmetric positive definite matrix (n, n) float64 and its eigenvalues: Marchenko-Pastur's, and 0.1."""
    eigenvalues = synthetic(n)["Marchenko-Pastur"] + 0.1
    x = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(x).Q
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2, eigenvalues


def blockhess_logdet(A: Tensor, reorthogonalize: str) -> Callable[[], float]:
    def run() -> float:
        q = batched_slq(
            lambda v: v @ A,
            [len(A)],
            num_probes=PROBES,
            num_steps=STEPS,
            dtype=A.dtype,
            reorthogonalize=reorthogonalize,
        )
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
    """A log-determinant by 10 probes of 50 steps with full reorthogonalisation; everybody draws probes of their own."""
    n = machine.pick(2000, 400, 200)
    A, eigenvalues = dense_matrix(n)
    truth = float(eigenvalues.log().sum())

    def error(found: float) -> float:
        return abs(found - truth) / n

    makers = {
        "blockhess": partial(blockhess_logdet, A, "full"),
        "blockhess, no reorthogonalisation": partial(blockhess_logdet, A, "none"),
        "imate": partial(imate_logdet, A),
        "matfree (JAX)": partial(matfree_logdet, A),
    }
    row = Row.of(contest({name: Rival(make, error, LARGEST_ERROR) for name, make in makers.items()}))
    row.notes.append(
        "errors are those of each one's own random vectors, of the log-determinant over the number of rows"
    )
    return row


ROWS: dict[str, tuple[Callable[[Machine], Row], list[Target]]] = {
    "log-determinant of a dense matrix of 2,000 rows, 10 probes of 50 steps": (logdet, []),
}
