"""Mixtures of Gaussians, and integrals between them by scipy's quad."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy.integrate import quad
from scipy.special import logsumexp
from torch import Tensor

from tests.helpers.spectra_cases import float64


def log_density(nodes: Tensor, weights: Tensor, sigma: float) -> Callable[[float], float]:
    x, w = nodes.numpy(), weights.numpy()
    return lambda t: float(logsumexp(-0.5 * ((t - x) / sigma) ** 2, b=w)) - math.log(sigma * math.sqrt(2 * math.pi))


def by_quad(kind: str, nodes: Tensor, weights: Tensor, sigma: float) -> float:
    """The integral between the first two rows, in nats, panel by panel."""
    p, q = (log_density(nodes[row], weights[row], sigma) for row in range(2))

    def integrand_of_divergence(t: float) -> float:
        a, b = p(t), q(t)
        middle = np.logaddexp(a, b) - math.log(2)
        return 0.5 * (math.exp(a) * (a - middle) + math.exp(b) * (b - middle))

    def integrand_of_jeffreys(t: float) -> float:
        a, b = p(t), q(t)
        return (math.exp(a) - math.exp(b)) * (a - b)

    integrand = {"divergence": integrand_of_divergence, "jeffreys": integrand_of_jeffreys}[kind]
    low, high = float(nodes.min()) - 12 * sigma, float(nodes.max()) + 12 * sigma
    edges = np.linspace(low, high, math.ceil((high - low) / sigma) + 1)
    return sum(quad(integrand, a, b, epsabs=1e-15, epsrel=1e-13, limit=200)[0] for a, b in itertools.pairwise(edges))


def mixtures(spread: float, seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    nodes = rng.uniform(-spread / 2, spread / 2, (2, 5))
    weights = rng.dirichlet(np.ones(5), 2) ** (1 + 3 * (seed % 2))
    return float64(nodes), float64(weights / weights.sum(1, keepdims=True))
