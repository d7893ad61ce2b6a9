"""Batched stochastic Lanczos quadrature on torch tensors, independent of models and autograd."""

from __future__ import annotations

from pathlib import Path
from pkgutil import extend_path

import torch  # loads the libraries that the extension links against

if torch.__version__ < "2.10":  # compared as versions
    raise ImportError(
        f"blockhess_ext: torch must be 2.10 or newer, got {torch.__version__}; run: pip install 'torch>=2.10'"
    )

if not any(Path(__path__[0]).glob("_C*.so")):
    # Started in the source folder, Python finds these sources before what is installed.
    __path__[:] = [folder for folder in extend_path(__path__, __name__) if any(Path(folder).glob("_C*.so"))] or __path__

try:
    import blockhess_ext._C as _C
except ModuleNotFoundError as error:
    raise ImportError(
        f"blockhess_ext: {__path__[0]} must hold the module compiled for this Python, and does not; in blockhess' "
        "source folder run: pip install ."
    ) from error
except ImportError as error:
    raise ImportError(
        f"blockhess_ext: the compiled module does not load with torch {torch.__version__} ({error}); compile it "
        "against this torch, in blockhess' source folder run: pip install setuptools pybind11 ninja && "
        "pip install --no-build-isolation ."
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
