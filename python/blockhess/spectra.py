"""Spectra: the eigenvalue densities of every block of a model, what follows from them, and how the blocks compare.

Nodes and weights are kept as stochastic Lanczos quadrature gave them; densities, moments, distances and pictures are
made from them on demand, at any sigma. All tensors handed out are float64 on the CPU, rows in the order of `names`.
A block of which nothing is known (no recurrence made a step) has NaN for every value; nothing else is ever NaN.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blockhess import _checks
from blockhess._text import format_table, number, printable
from blockhess.analysis import axes, distances, distribution, outliers
from blockhess.analysis.axes import Axis
from blockhess.analysis.density import (
    check_grid,
    check_sigma_in_range,
    default_sigma,
    node_grid,
    smallest_sigma,
    smooth,
)
from blockhess.analysis.errors import jensen_shannon
from blockhess.analysis.errors.intervals import check_confidence, normal_quantile
from blockhess.analysis.errors.spectra_bands import SpectraBands
from blockhess.analysis.jensen_shannon import JS0, js_matrix
from blockhess.analysis.sensitivity import Sensitivity, sensitivity
from blockhess.problem.blocks import ZERO_NOTE, BlockInfo
from blockhess.run.recorder import Unit
from blockhess_ext import Quadrature, State
from blockhess_ext.arguments import integer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from blockhess_paper.training.advice import Advice

# Nodes count as negative below -64 eps(dtype of the vectors) max |node|: Lanczos cannot tell them from 0 otherwise.
NEGATIVE_TOLERANCE = 64


@dataclass(frozen=True, eq=False)
class BlockSpectrum:
    """The spectrum of one block, as `spectra["name"]` gives it.

    Attributes:
        block: name, shape, dim, parameters, note.
        nodes, weights: (n_probes, m) float64; the weights of a probe sum to 1.
        steps: (n_probes,) int64, how many of the m nodes are valid.
        lambda_min, lambda_max: extreme nodes over all probes.
        trace, trace_stderr, frobenius_norm, frobenius_stderr: estimates and their standard errors.
        negative_mass: share of eigenvalues below zero.
    """

    block: BlockInfo
    nodes: Tensor
    weights: Tensor
    steps: Tensor
    lambda_min: float
    lambda_max: float
    trace: float
    trace_stderr: float
    frobenius_norm: float
    frobenius_stderr: float
    negative_mass: float

    @property
    def name(self) -> str:
        """Canonical name of the block."""
        return self.block.name

    @property
    def dim(self) -> int:
        """Number of parameters in the block."""
        return self.block.dim


class Spectra(SpectraBands):
    """Nodes and weights of every block of a model, immutable.

    Args:
        blocks: one BlockInfo a block, names all different.
        quadrature: nodes and weights, whose block l is blocks[l]; moved to the CPU.
        provenance: how it was made, JSON values only.
        vectors: of every unit of work, the state after the last step, where it was kept; files do not hold them.

    Raises:
        ValueError: blocks do not fit the quadrature, or two share a name.
        TypeError: provenance holds something JSON cannot.

    Example:
        >>> spectra = blockhess.load("gpt.npz")
        >>> print(spectra.table())
        >>> print(spectra.js0())
    """

    def __init__(
        self,
        blocks: Sequence[BlockInfo],
        quadrature: Quadrature,
        provenance: Mapping[str, Any],
        vectors: Sequence[tuple[Unit, State]] = (),
    ) -> None:
        self.blocks, self.vectors = tuple(blocks), tuple(vectors)
        if self.dims != tuple(quadrature.dims):
            raise ValueError(f"Spectra: blocks must have dims {tuple(quadrature.dims)}, got {self.dims}")
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise ValueError(f"Spectra: blocks must have different names, got {', '.join(repeated)} more than once")
        tensors = ("nodes", "weights", "alpha", "beta", "steps", "nonfinite")
        self.quadrature: Quadrature = dataclasses.replace(
            quadrature, **{name: getattr(quadrature, name).detach().cpu() for name in tensors}
        )
        try:
            # A copy of its own, equal to what a saved file gives back.
            self.provenance: dict[str, Any] = json.loads(json.dumps(dict(provenance)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"Spectra: provenance must hold JSON values only: {error}") from None

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __getitem__(self, name: str) -> BlockSpectrum:
        if name not in self._row:
            raise KeyError(f"Spectra: {self._no_block(name)}")
        row, q = self._row[name], self.quadrature
        return BlockSpectrum(
            self.blocks[row], q.nodes[:, row], q.weights[:, row], q.steps[:, row], *self._statistics[row]
        )

    def __repr__(self) -> str:
        q, model = self.quadrature, self.provenance.get("model") or "a model"
        return printable(
            f"Spectra of {model}: {len(self)} blocks, {sum(self.dims):,} parameters; "
            f"{q.nodes.shape[0]} {q.distribution} probes, {q.num_steps} Lanczos steps in {q.dtype}, seed {q.seed}"
            f"{'; of an unfinished run, what it has so far' if self.provenance.get('partial') else ''}"
        )

    def _no_block(self, name: object) -> str:
        close = difflib.get_close_matches(str(name), self.names, n=3)
        return f"no block is called {name!r}" + (f"; close to it: {', '.join(map(printable, close))}" if close else "")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks, in order."""
        return tuple(block.name for block in self.blocks)

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """Sizes of the blocks, in order."""
        return tuple(block.dim for block in self.blocks)

    def rows(self, blocks: Sequence[str] | None = None) -> list[int]:
        """Return the rows of these blocks in every tensor handed out; None means all, in order.

        Raises:
            ValueError: a name is unknown or repeated.
        """
        names = self.names if blocks is None else _checks.names(blocks)
        for name, count in Counter(names).items():
            if name not in self._row:
                raise ValueError(f"blocks: {self._no_block(name)}")
            if count > 1:
                raise ValueError(f"blocks: names must be different, got {name!r} {count} times")
        return [self._row[name] for name in names]

    @cached_property
    def merged(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights (n_blocks, n_probes m), averaged over probes: see measures.merge_probes."""
        return distribution.merge_probes(self.quadrature)

    @cached_property
    def _known(self) -> Tensor:
        return (self.quadrature.steps > 0).any(0)  # (n_blocks,)

    def density(
        self,
        sigma: float | None = None,
        grid: Tensor | Sequence[float] | None = None,
        axis: str = "linear",
        normalize: str | int = "none",
        scale: float | None = None,
        blocks: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Smooth the spectra of all blocks with one Gaussian, on one grid.

        Args:
            sigma: width of the Gaussian on the axis, at most the range of all nodes; None means default_sigma().
            grid: (n_points,) points of the axis, strictly ascending; None means density.node_grid, which covers every
                node of every block; between its patches all densities are 0.
            axis, normalize, scale: see js_matrix.
            blocks: names, in order; None means all.

        Returns:
            grid (n_points,), densities (n_blocks, n_points). On the default grid, torch.trapezoid(densities, grid)
            is 1. A block of which nothing is known has density 0.

        Raises:
            ValueError: sigma, grid, axis, normalize or scale breaks its rule, or a block cannot be normalised.

        Source: Zhang et al. 2024, appendix B.2.

        Example:
            >>> grid, densities = spectra.density(sigma=0.01)
        """
        names = self.names if blocks is None else _checks.names(blocks)
        nodes, weights = self.measures_of(names, self.axis_of("density", names, axis, normalize, scale))
        if sigma is None:
            chosen = [i for i, name in enumerate(names) if blocks is not None or name in self._sound]
            sigma = max(default_sigma(nodes[chosen] if chosen else nodes), smallest_sigma(nodes))
        sigma = check_sigma_in_range("density", sigma, nodes)
        points = node_grid(nodes, sigma) if grid is None else check_grid("density", grid)
        return points, smooth(nodes, weights, points, sigma)

    def cdf(self, x: Tensor | Sequence[float] | float | None = None) -> tuple[Tensor, Tensor]:
        """Count eigenvalues: the exact step function of the nodes and weights, not smoothed.

        Args:
            x: (n_points,) eigenvalues, in any order, or one; None means every node of every block, ascending.

        Returns:
            x (n_points,), share of eigenvalues <= x (n_blocks, n_points).

        Raises:
            ValueError: x has more than one dimension or is NaN.

        Example:
            >>> _, share = spectra.cdf(0.0)
        """
        nodes, weights = self.merged
        points = torch.unique(nodes[self._known]) if x is None else _checks.reals("cdf", "x", x)
        if points.ndim > 1 or bool(points.isnan().any()):
            raise ValueError(f"cdf: x must have shape (n_points,) and no NaN, got {points}")
        points = points.reshape(-1)
        return points, distribution.cdf(nodes, weights, points)

    def quantiles(self, q: Tensor | Sequence[float] | float) -> Tensor:
        """Invert the cdf: the smallest node x of every block with cdf(x) >= q.

        Args:
            q: (n_quantiles,) shares in [0, 1], or one.

        Returns:
            (n_blocks, n_quantiles).

        Raises:
            ValueError: a share is outside [0, 1].

        Example:
            >>> median = spectra.quantiles(0.5)
        """
        shares = _checks.reals("quantiles", "q", q).reshape(-1)
        if not bool(((shares >= 0) & (shares <= 1)).all()):
            raise ValueError(f"quantiles: q must be in [0, 1], got {shares.tolist()}")
        return distribution.quantiles(*self.merged, shares)

    def trace(self) -> tuple[Tensor, Tensor]:
        """Estimate tr H_l of every block.

        Returns:
            values, stderr: (n_blocks,) each. With one probe the standard error is infinite, except for blocks of one
            element, where it is always 0.

        Source: Hutchinson 1989.
        """
        return distribution.moment(self.quadrature, 1)

    def frobenius_norm(self) -> tuple[Tensor, Tensor]:
        """Estimate |H_l|_F = sqrt(tr H_l^2) of every block.

        Returns:
            values, stderr: (n_blocks,) each; the error by the delta method, stderr(|H|_F^2) / (2 |H|_F).
        """
        square, stderr = distribution.second_moment(self.quadrature)
        norm = square.sqrt()
        # All probes see a zero block as zero: no error to scale.
        return norm, torch.where(norm > 0, stderr / (2 * norm), stderr)

    def eigenvalue_range(self) -> tuple[Tensor, Tensor]:
        """Return lambda_min, lambda_max of every block, (n_blocks,) each: extreme nodes over all probes.

        They lie inside the true range, within rounding, and reach its ends first.
        """
        return distribution.extremes(self.quadrature)

    def negative_mass(self) -> Tensor:
        """Return the share of eigenvalues of every block (n_blocks,) that are negative.

        Nodes within NEGATIVE_TOLERANCE eps(dtype of the vectors) of zero, relative to the block's largest |node|,
        count as zero.
        """
        nodes, weights = self.merged
        eps = torch.finfo(getattr(torch, self.quadrature.dtype)).eps
        tolerance = NEGATIVE_TOLERANCE * eps * nodes.abs().amax(1, keepdim=True)
        mass = (weights * (nodes < -tolerance)).sum(1)
        return mass.masked_fill(~self._known, torch.nan)

    def zero_mass(self, tolerance: float | None = None) -> Tensor:
        """Return the share of eigenvalues of every block (n_blocks,) at zero: its rank deficiency, as a share.

        Args:
            tolerance: nodes up to this size are zero; None means the block's hvp_error, or NEGATIVE_TOLERANCE
                eps(dtype of the vectors) of its largest |node| where that is more. Lanczos finds a mass at zero only
                where the other eigenvalues stay away from it: otherwise this is too small.
        """
        if tolerance is not None and not _checks.real("zero_mass", "tolerance", tolerance) >= 0:
            raise ValueError(f"zero_mass: tolerance must not be negative, got {tolerance}")
        nodes, weights = self.merged
        bound = self._zero_tolerance if tolerance is None else torch.tensor([float(tolerance)], dtype=torch.float64)
        return (weights * (nodes.abs() <= bound[:, None])).sum(1).masked_fill(~self._known, torch.nan)

    @cached_property
    def _zero_tolerance(self) -> Tensor:
        """What is zero in every block (n_blocks,): its hvp_error, or the rounding of the vectors if that is more."""
        rounding = NEGATIVE_TOLERANCE * torch.finfo(getattr(torch, self.quadrature.dtype)).eps
        errors = torch.tensor([self.hvp_error(name) for name in self.names], dtype=torch.float64)
        return torch.maximum(rounding * self.merged[0].abs().amax(1), errors)

    def kth_eigenvalue(self, k: int, confidence: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
        """Estimate the k-th largest eigenvalue of every block, where dim (1 - cdf) crosses k - 1/2.

        Args:
            k: counted from 1.
            confidence: of the interval.

        Returns:
            value, lower, upper: (n_blocks,) each; NaN where a block has fewer than k. The interval is between the
            crossings of k - 1/2 -+ z sqrt(2 k / n_probes): among the weights of a block's n_probes Gaussian vectors the
            count of the k largest has that standard error, none where the block was written out. What too few steps
            leave open is not in it.

        Raises:
            ValueError: k is below 1, or confidence is not between 0 and 1.

        Example:
            >>> tenth, lower, upper = spectra.kth_eigenvalue(10)
        """
        k = integer("k", k, 1, op="kth_eigenvalue")
        z, q = normal_quantile(check_confidence("kth_eigenvalue", confidence)), self.quadrature
        exact = torch.tensor([q.is_exact(row) for row in range(len(self))])
        half = (z * (2 * k / (q.steps > 0).sum(0).double()).sqrt()).masked_fill(exact, 0.0)
        missing = ~self._known | (torch.tensor(self.dims) < k)
        value, lower, upper = (
            axes.kth_largest(*self.merged, self.dims, count).masked_fill(missing, torch.nan)
            for count in (k, k + half, k - half)
        )
        return value, lower, upper

    def histogram(self, bins: int | Tensor | Sequence[float] = 50) -> tuple[Tensor, Tensor]:
        """Count the eigenvalues of every block in bins, not smoothed: dim times the mass.

        Args:
            bins: number of equal bins over the nodes of all blocks, or (n_bins + 1,) ascending edges. A bin holds its
                left edge, the last one both; what lies outside is not counted.

        Returns:
            edges (n_bins + 1,), counts (n_blocks, n_bins); NaN for a block of which nothing is known.

        Raises:
            ValueError: bins is below 1 or not ascending, or a number where nothing is known of any block.

        Example:
            >>> edges, counts = spectra.histogram(100)
        """
        nodes, weights = self.merged
        if isinstance(bins, int):
            bins = integer("bins", bins, 1, op="histogram")
            if not bool(self._known.any()):
                raise ValueError(f"histogram: bins must be edges where nothing is known of any block, got {bins}")
            low, high = float(nodes[self._known].min()), float(nodes[self._known].max())
            half = 0.5 if low == high else 0.0
            edges = torch.linspace(low - half, high + half, bins + 1, dtype=torch.float64)
        else:
            edges = check_grid("histogram", bins, "bins")
            if len(edges) < 2:
                raise ValueError("histogram: bins must have at least two edges, got 1")
        inside = (nodes >= edges[0]) & (nodes <= edges[-1])
        bin_of = (torch.searchsorted(edges, nodes, right=True) - 1).clamp(0, len(edges) - 2)
        counts = torch.zeros(len(self), len(edges) - 1, dtype=torch.float64)
        counts.scatter_add_(1, bin_of, weights * inside * torch.tensor(self.dims)[:, None])
        return edges, counts.masked_fill(~self._known[:, None], torch.nan)

    def outliers(self, name: str, tolerance: float = outliers.CONVERGED) -> list[outliers.Eigenvalue]:
        """Return the eigenvalues of a block that stand apart so far that Lanczos has found them, with residual bounds.

        Args:
            name: of the block.
            tolerance: largest residual, relative to the block's largest |node|.

        Returns:
            eigenvalues, largest |value| first: see ritz.eigenvalues. Of a block smaller than the number of steps, all.

        Raises:
            ValueError: no block has this name.

        Source: Parlett 1998, section 13.2; Paige 1980.

        Example:
            >>> [(e.value, e.residual) for e in spectra.outliers("0.weight")]
        """
        return outliers.eigenvalues(
            self.quadrature, self.rows([name])[0], _checks.real("outliers", "tolerance", tolerance)
        )

    @cached_property
    def _statistics(self) -> list[list[float]]:
        """Of every block: lambda_min, lambda_max, trace and its error, Frobenius norm and its error, negative mass."""
        columns = (*self.eigenvalue_range(), *self.trace(), *self.frobenius_norm(), self.negative_mass())
        rows: list[list[float]] = torch.stack(columns, 1).tolist()
        return rows

    def hvp_error(self, name: str) -> float:
        """Return the size of the errors of Hessian-vector products with a block, where it is known, else 0.

        It is an attribute of the block, or `provenance["hvp_error"][name]`, in units of the eigenvalues.
        """
        known = getattr(self.blocks[self._row[name]], "hvp_error", None)
        if known is None:
            known = (self.provenance.get("hvp_error") or {}).get(name)
        return float(known or 0.0)

    @cached_property
    def zero_blocks(self) -> tuple[str, ...]:
        """Names of the blocks that their Hessian-vector products cannot tell from zero."""
        told = {block.name for block in self.blocks if ZERO_NOTE in block.note.split("; ")}
        sizes = self.merged[0].abs().amax(1).tolist()
        known = self._known.tolist()
        return tuple(
            name
            for name, size, k in zip(self.names, sizes, known)
            if k and (name in told or size <= self.hvp_error(name))
        )

    def compared(self, blocks: Sequence[str] | None = None, normalize: str | int = "none") -> tuple[str, ...]:
        """Return the names of the blocks that comparisons take, the rows of js_matrix.

        Args:
            blocks: names, in this order; None means every block that is used and finite, and can be normalised.
            normalize: see js_matrix.

        Raises:
            ValueError: a name is unknown, repeated or of a block of which nothing is known; fewer than two are left.
        """
        left_out = dict(self._left_out(normalize))
        names = tuple(name for name in self.names if name not in left_out) if blocks is None else _checks.names(blocks)
        for row in self.rows(names):
            if not self._known[row]:
                raise ValueError(f"blocks: {self.names[row]!r} has no spectrum: its Hessian was never finite")
        if len(names) < 2:
            raise ValueError(f"blocks: at least two are needed for a comparison, got {list(names)}")
        return names

    @cached_property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of the blocks that comparisons leave out by default; normalised ones may leave out more."""
        broken = self.quadrature.nonfinite.any(0).tolist()
        unused = ["unused" in block.note.split("; ") for block in self.blocks]
        reasons = ("non-finite" if bad else "unused" if idle else "" for bad, idle in zip(broken, unused))
        return tuple((name, reason) for name, reason in zip(self.names, reasons) if reason)

    def num_comparable(self, normalize: str | int = "none") -> int:
        """Return how many blocks comparisons take by default."""
        return len(self) - len(self._left_out(normalize))

    def _left_out(self, normalize: str | int) -> tuple[tuple[str, str], ...]:
        """left_out, and the blocks that cannot be normalised, in order."""
        reasons = {**self._not_normalizable(normalize), **dict(self.left_out)}
        return tuple((name, reasons[name]) for name in self.names if name in reasons)

    def _not_normalizable(self, normalize: str | int) -> dict[str, str]:
        """Name -> why, of the blocks that cannot be divided by what normalize says."""
        if normalize == "none":
            return {}
        values = axes.divisors(*self.merged, self.dims, normalize).tolist()
        zero = self._zero_tolerance.tolist()
        reasons = {}
        for name, dim, known, value, least in zip(self.names, self.dims, self._known.tolist(), values, zero):
            if not known:
                reasons[name] = "nothing is known of them"
            elif name in self.zero_blocks:
                reasons[name] = "zero"
            elif isinstance(normalize, int) and dim < normalize:
                reasons[name] = f"fewer than {normalize} eigenvalues"
            elif value <= least * (dim if normalize == "trace" else 1):
                what = axes.divisor_name(normalize).removeprefix("the block's ")
                reasons[name] = f"{what} zero or negative"
        return reasons

    def normalizable(self, normalize: str | int) -> tuple[str, ...]:
        """Return the names of the blocks whose eigenvalues can be divided by what normalize says; see js_matrix."""
        broken = self._not_normalizable(normalize)
        return tuple(name for name in self.names if name not in broken)

    @cached_property
    def _sound(self) -> tuple[str, ...]:
        left_out = dict(self.left_out)
        return tuple(name for name in self.names if name not in left_out)

    def axis_of(self, op: str, names: Sequence[str], axis: str, normalize: str | int, scale: float | None) -> Axis:
        """Return the axis for these blocks, with the default scale where it needs one and none is given."""
        axes.check_axis(op, axis, normalize, scale)
        if not names:
            which = "" if normalize == "none" else f" that can be divided by {axes.divisor_name(normalize)}"
            raise ValueError(f"{op}: blocks must name at least one{which}, got none")
        broken = self._not_normalizable(normalize)
        for name in names:
            if name in broken:
                raise ValueError(
                    f"{op}: eigenvalues of {name!r} cannot be divided by {axes.divisor_name(normalize)}: {broken[name]}"
                )
        if axis == "asinh" and scale is None:
            scale = axes.default_scale(*self.measures_of(names, Axis(normalize=normalize)))
        where = Axis(axis, normalize, None if scale is None else float(scale))
        if axis == "asinh" and bool(self.measures_of(names, where)[0].isinf().any()):
            raise ValueError(f"{op}: scale must not be so small that eigenvalues over it overflow, got {scale}")
        return where

    def measures_of(self, names: Sequence[str], axis: Axis, probes: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Nodes on an axis and weights of some blocks, from all probes or some."""
        rows = self.rows(names)
        merged = (
            self.merged
            if probes is None
            else distribution.merge_probes(distribution.with_probes(self.quadrature, probes))
        )
        nodes, weights = (part[rows] for part in merged)
        divisors = axes.divisors(nodes, weights, [self.dims[row] for row in rows], axis.normalize)
        return axis.place(nodes / divisors[:, None]), weights

    def default_sigma(
        self,
        blocks: Sequence[str] | None = None,
        axis: str = "linear",
        normalize: str | int = "none",
        scale: float | None = None,
    ) -> float:
        """Return the sigma that comparisons of these blocks take where none is given: see density.default_sigma.

        Args:
            blocks: names; None means every block that is used and finite, and can be normalised.
            axis, normalize, scale: see js_matrix.
        """
        axes.check_axis("default_sigma", axis, normalize, scale)
        if blocks is None:
            left_out = dict(self._left_out(normalize))
            blocks = [name for name in self.names if name not in left_out] or self.names
        blocks = _checks.names(blocks)
        return default_sigma(self.measures_of(blocks, self.axis_of("default_sigma", blocks, axis, normalize, scale))[0])

    def js_matrix(
        self,
        kind: str = "distance",
        base: float = 2.0,
        sigma: float | None = None,
        axis: str = "linear",
        blocks: Sequence[str] | None = None,
        normalize: str | int = "none",
        scale: float | None = None,
    ) -> Tensor:
        """Compare the spectra pair by pair.

        Args:
            kind: "distance" or "divergence": see jensen_shannon.js_matrix.
            base: of the logarithm; with base 2 values are in [0, 1].
            sigma: width of the Gaussian on the axis, one for all, at most the range of all nodes; None means
                default_sigma(blocks, axis, ...).
            axis: "linear", or "asinh": logarithmic towards both sides beyond `scale`.
            blocks: names; None means every block that is used and finite, and can be normalised.
            normalize: what the eigenvalues of every block are divided by first: "none", "radius" (spectral radius),
                "trace", or k for the k-th largest eigenvalue (10 in the paper's figures): see kth_eigenvalue.
            scale: of the asinh axis, one for all blocks; None means axes.default_scale, the median block's root mean
                square.

        Returns:
            (n_compared, n_compared), rows as compared(blocks, normalize).

        Raises:
            ValueError: an argument breaks its rule, a named block cannot be normalised, or fewer than two blocks are
                compared.

        Example:
            >>> spectra.js_matrix(kind="divergence", blocks=["0.weight", "2.weight"])
        """
        return self.compare(kind, base, sigma, axis, blocks, normalize, scale)[0]

    def js0(
        self,
        kind: str = "distance",
        base: float = 2.0,
        sigma: float | None = None,
        axis: str = "linear",
        blocks: Sequence[str] | None = None,
        normalize: str | int = "none",
        scale: float | None = None,
        confidence: float | None = None,
    ) -> JS0:
        """Average js_matrix over all pairs of different blocks: the paper's measure of heterogeneity.

        Random probes raise it. With `confidence` the jackknife estimates by how much, and an interval for what many
        probes would give at the same number of steps; that costs n_probes more matrices.

        Args, Raises: see js_matrix.
            confidence: probability of the interval, in (0, 1); None means no interval.

        Returns:
            JS0: float(js0) is the mean, str(js0) says it with all it depends on.

        Source: Zhang et al. 2024, section 2.5.

        Example:
            >>> print(spectra.js0(confidence=0.95))
        """
        js0 = self.compare(kind, base, sigma, axis, blocks, normalize, scale)[1]
        if confidence is None:
            return js0
        error = self._js_error(js0)
        return jensen_shannon.with_interval(js0, error, check_confidence("js0", confidence))

    def js_matrix_error(self, **comparison: Any) -> tuple[Tensor, Tensor]:
        """Estimate by the jackknife what random probes do to js_matrix.

        Args:
            comparison: arguments of js_matrix, by name.

        Returns:
            bias, stderr: (n_compared, n_compared) each; NaN with one probe. js_matrix - bias is the better estimate of
            what many probes would give at the same number of steps.

        Source: Quenouille 1956; Tukey 1958.

        Example:
            >>> bias, stderr = spectra.js_matrix_error(sigma=0.01)
        """
        error = self._js_error(self.compare(**comparison)[1])
        return error.bias, error.stderr

    def _js_error(self, js0: JS0) -> jensen_shannon.JSError:
        axis = Axis(js0.axis, js0.normalize, js0.scale)

        def matrix(probes: list[int], kind: str) -> Tensor:
            values = js_matrix(
                *self.measures_of(js0.blocks, axis, probes),
                kind=kind,
                base=js0.base,
                sigma=js0.sigma,
            )
            unknown = ~(self.quadrature.steps[probes] > 0).any(0)[self.rows(js0.blocks)]
            return values.masked_fill(unknown[:, None] | unknown, math.nan)

        return jensen_shannon.js_error(matrix, js0.kind, self.quadrature.num_probes)

    def compare(
        self,
        kind: str = "distance",
        base: float = 2.0,
        sigma: float | None = None,
        axis: str = "linear",
        blocks: Sequence[str] | None = None,
        normalize: str | int = "none",
        scale: float | None = None,
    ) -> tuple[Tensor, JS0]:
        """Return js_matrix and js0 at the cost of one. Args, Raises: see js_matrix."""
        axes.check_axis("js_matrix", axis, normalize, scale)
        names = self.compared(blocks, normalize)
        where = self.axis_of("js_matrix", names, axis, normalize, scale)
        nodes, weights = self.measures_of(names, where)
        if sigma is None:
            sigma = default_sigma(nodes)
        else:
            sigma = check_sigma_in_range("js_matrix", _checks.real("js_matrix", "sigma", sigma), nodes)
        matrix = js_matrix(nodes, weights, kind=kind, base=base, sigma=sigma)
        return matrix, JS0(
            value=jensen_shannon.mean_of_pairs(matrix),
            kind=kind,
            base=float(base),
            axis=axis,
            sigma=sigma,
            blocks=names,
            left_out=self._left_out(normalize) if blocks is None else (),
            batchnorm=str(self.provenance.get("batchnorm") or ""),
            normalize=normalize,
            scale=where.scale,
        )

    def sensitivity(self, **options: Any) -> Sensitivity:
        """Tabulate JS0 over sigma, axis and normalisation, as it depends on them: see sensitivity.sensitivity.

        Example:
            >>> print(spectra.sensitivity())
        """
        return sensitivity(self, **options)

    def advice(self) -> Advice:
        """Recommend SGD or Adam where a calibration allows it, else say "undecided" and why: see advice.advice.

        Example:
            >>> print(spectra.advice())
        """
        from blockhess_paper.training.advice import advice

        return advice(self)

    def param_groups(self, model: nn.Module, factor: float = 1.0) -> list[dict[str, Any]]:
        """Return torch param groups with the rate factor / lambda_max for every block: see learning_rates.param_groups.

        Example:
            >>> optimizer = torch.optim.SGD(spectra.param_groups(model, factor=0.1))
        """
        from blockhess.analysis.learning_rates import param_groups

        return param_groups(self, model, factor)

    def distance_matrix(
        self,
        metric: str = "wasserstein",
        axis: str = "linear",
        blocks: Sequence[str] | None = None,
        normalize: str | int = "none",
        scale: float | None = None,
    ) -> Tensor:
        """Compare the spectra pair by pair without smoothing: exact, and no sigma to choose.

        Args:
            metric: "wasserstein" (in units of the axis) or "kolmogorov" (in [0, 1]): see transport.
            axis, blocks, normalize, scale: see js_matrix.

        Returns:
            (n_compared, n_compared), rows as compared(blocks, normalize).

        Raises:
            ValueError: as js_matrix.

        Source: see transport.distance_matrix.

        Example:
            >>> spectra.distance_matrix("kolmogorov", normalize="radius")
        """
        axes.check_axis("distance_matrix", axis, normalize, scale)
        names = self.compared(blocks, normalize)
        where = self.axis_of("distance_matrix", names, axis, normalize, scale)
        return distances.distance_matrix(*self.measures_of(names, where), metric)

    def table(self, blocks: Sequence[str] | None = None) -> str:
        """Return a plain-text table, one block a line: shape, extreme eigenvalues, trace +- its error, ...

        "W1 probes" and "W1 steps" are wasserstein_error(): how far the random probes, and at most the steps, may have
        left the spectrum from the truth. Where the first is larger, more probes help, else more steps.

        Args:
            blocks: names, in the order wanted; None means all, in the order of the model.
        """
        header = "block,shape,dim,lambda_min,lambda_max,trace,+-,Frobenius,negative,zero,W1 probes,W1 steps,steps,note"
        zero, (from_probes, from_steps) = self.zero_mass().tolist(), self.wasserstein_error()
        lines = []
        for row in self.rows(blocks):
            block, steps = self.blocks[row], self.quadrature.steps[:, row]
            low, high, trace, stderr, norm, _, negative = self._statistics[row]
            least, most = int(steps[steps > 0].min()) if bool(self._known[row]) else 0, int(steps.max())
            broken = "non-finite" if bool(self.quadrature.nonfinite[:, row].any()) else ""
            lines.append(
                (
                    block.name,
                    "x".join(map(str, block.shape)) or "scalar",
                    str(block.dim),
                    number(low),
                    number(high),
                    number(trace),
                    number(stderr, 2),
                    number(norm),
                    "-" if math.isnan(negative) else f"{negative:.4f}",
                    "-" if math.isnan(zero[row]) else f"{zero[row]:.4f}",
                    number(float(from_probes[row]), 2),
                    number(float(from_steps[row]), 2),
                    str(most) if least == most else f"{least}..{most}",
                    "; ".join(filter(None, (block.note, broken))),
                )
            )
        return format_table(header.split(","), lines)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write everything to one file, from which blockhess.load gives it back bit by bit: see files.save."""
        from blockhess.results import files

        return files.save(self, path)

    def report(self, path: str | PathLike[str]) -> Path:
        """Write one self-contained HTML page with table, interactive spectra and heat map: see page.write.

        Args:
            path: of the page, ".html" by custom.

        Returns:
            path.

        Raises:
            ValueError: the file cannot be written there.

        Example:
            >>> spectra.report("gpt.html")
        """
        from blockhess.report import html

        return html.write([self], path)

    def plot(self, path: str | PathLike[str] | None = None, **options: Any) -> Figure:
        """Draw the log-density of every block, as the paper's Figure 3, and save it where a path is given.

        Args:
            path: picture file; its suffix chooses the format.
            options: of plots.plot_density.

        Returns:
            the matplotlib Figure.

        Raises:
            ImportError: matplotlib is missing.
        """
        from blockhess.report import plots

        return plots.save_figure(plots.plot_density(self, **options), path)

    def heatmap(self, path: str | PathLike[str] | None = None, **options: Any) -> Figure:
        """Draw js_matrix, as the paper's Figure 4, and save it where a path is given.

        Args:
            path: picture file; its suffix chooses the format.
            options: of plots.plot_heatmap.

        Returns:
            the matplotlib Figure.

        Raises:
            ImportError: matplotlib is missing.
        """
        from blockhess.report import plots

        return plots.save_figure(plots.plot_heatmap(self, **options), path)
