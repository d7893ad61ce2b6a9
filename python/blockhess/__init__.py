"""Hessian eigenvalue densities of every parameter block of a neural network, by stochastic Lanczos quadrature."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from blockhess._version import __version__

if TYPE_CHECKING:
    from blockhess.analysis.axes import Axis
    from blockhess.analysis.jensen_shannon import JS0
    from blockhess.estimate import NonFiniteError, extend, plan, spectrum
    from blockhess.problem.blocks import BlockInfo, ParameterSlice, heads
    from blockhess.sign_descent import SignGain, sign_gain
    from blockhess.spectra import Spectra, load, merge

__all__ = [
    "Axis",
    "BlockInfo",
    "JS0",
    "NonFiniteError",
    "ParameterSlice",
    "Plan",
    "SignGain",
    "Spectra",
    "__version__",
    "extend",
    "heads",
    "load",
    "merge",
    "plan",
    "sign_gain",
    "spectrum",
]

_MODULES = {
    "Axis": "analysis.axes",
    "BlockInfo": "problem.blocks",
    "ParameterSlice": "problem.blocks",
    "heads": "problem.blocks",
    "NonFiniteError": "estimate",
    "Plan": "run.plan",
    "extend": "estimate",
    "plan": "estimate",
    "spectrum": "estimate",
    "SignGain": "sign_descent",
    "sign_gain": "sign_descent",
    "JS0": "analysis.jensen_shannon",
    "Spectra": "spectra",
    "load": "spectra",
    "merge": "spectra",
}


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, which `blockhess --help` need not spend."""
    if name not in _MODULES:
        raise AttributeError(f"module 'blockhess' has no attribute {name!r}")
    return getattr(importlib.import_module(f"blockhess.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
