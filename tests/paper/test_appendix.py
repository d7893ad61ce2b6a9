"""Theorems 3, 4 and 5 of the paper's appendix B: Gauss quadrature from Lanczos, on a measure that is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockhess_ext import batched_slq

N, M = 12, 5


@pytest.fixture(scope="module")
def measured():
    """Eigenvalues x_i and weights (v^T q_i)^2 of a random matrix and vector, and the quadrature of M Lanczos steps."""
    rng = np.random.default_rng(0)
    A = rng.normal(size=(N, N))
    H = torch.from_numpy((A + A.T) / 2 / np.linalg.norm(A, 2))
    v = torch.from_numpy(rng.normal(size=N))
    v = v / v.norm()
    q = batched_slq(lambda x: x @ H, [N], probes=v[None], num_steps=M, dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(H)
    return eigenvalues.numpy(), ((vectors.T @ v) ** 2).numpy(), q


def orthonormal_polynomials(q, x: np.ndarray) -> np.ndarray:
    """p_0 .. p_M at x by the three-term recurrence of the Jacobi matrix that Lanczos returned, (M + 1, len(x))."""
    alpha, beta = q.alpha[0, 0].numpy(), q.beta[0, 0].numpy()
    p = [np.zeros_like(x), np.ones_like(x)]
    for j in range(M):
        below = beta[j - 1] if j else 0.0
        p.append(((x - alpha[j]) * p[-1] - below * p[-2]) / beta[j])
    return np.array(p[1:])


def test_lanczos_returns_the_jacobi_matrix(measured):
    """Theorem 5: the polynomials of T's recurrence are orthonormal with respect to mu."""
    x, mu, q = measured
    p = orthonormal_polynomials(q, x)
    np.testing.assert_allclose((p * mu) @ p.T, np.eye(M + 1), atol=1e-11)
    wrong = q.alpha.clone()
    wrong[0, 0, 1] += 1e-3
    p = orthonormal_polynomials(type("Wrong", (), {"alpha": wrong, "beta": q.beta}), x)
    assert np.abs((p * mu) @ p.T - np.eye(M + 1)).max() > 1e-4


def test_nodes_are_roots_and_weights_integrate_lagrange_polynomials(measured):
    """Theorem 3 with 4: x_j are the roots of p_m, c_j is the integral of prod (x - x_i) / (x_j - x_i)."""
    x, mu, q = measured
    nodes, weights = q.nodes[0, 0].numpy(), q.weights[0, 0].numpy()
    np.testing.assert_allclose(orthonormal_polynomials(q, nodes)[M], 0, atol=1e-11)
    for j in range(M):
        others = np.delete(nodes, j)
        lagrange = np.prod([(x - other) / (nodes[j] - other) for other in others], axis=0)
        np.testing.assert_allclose(weights[j], (mu * lagrange).sum(), atol=1e-12)


def test_exact_for_degrees_below_2m_and_for_no_other_rule(measured):
    """Theorem 3: exact for degree 2m - 1; p_m^2, of degree 2m, has integral 1 and quadrature 0."""
    x, mu, q = measured
    nodes, weights = q.nodes[0, 0].numpy(), q.weights[0, 0].numpy()
    rng = np.random.default_rng(1)
    for degree in range(2 * M):
        polynomial = np.polynomial.Chebyshev(rng.normal(size=degree + 1))
        np.testing.assert_allclose((weights * polynomial(nodes)).sum(), (mu * polynomial(x)).sum(), atol=1e-13)
    square = orthonormal_polynomials(q, x)[M] ** 2, orthonormal_polynomials(q, nodes)[M] ** 2
    assert (mu * square[0]).sum() == pytest.approx(1, abs=1e-10)
    assert (weights * square[1]).sum() == pytest.approx(0, abs=1e-15)
