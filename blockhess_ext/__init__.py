"""Batched stochastic Lanczos quadrature: arrays in, arrays out. It knows torch, but neither models nor autograd."""

from __future__ import annotations

import torch  # noqa: F401  (the extension links against the libraries that this loads)

try:
    import blockhess_ext._C as _C
except ImportError as error:
    raise ImportError(
        "blockhess_ext is not compiled for this Python and torch; in blockhess' source folder run: "
        "pip install --no-build-isolation -e .   (without -e it works outside that folder only, which hides what is "
        f"installed: {error})"
    ) from error

from blockhess_ext import ops, reference
from blockhess_ext.quadrature import Quadrature
from blockhess_ext.slq import NonFiniteError, batched_slq
from blockhess_ext.state import State


def build_info() -> dict[str, str | int | None]:
    """What was built: torch and compiler versions, CUDA version and architectures ("sm_80,sm_90,compute_90"; both None
    without CUDA), instruction set in use, tile length."""
    return dict(_C.build_info())


__all__ = ["NonFiniteError", "Quadrature", "State", "batched_slq", "build_info", "ops", "reference"]
