"""Jobs given on the command line: a function without arguments that returns the arguments of `spectrum`.

    job.py:make      function of a file                package.module:make      function of an importable module

Code is imported only because the user named it on the command line.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from blockhess._text import printable
from blockhess.estimate import spectrum
from blockhess.problem.batches import as_batches, known_device, map_tensors


def load(job: str, device: str | None = None) -> dict[str, Any]:
    """Call the function that a job, FILE.py:FUNCTION or MODULE:FUNCTION, names and return the arguments of `spectrum`.

    Args:
        job: see above.
        device: device to which model, loss and data are moved; None leaves them where they are.

    Raises:
        ValueError: there is no such device, file, module or function, or it does not return arguments of `spectrum`.

    Example:
        >>> sorted(load("blockhess.cli.demo:gpt_job"))
        ['batchnorm', 'data', 'loss_fn', 'model']
    """
    if job.partition(":")[0].endswith(".toml"):
        raise ValueError(
            f"job: TOML files are not supported, got {job!r}; write FILE.py with a function that returns a dict of "
            "the arguments of spectrum, and pass FILE.py:FUNCTION"
        )
    place, _, name = job.rpartition(":")
    if not place or not name:
        raise ValueError(f"job: must be FILE.py:FUNCTION or MODULE:FUNCTION, got {job!r}")
    function = getattr(_module(place), name, None)
    if not callable(function):
        raise ValueError(f"job: {place!r} must define a function {name!r}, got {function!r}")
    arguments = function()
    if not isinstance(arguments, Mapping) or not {"model", "data"} <= arguments.keys():
        got = sorted(map(str, arguments)) if isinstance(arguments, Mapping) else type(arguments).__name__
        raise ValueError(f"job: {job!r} must return a mapping with 'model' and 'data', got {got}")
    if unknown := arguments.keys() - inspect.signature(spectrum).parameters.keys():
        raise ValueError(f"job: {job!r} must return arguments of spectrum only, got {sorted(map(str, unknown))}")
    return dict(arguments) if device is None else on_device(dict(arguments), device)


def on_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the arguments of `spectrum` with model, loss and data on a device.

    Raises:
        ValueError: there is no such device.
    """
    known_device(device, "--device")
    batches = as_batches(arguments["data"], pairs=False)
    moved = {"model": arguments["model"].to(device), "data": [map_tensors(lambda t: t.to(device), b) for b in batches]}
    if isinstance(arguments.get("loss_fn"), nn.Module):
        moved["loss_fn"] = arguments["loss_fn"].to(device)
    return arguments | moved


def _module(place: str) -> ModuleType:
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"job: no such file: {printable(place)}")
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        if error.name is None or f"{place}.".startswith(f"{error.name}."):
            raise ValueError(f"job: cannot import {place!r}: {error}") from None
        raise ValueError(f"job: {place!r} imports the module {error.name!r}, which must be installed") from None
