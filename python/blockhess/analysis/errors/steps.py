"""A posteriori bounds of the error of m Lanczos steps, from the tridiagonal matrix of every recurrence.

The coefficients determine the first moments of the measure mu of the probe, F(x) = mu((-inf, x]). With the orthonormal
polynomials p_0 = 1, beta_j p_{j+1} = (x - alpha_j) p_j - beta_{j-1} p_{j-1} (beta_{-1} p_{-1} = 0):

    mass of mu at x     <=  christoffel(x) = 1 / (p_0(x)^2 + ... + p_{m-1}(x)^2)
    F(x-), F(x)         in  [lower, upper], the weight of the nodes < x and <= x of the Gauss-Radau rule with m + 1
                            nodes, one of them x; upper - lower = 1 / (p_0(x)^2 + ... + p_m(x)^2)
    W1(mu, quadrature)  <=  int christoffel(x) dx, as both distribution functions lie in a bracket of that width

The bounds of F are the sharpest for given coefficients on the whole line. If the Krylov space is exhausted, they have
width 0. They hold in exact arithmetic. Without reorthogonalization, rounding shifts eigenvalues by about eps |H| and
splits them into copies ("ghosts") of the same total weight: the bounds then hold for this perturbed measure (Greenbaum
1989), that is, for mu up to such shifts of x.

Source: Szegő 1939, section 3.41 (Chebyshev, Markov, Stieltjes); Golub and Meurant 2010; Chen, Trogdon, Ubaru 2021.
"""

from __future__ import annotations

import dataclasses
import math

import scipy  # submodules load on first use
import torch
from torch import Tensor

from blockhess.analysis.axes import BlockAxis
from blockhess.analysis.density import WINDOW
from blockhess_ext import Quadrature, ops
from blockhess_ext.recurrences import EXHAUSTED_EPS

# Largest |node| of a Gauss-Radau rule, relative to |T|; the weight of a node this large is below 1e-30.
_LARGEST_NODE = 1e15

# Smallest beta in the polynomials, relative to |T|, and number of steps after which they are rescaled: at |x| = 1e6 |T|
# the squares are then below 1e200.
_LEAST_BETA, _RESCALED = 1e-16, 4

# Spacing and last abscissa of double-exponential quadrature; its relative error is 1e-3, with ghosts 5 %.
_STEP, _LAST = 0.4, 2.8

# Largest number of parts of a gap between nodes.
_MOST_PARTS = 64

LINEAR = BlockAxis()

# Largest number of elements of the tridiagonal matrices that are solved in one call.
_CHUNK = 2**22


def exact(quadrature: Quadrature) -> Tensor:
    """Return which recurrences are exact, (n_probes, n_blocks) bool: those with an exhausted Krylov space."""
    q = quadrature
    last = q.beta.gather(-1, (q.steps[..., None] - 1).clamp(min=0))[..., 0]
    rounding = EXHAUSTED_EPS * torch.finfo(getattr(torch, q.dtype)).eps * _norms(q.alpha, q.beta, q.steps)
    orthogonal = torch.tensor([mode != "none" for mode in q.reorthogonalize], device="cpu")
    return ((q.steps > 0) & (last <= rounding)) | (orthogonal & (q.steps == torch.tensor(q.dims, device="cpu")))


def _norms(alpha: Tensor, beta: Tensor, steps: Tensor) -> Tensor:
    """Return the largest row sums of T (...), bounds of |T|; alpha, beta (..., m), steps (...)."""
    j = torch.arange(alpha.shape[-1], device="cpu")
    diagonal = torch.where(j < steps[..., None], alpha.abs(), 0.0)
    couplings = torch.where(j < steps[..., None] - 1, beta.abs(), 0.0)
    return (diagonal + couplings + torch.nn.functional.pad(couplings[..., :-1], (1, 0))).amax(-1)


def shortened(quadrature: Quadrature, share: float) -> Quadrature:
    """Return the quadrature of a share of the steps, at least one, of every recurrence that is not exact."""
    q, inexact = quadrature, ~exact(quadrature)
    rules = dataclasses.replace(q, nodes=q.nodes.clone(), weights=q.weights.clone(), steps=q.steps.clone())
    rules.steps[inexact] = (share * q.steps[inexact]).ceil().long()
    rules.nodes[inexact], rules.weights[inexact] = ops.tridiag_quadrature(
        q.alpha[inexact], q.beta[inexact], rules.steps[inexact]
    )
    return rules


