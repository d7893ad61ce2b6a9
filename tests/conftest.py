"""What every test file may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Of processes that tests start in other folders too.
if "PYTHONPATH" in os.environ:
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, os.environ["PYTHONPATH"].split(os.pathsep)))

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def float64_models() -> Iterator[None]:
    """Models and data that a test makes are float64, and the same in every run."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
