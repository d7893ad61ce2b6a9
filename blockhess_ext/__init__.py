"""Batched stochastic Lanczos quadrature on torch tensors, independent of models and autograd."""

from __future__ import annotations

import torch  # noqa: F401  (loads the libraries that the extension links against)

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
    """Return how the extension was built: versions of torch and compiler, CUDA version and architectures, such as
    "sm_80,sm_90,compute_90" (both None without CUDA), the instruction set in use and the tile length."""
    return dict(_C.build_info())


__all__ = ["NonFiniteError", "Quadrature", "State", "batched_slq", "build_info", "ops", "reference"]
