"""Distances between spectra without smoothing: exact integrals and maxima of step functions.

    "wasserstein"   int |F(x) - G(x)| dx, in units of the axis
    "kolmogorov"    max |F(x) - G(x)|, in [0, 1]

F, G are the distribution functions of the nodes and weights. Both distances are metrics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockhess_ext.arguments import choice

METRICS = {"wasserstein": "Wasserstein-1 distance", "kolmogorov": "Kolmogorov distance"}


def distance_matrix(nodes: Tensor, weights: Tensor, metric: str = "wasserstein") -> Tensor:
    """Return the distances between the spectra of all pairs of L blocks.

    Args:
        nodes, weights: (L, K) float64, on one axis; the weights of a block are non-negative and sum to 1.
        metric: one of METRICS.

    Returns:
        (L, L) float64, symmetric, zero on the diagonal.

    Source: Villani 2003, section 2.2 (the distance on the line is the area between the distribution functions).

    Example:
        >>> spikes = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
        >>> distance_matrix(spikes, torch.ones_like(spikes))
        tensor([[0., 3.],
                [3., 0.]], dtype=torch.float64)
    """
    choice("metric", metric, METRICS, op="distance_matrix")
    matrix = torch.zeros(len(nodes), len(nodes), dtype=torch.float64, device="cpu")
    for i in range(len(nodes) - 1):
        others = nodes[i + 1 :]
        x, order = torch.cat([nodes[i].expand_as(others), others], 1).sort(1)
        difference = torch.cat([weights[i].expand_as(others), -weights[i + 1 :]], 1).gather(1, order).cumsum(1).abs()
        width = x.diff(dim=1)
        if metric == "wasserstein":
            matrix[i, i + 1 :] = (difference[:, :-1] * width).sum(1)
        else:  # at distinct x only: between equal nodes the partial sum is not F - G
            matrix[i, i + 1 :] = (difference[:, :-1] * (width > 0)).amax(1)
    return matrix + matrix.T
