"""Selection of the blocks of a result to compare, of the axis, and their spectra on the axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from blockhess.analysis import axes, density
from blockhess.analysis.axes import Axis, as_axis
from blockhess.results.data import SpectraData
from blockhess_ext import Quadrature


def _not_normalizable(spectra: SpectraData, axis: Axis) -> dict[str, str]:
    """Return name -> reason of the blocks that the axis cannot normalize."""
    if axis.normalize == "none":
        return {}
    values = axes.divisors(*spectra.merged, spectra.dims, axis.normalize).tolist()
    zero = spectra.zero_tolerance.tolist()
    reasons = {}
    for name, dim, known, value, least in zip(spectra.names, spectra.dims, spectra.known.tolist(), values, zero):
        if not known:
            reasons[name] = "no Lanczos step"
        elif name in spectra.zero_blocks:
            reasons[name] = "zero"
        elif isinstance(axis.normalize, int) and dim < axis.normalize:
            reasons[name] = f"fewer than {axis.normalize} eigenvalues"
        elif value <= least * (dim if axis.normalize == "trace" else 1):
            reasons[name] = axis.divisor_name.removeprefix("the block's ") + " zero or negative"
    return reasons


def normalizable(spectra: SpectraData, axis: Axis) -> tuple[str, ...]:
    """Return the names of the blocks that the axis can normalize."""
    broken = _not_normalizable(spectra, axis)
    return tuple(name for name in spectra.names if name not in broken)


def excluded(spectra: SpectraData, axis: Axis) -> tuple[tuple[str, str], ...]:
    """Return (name, reason) of the blocks that comparisons on this axis exclude by default, in order."""
    reasons = {**_not_normalizable(spectra, axis), **dict(spectra.excluded)}
    return tuple((name, reasons[name]) for name in spectra.names if name in reasons)


def comparable_blocks(spectra: SpectraData, axis: str | Axis = "asinh") -> tuple[str, ...]:
    """Return the names of the blocks that comparisons include by default, the rows of js_matrix.

    These are the blocks on which the loss depends, with finite Hessian-vector products, that are not zero within the
    error of these products and that the axis can normalize.

    Args:
        axis: see Axis.

    Example:
        >>> spectra.comparable_blocks(Axis(normalize="trace"))
    """
    reasons = dict(excluded(spectra, as_axis("comparable_blocks", axis)))
    return tuple(name for name in spectra.names if name not in reasons)


def weights_only(spectra: SpectraData) -> tuple[str, ...]:
    """Return the names of the blocks of two dimensions or more, without norm gains and biases, as the paper compares.

    Blocks that comparisons exclude by default are not among them.
    """
    excluded_names = dict(spectra.excluded)
    return tuple(block.name for block in spectra.blocks if len(block.shape) >= 2 and block.name not in excluded_names)


def compared(spectra: SpectraData, blocks: Sequence[str] | None, axis: Axis) -> tuple[str, ...]:
    """Return the names of the blocks of a comparison: the given ones, or comparable_blocks.

    Raises:
        ValueError: a name is unknown or repeated, a block has no spectrum, or there are fewer than two blocks.
    """
    rows = spectra.rows(comparable_blocks(spectra, axis) if blocks is None else blocks)
    names = tuple(spectra.names[row] for row in rows)
    for row, name in zip(rows, names):
        if not spectra.known[row]:
            raise ValueError(f"blocks: {name!r} has no spectrum: its Hessian was never finite")
    if len(names) < 2:
        out = ", ".join(f"{name} ({reason})" for name, reason in (excluded(spectra, axis) if blocks is None else ()))
        raise ValueError(
            f"blocks: at least two are needed for a comparison, got {list(names)}"
            + (f"; excluded: {out}" if out else "")
        )
    return names


def resolved_axis(op: str, spectra: SpectraData, blocks: Sequence[str] | None, axis: str | Axis) -> Axis:
    """Return the axis for these blocks (None: all), with its scale; raise ValueError if it cannot normalize a block."""
    axis, names = as_axis(op, axis), [spectra.names[row] for row in spectra.rows(blocks)]
    if not names:
        which = f" that can be divided by {axis.divisor_name}" if axis.divisor_name else ""
        raise ValueError(f"{op}: blocks must name at least one{which}, got none")
    broken = _not_normalizable(spectra, axis)
    for name in names:
        if name in broken:
            raise ValueError(f"{op}: eigenvalues of {name!r} cannot be divided by {axis.divisor_name}: {broken[name]}")
    if axis.name == "asinh":
        if axis.scale is None:
            axis = replace(axis, scale=axes.default_scale(*distributions(spectra, names, axis)))
        if bool(distributions(spectra, names, axis)[0].isinf().any()):
            raise ValueError(f"{op}: scale must not be so small that eigenvalues over it overflow, got {axis.scale}")
    return axis


def quadrature_for(spectra: SpectraData, axis: Axis, quadrature: Quadrature | None = None) -> Quadrature:
    """Return the quadrature for an axis: on the asinh axis, eigenvalues within zero_tolerance are zero.

    There, errors of Hessian-vector products with a sharp block can be as large as the eigenvalues of a flat one.

    Args:
        quadrature: of the same blocks, such as that of some of the probes; None means the whole.
    """
    quadrature = quadrature or spectra.quadrature
    if axis.name == "linear":
        return quadrature
    is_zero = quadrature.nodes.abs() <= spectra.zero_tolerance[:, None]
    return replace(quadrature, nodes=quadrature.nodes.masked_fill(is_zero, 0.0))


def distributions(
    spectra: SpectraData, blocks: Sequence[str] | None, axis: Axis, quadrature: Quadrature | None = None
) -> tuple[Tensor, Tensor]:
    """Return nodes on a resolved axis and weights, (n_blocks, K) each, of all blocks by default; see quadrature_for."""
    rows = spectra.rows(blocks)
    nodes, weights = (part[rows] for part in quadrature_for(spectra, axis, quadrature).merged())
    divisors = axes.divisors(nodes, weights, [spectra.dims[row] for row in rows], axis.normalize)
    return axis.place(nodes / divisors[:, None]), weights


def default_sigma(spectra: SpectraData, blocks: Sequence[str] | None = None, axis: str | Axis = "asinh") -> float:
    """Return the default sigma of comparisons of these blocks: see density.default_sigma.

    Args:
        blocks: names; None means comparable_blocks(axis).
        axis: see Axis.
    """
    if blocks is None:
        blocks = comparable_blocks(spectra, as_axis("default_sigma", axis)) or None
    axis = resolved_axis("default_sigma", spectra, blocks, axis)
    return density.default_sigma(distributions(spectra, blocks, axis)[0])