class Recurrence:
    """The recurrences of one block with at least one step.

    Attributes:
        alpha, beta: (n_known, m) float64.
        steps: (n_known,) int64, at least 1.
        nodes, weights: (n_known, m) float64, padded with the last node and 0.
        exact: (n_known,) bool.
        norm: (n_known,) float64, a bound of |T|.
    """

    def __init__(self, quadrature: Quadrature, block: int) -> None:
        q = quadrature.select_blocks([block])
        known = q.steps[:, 0] > 0
        self.alpha, self.beta, nodes, weights, self.steps = (
            getattr(q, name)[known, 0] for name in ("alpha", "beta", "nodes", "weights", "steps")
        )
        self.norm = _norms(self.alpha, self.beta, self.steps)
        self.exact = exact(q)[known, 0]
        valid = torch.arange(self.alpha.shape[1], device="cpu") < self.steps[:, None]
        last = nodes.gather(1, self.steps[:, None] - 1)
        self.nodes, weights = torch.where(valid, nodes, last), torch.where(valid, weights, 0.0)
        self.weights = weights / weights.sum(1, keepdim=True)

    def polynomials(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return christoffel(x), c p_{m-1}(x) and c r(x), r = (x - alpha) p_{m-1} - beta p_{m-2}, c^2 = christoffel(x).

        Args:
            x: (n_known, n_points) float64.
        """
        # Avoids 0 / 0 for exhausted and zero recurrences; every other beta is larger.
        beta = torch.maximum(self.beta, _LEAST_BETA * self.norm[:, None]).clamp(min=1e-300)
        # p_j and the sum of squares are relative to a scale, of which christoffel holds the square.
        christoffel, squares = torch.ones_like(x), torch.ones_like(x)
        before, now, residual = torch.zeros_like(x), torch.ones_like(x), torch.zeros_like(x)
        steps = self.steps.tolist()
        for j in range(max(steps, default=0)):
            r = (x - self.alpha[:, j, None]).mul_(now)
            if j:
                r.addcmul_(beta[:, j - 1, None], before, value=-1.0)
            if j + 1 < min(steps):
                before, now = now, r.div_(beta[:, j, None])
                squares.addcmul_(now, now)
            else:
                residual = torch.where((j < self.steps)[:, None], r, residual)
                more, after = (j + 1 < self.steps)[:, None], r / beta[:, j, None]
                before, now = torch.where(more, now, before), torch.where(more, after, now)
                squares = torch.where(more, squares + after**2, squares)
            if j % _RESCALED == 0:
                shrink = squares.rsqrt()
                before, now, residual = before * shrink, now * shrink, residual * shrink
                christoffel *= shrink**2
                squares = torch.ones_like(x)
        shrink = squares.rsqrt()
        return christoffel * shrink**2, now * shrink, residual * shrink

    def mass_bound(self, x: Tensor) -> Tensor:
        """Return 1 / (p_0(x)^2 + ... + p_m(x)^2), a bound of the mass of mu at x, (n_known, n_points).

        Args:
            x: (n_known, n_points) float64.
        """
        christoffel, _, residual = self.polynomials(x)
        beta = self.beta.gather(1, self.steps[:, None] - 1).clamp(min=1e-300)
        mass: Tensor = christoffel / (1 + (residual / beta) ** 2)
        return mass

    def cdf(self, x: Tensor) -> Tensor:
        """Return the weight of the nodes <= x of every recurrence, (n_known, n_points), exactly 1 beyond the last.

        Args:
            x: (n_points,) float64.
        """
        sums = torch.nn.functional.pad(self.weights.cumsum(1), (1, 0))
        upto = torch.searchsorted(self.nodes, x.expand(len(self.nodes), -1).contiguous(), right=True)
        return sums.gather(1, upto) / sums[:, -1:]

    def cdf_bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return lower and upper bounds of F(x) of every recurrence, (n_known, n_points) each.

        Args:
            x: (n_points,) float64.
        """
        lower = self.cdf(x)
        upper = lower.clone()
        inexact = (~self.exact).nonzero().squeeze(1)
        for rows in torch.split(inexact, max(1, _CHUNK // (len(x) * (self.alpha.shape[1] + 1)))):
            lower[rows], upper[rows] = self._radau(rows, x)
        return lower, upper

    def _radau(self, rows: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        points = x.expand(len(self.steps), -1)
        _, p, r = (part[rows] for part in self.polynomials(points))
        steps, norm = self.steps[rows, None, None], self.norm[rows, None]
        beta = self.beta[rows].gather(1, steps[:, 0] - 1)
        largest = _LARGEST_NODE * torch.maximum(norm, x.abs()).clamp(min=1e-290)
        corner = torch.nan_to_num(x - beta**2 * (p / r), nan=0.0, posinf=math.inf, neginf=-math.inf)
        corner = torch.minimum(torch.maximum(corner, -largest), largest)

        shape = (len(rows), len(x), 1)
        alpha = torch.nn.functional.pad(self.alpha[rows, None, :].expand(-1, len(x), -1), (0, 1))
        alpha = alpha.scatter(2, steps.expand(shape), corner[..., None])
        betas = torch.nn.functional.pad(self.beta[rows, None, :].expand(-1, len(x), -1), (0, 1)).contiguous()
        counts = (steps[..., 0] + 1).expand(-1, len(x)).flatten().contiguous()
        nodes, weights = ops.tridiag_quadrature(alpha.flatten(0, 1).contiguous(), betas.flatten(0, 1), counts)
        valid = torch.arange(nodes.shape[1], device="cpu") < counts[:, None]
        distance = torch.where(valid, (nodes - x.repeat(len(rows))[:, None]).abs(), math.inf)
        at = distance.argmin(1, keepdim=True)
        sums = torch.nn.functional.pad(weights.cumsum(1), (1, 0))
        sums /= sums[:, -1:].clone()
        lower, upper = sums.gather(1, at), sums.gather(1, at + 1)
        return lower.view(shape[:2]), upper.view(shape[:2])

    def bracket(self, longest: float = math.inf, axis: BlockAxis = LINEAR) -> tuple[Tensor, Tensor]:
        """Return points x and masses christoffel(x) dx of a quadrature on the line, (n_known, n_points) each.

        It is double-exponential between neighboring nodes and beyond the outer ones, which resolves the narrow peaks
        of christoffel at converged nodes. Masses are 0 for exact recurrences.

        Args:
            longest: largest length of an interval on the axis; longer gaps are divided into at most _MOST_PARTS.
            axis: axis on which lengths are measured.
        """
        t = torch.arange(-_LAST, _LAST + _STEP / 2, _STEP, dtype=torch.float64, device="cpu")
        arc = math.pi / 2 * t.sinh()
        share, d_share = (2 * arc).sigmoid(), _STEP * math.pi * t.cosh() * (2 * arc).sigmoid() * (-2 * arc).sigmoid()

        edges = self._edges(longest, axis)
        left, width = edges[:, :-1, None], edges.diff(dim=1).clamp(min=0.0)[..., None]
        inside, d_inside = left + width * share, width * d_share

        # Beyond the outer nodes x = node +- |T| exp(arc), up to 2e5 |T|, as christoffel decays as x^(-2 (m - 1)).
        away, d_away = arc.exp(), _STEP * math.pi / 2 * t.cosh() * arc.exp()
        last = self.nodes.gather(1, self.steps[:, None] - 1)
        scale = self.norm[:, None]
        x = torch.cat([self.nodes[:, :1] - scale * away, inside.flatten(1), last + scale * away], 1)
        d_x = torch.cat([scale * d_away, d_inside.flatten(1), scale * d_away], 1)
        return x, (self.polynomials(x)[0] * d_x).masked_fill(self.exact[:, None], 0.0)

    def _edges(self, longest: float, axis: BlockAxis) -> Tensor:
        """Return the nodes and points that divide the gaps between them, (n_known, n_edges), padded with the last."""
        placed = axis.place(self.nodes)
        parts = (placed.diff(dim=1) / longest).ceil().clamp(1, _MOST_PARTS).long()
        if not parts.numel() or int(parts.max()) == 1:
            return self.nodes
        edges = []
        for nodes, y, count in zip(self.nodes, placed, parts):
            gap = torch.repeat_interleave(count)
            step = torch.arange(len(gap), device="cpu") - (count.cumsum(0) - count)[gap]
            inner = axis.invert(y[gap] + (y[gap + 1] - y[gap]) * step / count[gap])
            edges.append(torch.cat([torch.where(step == 0, nodes[gap], inner), nodes[-1:]]))
        most = max(map(len, edges))
        return torch.stack([torch.cat([row, row[-1:].expand(most - len(row))]) for row in edges])


def wasserstein_bound(recurrence: Recurrence, axis: BlockAxis = LINEAR) -> Tensor:
    """Bound the Wasserstein-1 distance between the quadrature of every recurrence and the measure of its probe.

    Returns:
        (n_known,) float64, in units of the axis: 0 for exact recurrences, infinite for others with one step.

    Source: Chen, Trogdon, Ubaru 2021, section 3, with the Christoffel function instead of two neighboring weights.
    """
    x, mass = recurrence.bracket()
    bound = (mass * axis.slope(x)).sum(1)
    bound[(recurrence.steps == 1) & ~recurrence.exact] = math.inf
    return bound


def density_bound(quadrature: Quadrature, block: int, grid: Tensor, sigma: float, axis: BlockAxis = LINEAR) -> Tensor:
    """Bound the error due to finite steps of the density of a block, smoothed by a Gaussian g on an axis y(x).

    It is the smaller of two bounds. Integration by parts and the bracket of the distribution function give
    int |g'(t - y(x))| y'(x) christoffel(x) dx, for any spectrum. Exactness for polynomials of degree 2 m - 1 gives
    twice the sum of |Chebyshev coefficients| of g(t - y(x)) from degree 2 m on, on the range of the spectrum, which
    decays fast once m resolves sigma. The range is that of the nodes of all probes, extended until christoffel, a bound
    of the mass of the probe's measure there, is below 1e-6.

    Args:
        quadrature: quadrature of all blocks.
        block: index.
        grid: (n_points,) float64, on the axis.
        sigma: standard deviation of the Gaussian on the axis.
        axis: y(x).

    Returns:
        (n_points,) float64, mean over probes, at most the peak of g.

    Source: Chen, Trogdon, Ubaru 2021; Trefethen 2008 (Gauss quadrature and Chebyshev coefficients).
    """
    recurrence = Recurrence(quadrature, block)
    peak = 1 / (sigma * math.sqrt(2 * math.pi))
    inexact = ~recurrence.exact
    if not bool(inexact.any()):
        return torch.zeros_like(grid)
    x, mass = (part[inexact] for part in recurrence.bracket(3 * sigma, axis))
    by_parts = _by_parts(axis.place(x), mass * axis.slope(x), grid, sigma)
    bound = torch.minimum(by_parts, _chebyshev_tail(recurrence, grid, sigma, axis))
    return bound.clamp(max=peak).sum(0) / len(inexact)


def _by_parts(x: Tensor, mass: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """Return int |g'(t - x)| dmass(x) of every inexact recurrence, x on the axis, (n_inexact, n_points)."""
    bound = torch.zeros(len(x), len(grid), dtype=torch.float64, device="cpu")
    for row in range(len(x)):
        near = (mass[row] > 0) & (x[row] >= grid[0] - WINDOW * sigma) & (x[row] <= grid[-1] + WINDOW * sigma)
        points, order = x[row, near].sort()
        masses = mass[row, near][order] / (sigma**2 * math.sqrt(2 * math.pi))
        for start in range(0, len(grid), 64):
            t = grid[start : start + 64]
            ends = torch.stack([t[0] - WINDOW * sigma, t[-1] + WINDOW * sigma])
            low, high = torch.searchsorted(points, ends).tolist()
            z = (t[:, None] - points[low:high]) / sigma
            bound[row, start : start + 64] = (z.abs() * (-0.5 * z**2).exp()) @ masses[low:high]
    return bound


def _chebyshev_tail(recurrence: Recurrence, grid: Tensor, sigma: float, axis: BlockAxis) -> Tensor:
    """Return 2 sum_{k >= 2 m} |c_k(t)|, (n_points,), with g(t - y(x)) = sum_k c_k(t) T_k(x) on the spectral range."""
    low, high = _spectral_range(recurrence)
    middle, half = (low + high) / 2, (high - low) / 2
    degree = 2 * int(recurrence.steps[~recurrence.exact].min())
    finest = axis.finest(sigma)
    if degree * finest < half:  # c_k decays as exp(-(k sigma / half)^2 / 2): the bound exceeds the peak
        return torch.full_like(grid, math.inf)
    size = 2 ** math.ceil(math.log2(max(2 * degree, 12 * half / finest, 32)))
    angles = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / size)
    y = axis.place(middle + half * angles.cos())
    tail = torch.empty_like(grid)
    for start in range(0, len(grid), 512):
        z = (grid[start : start + 512, None] - y) / sigma
        values = (-0.5 * z**2).exp() / (sigma * math.sqrt(2 * math.pi))
        coefficients = torch.from_numpy(scipy.fft.dct(values.numpy(), axis=1)) / size
        tail[start : start + 512] = 2 * coefficients[:, degree:].abs().sum(1)
    return tail


def _spectral_range(recurrence: Recurrence) -> tuple[float, float]:
    """Return the range of the nodes, extended as far as the measure of a probe may have mass 1e-6 at a point."""
    ends = []
    for side, index in ((-1.0, torch.zeros_like(recurrence.steps)), (1.0, recurrence.steps - 1)):
        node = recurrence.nodes.gather(1, index[:, None])
        away = recurrence.norm[:, None] * torch.logspace(-12, 1, 131, dtype=torch.float64, device="cpu")
        possible = (recurrence.polynomials(node + side * away)[0] > 1e-6) & ~recurrence.exact[:, None]
        reach = torch.where(possible, away, 0.0).amax(1, keepdim=True)
        ends.append(float((side * (node + side * reach)).max()) * side)
    return ends[0], ends[1]
