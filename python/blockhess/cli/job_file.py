"""Jobs that the command line is given by name: a function that returns the arguments of `spectrum`.

    job.py:make      a file                package.module:make      an importable module

Code is imported because the user named it on the command line, and for no other reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from blockhess.estimate import spectrum


def load(path: str) -> dict[str, Any]:
    """The arguments of `spectrum` that the job at `path` returns.

    Raises:
        ValueError: no such file, module or function, or what it returns is not a mapping of arguments of `spectrum`.

    Example:
        >>> sorted(load("blockhess.cli.demo:gpt_job"))
        ['batchnorm', 'data', 'loss_fn', 'model', 'num_probes', 'num_steps']
    """
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise ValueError(f"job: must be FILE.py:FUNCTION or MODULE:FUNCTION, got {path!r}")
    function = getattr(_module(place), name, None)
    if not callable(function):
        raise ValueError(f"job: {place!r} must have a function {name!r}, got {function!r}")
    arguments = function()
    known = inspect.signature(spectrum).parameters
    if not isinstance(arguments, Mapping) or not {"model", "data"} <= arguments.keys() <= known.keys():
        got = sorted(arguments) if isinstance(arguments, Mapping) else type(arguments).__name__
        raise ValueError(
            f"job: {path!r} must return a mapping with 'model', 'data' and other arguments of spectrum, got {got}"
        )
    return dict(arguments)


def _module(place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        if error.name and place != error.name and not place.startswith(f"{error.name}."):
            raise ValueError(f"job: {place!r} imports the module {error.name!r}, which must be installed") from None
        raise ValueError(f"job: {place!r} must be there, got {error}") from None
    except FileNotFoundError as error:
        raise ValueError(f"job: {place!r} must be there, got {error}") from None
