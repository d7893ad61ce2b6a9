"""Units of work as files: the quadratures of one that is done, and the state of one in work.

Each names its run, so that a file of another one is not taken for work of this.
"""

from __future__ import annotations

import dataclasses
from os import PathLike
from typing import Any

from torch import Tensor

from blockhess.run.recorder import Unit, UnitResult
from blockhess.run.storage import store
from blockhess_ext import Quadrature, State


def write_part(path: str | PathLike[str], run: str, done: UnitResult, seconds: float) -> None:
    """Writes what is done, and the seconds that the run has taken so far."""
    part = done.part
    labels = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.name not in Quadrature.TENSORS}
    tensors: dict[str, Tensor] = {name: getattr(part, name) for name in Quadrature.TENSORS}
    header = {"run": run, "unit": dataclasses.asdict(done.unit), "hvps": done.hvps, "seconds": seconds}
    store.write(path, tensors, header | {"quadrature": labels})


def read_part(path: str | PathLike[str], run: str) -> tuple[UnitResult, float]:
    """What `write_part` was given.

    Raises:
        ValueError: the file is damaged, or of another run, or holds something else.
    """
    tensors, header = store.read(path)
    try:
        _check_run(header, run)
        values: dict[str, Any] = {name: _tuples(value) for name, value in header["quadrature"].items()}
        values.update(tensors)
        done = UnitResult(_unit(header["unit"]), Quadrature(**values), int(header["hvps"]))
        return done, float(header["seconds"])
    except (TypeError, LookupError, ValueError) as error:
        raise ValueError(f"read: {path} is not a part of a run: {error}") from None


def write_state(path: str | PathLike[str], run: str, unit: Unit, state: State, hvps: int, seconds: float) -> None:
    """Writes the state of a unit in work, the products that it took, and the seconds that the run has taken so far."""
    header = {
        "run": run,
        "unit": dataclasses.asdict(unit),
        "hvps": hvps,
        "seconds": seconds,
        "step": state.step,
        "reorthogonalize": state.reorthogonalize,
    }
    store.write(path, state.tensors, header)


def read_state(path: str | PathLike[str], run: str) -> tuple[Unit, State, int, float]:
    """What `write_state` was given.

    Raises:
        ValueError: there is none, it is damaged, or of another run, or it holds something else.
    """
    tensors, header = store.read(path)
    try:
        _check_run(header, run)
        state = State(int(header["step"]), tuple(header["reorthogonalize"]), tensors)
        return _unit(header["unit"]), state, int(header["hvps"]), float(header["seconds"])
    except (TypeError, LookupError, ValueError) as error:
        raise ValueError(f"read: {path} is not the state of a run: {error}") from None


def _check_run(header: dict[str, Any], run: str) -> None:
    if header["run"] != run:
        raise ValueError("it belongs to another run")


def _unit(entry: dict[str, Any]) -> Unit:
    return Unit(int(entry["first_probe"]), int(entry["num_probes"]), tuple(map(int, entry["blocks"])))


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
