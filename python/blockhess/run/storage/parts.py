"""Units of work as files: the result of a computed unit, and the state of one that is being computed.

Each file contains the id of its run, so that files of other runs are rejected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

from blockhess._text import printable
from blockhess.results.unit import Unit
from blockhess.run.recorder import UnitResult
from blockhess.run.storage import store
from blockhess_ext import Quadrature, State


def write_part(path: str | PathLike[str], run: str, done: UnitResult, seconds: float) -> None:
    """Write the result of a unit and the seconds that the run has taken so far."""
    values = {f.name: getattr(done.part, f.name) for f in dataclasses.fields(done.part)}
    tensors = {name: values.pop(name) for name in Quadrature.TENSORS}
    store.write(path, tensors, _header(run, done.unit, done.hvps, seconds) | {"quadrature": values})


def read_part(path: str | PathLike[str], run: str) -> tuple[UnitResult, float]:
    """Return what `write_part` wrote; a ValueError names a file that is damaged, of another run or of another kind."""
    tensors, header = store.read(path)
    with _check(path, header, run, "a part"):
        labels: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in header["quadrature"].items()}
        done = UnitResult(_unit(header), Quadrature(**labels | tensors), int(header["hvps"]))
        return done, float(header["seconds"])


def write_state(path: str | PathLike[str], run: str, unit: Unit, state: State, hvps: int, seconds: float) -> None:
    """Write the state of a unit, the number of products computed for it, and the seconds that the run has taken."""
    header = _header(run, unit, hvps, seconds) | {"step": state.step, "reorthogonalize": state.reorthogonalize}
    store.write(path, state.tensors, header)


def read_state(path: str | PathLike[str], run: str) -> tuple[Unit, State, int, float]:
    """Return what `write_state` wrote; raises like `read_part`."""
    tensors, header = store.read(path)
    if "calm" in tensors:  # name of "converged" in earlier files
        tensors["converged"] = tensors.pop("calm")
    with _check(path, header, run, "the state"):
        state = State(int(header["step"]), tuple(header["reorthogonalize"]), tensors)
        return _unit(header), state, int(header["hvps"]), float(header["seconds"])


@contextmanager
def _check(path: str | PathLike[str], header: dict[str, Any], run: str, what: str) -> Iterator[None]:
    try:
        if header["run"] != run:
            raise ValueError("it belongs to another run")
        yield
    except (TypeError, LookupError, ValueError, OverflowError) as error:
        raise ValueError(f"read: {printable(path)} is not {what} of a run: {error}") from None


def _header(run: str, unit: Unit, hvps: int, seconds: float) -> dict[str, Any]:
    return {"run": run, "unit": dataclasses.asdict(unit), "hvps": hvps, "seconds": seconds}


def _unit(header: dict[str, Any]) -> Unit:
    unit = header["unit"]
    return Unit(int(unit["first_probe"]), int(unit["num_probes"]), tuple(map(int, unit["blocks"])))
