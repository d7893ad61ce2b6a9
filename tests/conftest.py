"""What every test file may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Where several processes share the tests, each has one thread, and so has what it starts. Said before torch is loaded.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Of processes that tests start in other folders too.
if "PYTHONPATH" in os.environ:
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, os.environ["PYTHONPATH"].split(os.pathsep)))

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(params=DTYPES, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


PASSED_OVER = pytest.StashKey[dict[str, dict[str, str]]]()


@pytest.fixture
def passed_over(request: pytest.FixtureRequest) -> dict[str, dict[str, str]]:
    """Of every page what was not run, and why; listed at the end of pytest's output."""
    return request.config.stash.setdefault(PASSED_OVER, {})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process that shares the tests hands over what it passed over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["passed over"] = session.config.stash.get(PASSED_OVER, {})


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    found = getattr(node, "workeroutput", {}).get("passed over", {})  # nothing of one that crashed
    node.config.stash.setdefault(PASSED_OVER, {}).update(found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for page, found in config.stash.get(PASSED_OVER, {}).items():
        if found:
            terminalreporter.section(f"passed over in {page}")
        for what, why in found.items():
            terminalreporter.line(f"{what.splitlines()[0]}: {why}")


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
