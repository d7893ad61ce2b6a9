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
from torch import Tensor

from blockhess import measures
from blockhess.blocks import BlockInfo
from blockhess.density import check_grid, check_sigma, default_sigma, node_grid, smallest_sigma, smooth
from blockhess.divergence import AXES, JS0, UNNORMALISED_POINTS, check_choice, js_matrix
from blockhess.table import format_table, number
from blockhess_ext import Quadrature

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


class Spectra:
    """Nodes and weights of every block of a model, immutable.

    Args:
        blocks: one BlockInfo a block, names all different.
        quadrature: nodes and weights, whose block l is blocks[l]; moved to the CPU.
        provenance: how it was made, JSON values only.

    Raises:
        ValueError: blocks do not fit the quadrature, or two share a name.
        TypeError: provenance holds something JSON cannot.

    Example:
        >>> spectra = blockhess.load("gpt.npz")
        >>> print(spectra.table())
        >>> print(spectra.js0())
    """

    def __init__(self, blocks: Sequence[BlockInfo], quadrature: Quadrature, provenance: Mapping[str, Any]) -> None:
        self.blocks = tuple(blocks)
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
        return (
            f"Spectra of {model}: {len(self)} blocks, {sum(self.dims):,} parameters; "
            f"{q.nodes.shape[0]} {q.distribution} probes, {q.num_steps} Lanczos steps in {q.dtype}, seed {q.seed}"
        )

    def _no_block(self, name: object) -> str:
        close = difflib.get_close_matches(str(name), self.names, n=3)
        return f"no block is called {name!r}" + (f"; close to it: {', '.join(close)}" if close else "")

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
        names = self.names if blocks is None else tuple(blocks)
        for name, count in Counter(names).items():
            if name not in self._row:
                raise ValueError(f"blocks: {self._no_block(name)}")
            if count > 1:
                raise ValueError(f"blocks: names must be different, got {name!r} {count} times")
        return [self._row[name] for name in names]

    @cached_property
    def merged(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights (n_blocks, n_probes m), averaged over probes: see measures.merge_probes."""
        return measures.merge_probes(self.quadrature)

    @cached_property
    def _known(self) -> Tensor:
        return (self.quadrature.steps > 0).any(0)  # (n_blocks,)

    def density(
        self, sigma: float | None = None, grid: Tensor | Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Smooth the spectra of all blocks with one Gaussian, on one grid.

        Args:
            sigma: width of the Gaussian in units of the eigenvalues; None means default_sigma().
            grid: (n_points,) eigenvalues, strictly ascending; None means density.node_grid, which covers every node
                of every block; between its patches all densities are 0.

        Returns:
            grid (n_points,), densities (n_blocks, n_points). On the default grid, torch.trapezoid(densities, grid)
            is 1. A block of which nothing is known has density 0.

        Raises:
            ValueError: sigma or grid breaks its rule.

        Source: Zhang et al. 2024, appendix B.2.

        Example:
            >>> grid, densities = spectra.density(sigma=0.01)
        """
        nodes, weights = self.merged
        if sigma is None:
            sigma = max(self.default_sigma(), smallest_sigma(nodes))
        sigma = check_sigma("density", sigma, nodes)
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
        points = torch.unique(nodes[self._known]) if x is None else torch.as_tensor(x, dtype=torch.float64).cpu()
        if points.ndim > 1 or bool(points.isnan().any()):
            raise ValueError(f"cdf: x must have shape (n_points,) and no NaN, got {points}")
        points = points.reshape(-1)
        return points, measures.cdf(nodes, weights, points)

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
        shares = torch.as_tensor(q, dtype=torch.float64).cpu().reshape(-1)
        if not bool(((shares >= 0) & (shares <= 1)).all()):
            raise ValueError(f"quantiles: q must be in [0, 1], got {shares.tolist()}")
        return measures.quantiles(*self.merged, shares)

    def trace(self) -> tuple[Tensor, Tensor]:
        """Estimate tr H_l of every block.

        Returns:
            values, stderr: (n_blocks,) each. With one probe the standard error is infinite, except for blocks of one
            element, where it is always 0.

        Source: Hutchinson 1989.
        """
        return measures.moment(self.quadrature, 1)

    def frobenius_norm(self) -> tuple[Tensor, Tensor]:
        """Estimate |H_l|_F = sqrt(tr H_l^2) of every block.

        Returns:
            values, stderr: (n_blocks,) each; the error by the delta method, stderr(|H|_F^2) / (2 |H|_F).
        """
        square, stderr = measures.second_moment(self.quadrature)
        norm = square.sqrt()
        # All probes see a zero block as zero: no error to scale.
        return norm, torch.where(norm > 0, stderr / (2 * norm), stderr)

    def eigenvalue_range(self) -> tuple[Tensor, Tensor]:
        """Return lambda_min, lambda_max of every block, (n_blocks,) each: extreme nodes over all probes.

        They lie inside the true range, within rounding, and reach its ends first.
        """
        return measures.extremes(self.quadrature)

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

    @cached_property
    def _statistics(self) -> list[list[float]]:
        """Of every block: lambda_min, lambda_max, trace and its error, Frobenius norm and its error, negative mass."""
        columns = (*self.eigenvalue_range(), *self.trace(), *self.frobenius_norm(), self.negative_mass())
        rows: list[list[float]] = torch.stack(columns, 1).tolist()
        return rows

    def compared(self, blocks: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return the names of the blocks that comparisons take, the rows of js_matrix.

        Args:
            blocks: names, in this order; None means every block that is used and finite.

        Raises:
            ValueError: a name is unknown, repeated or of a block of which nothing is known; fewer than two are left.
        """
        names = self._sound if blocks is None else tuple(blocks)
        for row in self.rows(names):
            if not self._known[row]:
                raise ValueError(f"blocks: {self.names[row]!r} has no spectrum: its Hessian was never finite")
        if len(names) < 2:
            raise ValueError(f"blocks: at least two are needed for a comparison, got {list(names)}")
        return names

    @cached_property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of the blocks that comparisons leave out by default."""
        broken = self.quadrature.nonfinite.any(0).tolist()
        unused = ["unused" in block.note.split("; ") for block in self.blocks]
        reasons = ("non-finite" if bad else "unused" if idle else "" for bad, idle in zip(broken, unused))
        return tuple((name, reason) for name, reason in zip(self.names, reasons) if reason)

    @cached_property
    def _sound(self) -> tuple[str, ...]:
        left_out = dict(self.left_out)
        return tuple(name for name in self.names if name not in left_out)

    def _measures_of(self, names: Sequence[str], axis: str) -> tuple[Tensor, Tensor]:
        check_choice("js_matrix", "axis", axis, AXES)
        rows = self.rows(names)
        nodes, weights = self.merged
        return AXES[axis](nodes[rows]), weights[rows]

    def default_sigma(self, blocks: Sequence[str] | None = None, axis: str = "linear") -> float:
        """Return the sigma that comparisons of these blocks take where none is given: see density.default_sigma.

        Args:
            blocks: names; None means every block that is used and finite.
            axis: one of divergence.AXES.
        """
        names = (self._sound or self.names) if blocks is None else blocks
        return default_sigma(self._measures_of(names, axis)[0])

    def js_matrix(
        self,
        kind: str = "distance",
        base: float = 2.0,
        sigma: float | None = None,
        axis: str = "linear",
        blocks: Sequence[str] | None = None,
        grid_points: int = UNNORMALISED_POINTS,
    ) -> Tensor:
        """Compare the spectra pair by pair.

        Args:
            kind: "distance", "divergence", or a reconstruction of the paper's definition, "jeffreys" or
                "unnormalised": see divergence.js_matrix.
            base: of the logarithm, for all kinds; with base 2 the first two are in [0, 1].
            sigma: width of the Gaussian on the axis, one for all; None means default_sigma(blocks, axis).
            axis: one of divergence.AXES.
            blocks: names; None means every block that is used and finite.
            grid_points: for kind "unnormalised" only.

        Returns:
            (n_compared, n_compared), rows as compared(blocks).

        Raises:
            ValueError: an argument breaks its rule, or fewer than two blocks are compared.

        Example:
            >>> spectra.js_matrix(kind="jeffreys", blocks=["wte.weight", "h.0.attn.wq"])
        """
        return self.compare(kind, base, sigma, axis, blocks, grid_points)[0]

    def js0(
        self,
        kind: str = "distance",
        base: float = 2.0,
        sigma: float | None = None,
        axis: str = "linear",
        blocks: Sequence[str] | None = None,
        grid_points: int = UNNORMALISED_POINTS,
    ) -> JS0:
        """Average js_matrix over all pairs of different blocks: the paper's measure of heterogeneity.

        Args, Raises: see js_matrix.

        Returns:
            JS0: float(js0) is the mean, str(js0) says it with all it depends on.

        Source: Zhang et al. 2024, section 2.5.

        Example:
            >>> print(spectra.js0())
        """
        return self.compare(kind, base, sigma, axis, blocks, grid_points)[1]

    def compare(
        self,
        kind: str = "distance",
        base: float = 2.0,
        sigma: float | None = None,
        axis: str = "linear",
        blocks: Sequence[str] | None = None,
        grid_points: int = UNNORMALISED_POINTS,
    ) -> tuple[Tensor, JS0]:
        """Return js_matrix and js0 at the cost of one. Args, Raises: see js_matrix."""
        names = self.compared(blocks)
        nodes, weights = self._measures_of(names, axis)
        sigma = default_sigma(nodes) if sigma is None else float(sigma)
        matrix = js_matrix(nodes, weights, kind=kind, base=base, sigma=sigma, grid_points=grid_points)
        return matrix, JS0(
            value=float(matrix.sum()) / (len(names) * (len(names) - 1)),
            kind=kind,
            base=float(base),
            axis=axis,
            sigma=sigma,
            blocks=names,
            left_out=self.left_out if blocks is None else (),
            batchnorm=str(self.provenance.get("batchnorm") or ""),
            grid_points=grid_points if kind == "unnormalised" else None,
        )

    def table(self, blocks: Sequence[str] | None = None) -> str:
        """Return a plain-text table, one block a line: shape, extreme eigenvalues, trace +- its error, ...

        Args:
            blocks: names, in the order wanted; None means all, in the order of the model.
        """
        header = "block,shape,dim,lambda_min,lambda_max,trace,+-,Frobenius,negative,steps,note"
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
                    str(most) if least == most else f"{least}..{most}",
                    "; ".join(filter(None, (block.note, broken))),
                )
            )
        return format_table(header.split(","), lines)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write everything to one file, from which blockhess.load gives it back bit by bit: see files.save."""
        from blockhess import files

        return files.save(self, path)

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
        from blockhess import plots

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
        from blockhess import plots

        return plots.save_figure(plots.plot_heatmap(self, **options), path)
