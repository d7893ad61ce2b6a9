"""Learning rates of blockwise gradient descent.

    rate of block l = factor / lambda_max(H_l)

Source: Zhang et al. 2024, the proof of Theorem 1.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from blockhess.analysis.statistics import eigenvalue_range
from blockhess.problem.blocks import partition, unwrap
from blockhess.results.data import SpectraData


def rates(spectra: SpectraData, factor: float = 1.0) -> dict[str, float | None]:
    """Return block -> factor / lambda_max; None if lambda_max is unknown, or not positive beyond rounding.

    Example:
        >>> rates(spectra)["0.weight"] == 1 / spectra["0.weight"].lambda_max
        True
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"rates: factor must be positive, got {factor}")
    zero = set(spectra.zero_blocks)
    largest = zip(spectra.names, eigenvalue_range(spectra)[1].tolist(), spectra.zero_tolerance.tolist())
    return {name: factor / value if value > least and name not in zero else None for name, value, least in largest}


def param_groups(spectra: SpectraData, model: nn.Module, factor: float = 1.0) -> list[dict[str, Any]]:
    """Return parameter groups for a torch optimizer, with a learning rate for every block.

    Blocks without positive curvature, and trainable parameters outside all blocks, get the smallest of the other rates.
    1 / lambda_max applies to the parameter values and the batch of the spectra. Use a smaller factor with small
    batches, with momentum, or at initialization, where curvature still grows.

    Args:
        model: the model of the spectra, whose blocks must be whole parameters.
        factor: multiplies all rates.

    Returns:
        One group per block with keys params, lr, name; and a group "rest" for trainable parameters in no block.

    Raises:
        ValueError: a block is a slice of a parameter, the model has no such parameter, or no block has a rate.

    Example:
        >>> optimizer = torch.optim.SGD(spectra.param_groups(model, factor=0.1), momentum=0.9)
    """
    rate_of = rates(spectra, factor)
    known = [rate for rate in rate_of.values() if rate is not None]
    if not known:
        raise ValueError("param_groups: one block at least must have a positive eigenvalue, got none")
    tensors = {block.info.name: block.pieces[0].tensor for block in partition(unwrap(model)).blocks}
    groups, rest = [], dict(tensors)
    for block in spectra.blocks:
        unknown = [name for name in block.parameters if name not in tensors]
        if unknown:
            raise ValueError(
                f"param_groups: model must have the parameters of the spectra, got none called {unknown[0]!r}"
            )
        if block.dim != sum(tensors[name].numel() for name in block.parameters):
            raise ValueError(f"param_groups: blocks must be whole parameters, got {block.name!r}")
        params = [rest.pop(name) for name in block.parameters if name in rest]
        groups.append({"params": params, "lr": rate_of[block.name] or min(known), "name": block.name})
    if rest:
        groups.append({"params": list(rest.values()), "lr": min(known), "name": "rest"})
    return groups
