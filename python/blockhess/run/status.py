"""Progress of a run, read from its directory while it runs or afterwards. Nothing is computed or changed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from blockhess._text import printable
from blockhess.problem.blocks import BlockInfo, block_id
from blockhess.results.data import SpectraData
from blockhess.results.unit import Unit
from blockhess.run.plan import Plan
from blockhess.run.recorder import UnitResult
from blockhess.run.storage import directory
from blockhess.run.storage.lock import holder
from blockhess_ext import Quadrature, State, batched_slq


@dataclass(frozen=True)
class Status:
    """Progress of a run.

    Attributes:
        path: of the run's directory.
        run: content of run.json; empty while the job is being prepared.
        plan: the run's plan; None while the job is being prepared.
        parts: number of units computed.
        unit, step: unit being computed, and its step last saved; None and 0 if there is none.
        hvps: number of products saved.
        most: largest number of products that the plan allows.
        seconds: that the saved products took.
        finished: whether the run is finished.
        holder: process and host of the run, or None if it is not running.
        age: seconds since the last save; NaN if nothing has been saved.
    """

    path: Path
    run: dict[str, Any]
    plan: Plan | None
    parts: int = 0
    unit: Unit | None = None
    step: int = 0
    hvps: int = 0
    most: int = 0
    seconds: float = 0.0
    finished: bool = False
    holder: str | None = None
    age: float = math.nan

    @property
    def rate(self) -> float:
        """Products per second."""
        return self.hvps / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds left at this rate if all products that the plan allows are needed; None if no product is saved."""
        if self.finished:
            return 0.0
        return max(self.most - self.hvps, 0) / self.rate if self.rate else None

    def to_dict(self) -> dict[str, Any]:
        """Return the progress as a JSON value."""
        names = ("finished", "holder", "age", "parts", "step", "hvps", "most", "seconds", "rate", "seconds_left")
        values = {name: getattr(self, name) for name in names}
        return {"path": str(self.path), "prepared": self.plan is not None, **values}

    def __str__(self) -> str:
        path = printable(self.path)
        state = "finished" if self.finished else f"running ({self.holder})" if self.holder else "not running"
        if self.plan is None:
            return f"run           {path}, {state}; preparing model and data, no products computed yet"
        left = self.seconds_left
        lines = [
            f"run           {path}, {state}; last saved {self.age:.0f} s ago",
            f"done          {self.hvps:,} of at most {self.most:,} products "
            f"({100 * self.hvps / max(self.most, 1):.1f} %), {self.parts} unit(s)",
            f"rate          {self.rate:.3g} products a second, {self.seconds:.3g} s so far",
        ]
        if self.unit is not None:
            probes, blocks = self.unit.num_probes, f"{len(self.unit.blocks)} blocks"
            which = f"{probes} probes of {blocks}" if probes else f"{blocks}, computed exactly"
            lines.append(f"current       {which}, step {self.step}")
        if not self.finished:
            lines.append(f"left          {'unknown' if left is None else f'{left:.3g} s at most'}")
        return "\n".join(lines)


def status(path: str | PathLike[str]) -> Status:
    """Return the progress of the run in a directory.

    Raises:
        ValueError: path is not the directory of a run.
    """
    path = Path(path)
    working = holder(path)
    if working is not None and directory.begun_run(path) is None:
        return Status(path, {}, None, holder=working)
    run, parts, state = _saved(path, "status")
    files = [path / directory.RUN, path / directory.STATE, *(path / directory.PARTS).iterdir()]
    saved = [file.stat().st_mtime for file in files if file.exists()]
    return Status(
        path=path,
        run=run,
        plan=directory.plan_of(run),
        parts=len(parts),
        unit=state[0] if state else None,
        step=state[1].step if state else 0,
        hvps=_hvps(parts, state),
        most=run["hvps"],
        seconds=max([seconds for *_, seconds in parts] + ([state[3]] if state else []), default=0.0),
        finished=(path / directory.RESULT).exists(),
        holder=working,
        age=max(0.0, time.time() - max(saved)),
    )


def partial(path: str | PathLike[str], op: str = "partial") -> SpectraData:
    """Return what a run has saved so far: the computed units, and the steps of the unit being computed.

    Args:
        path: of the run's directory.
        op: prefix of error messages.

    Returns:
        The blocks with at least one step; the result of a finished run.

    Raises:
        ValueError: path is not the directory of a run, or nothing has been saved.
    """
    path = Path(path)
    if directory.begun_run(path) is not None and (path / directory.RESULT).exists():
        return directory.finished(path)
    run, saved, working = _saved(path, op)
    lists = ("shape", "parameters")
    blocks = [BlockInfo(**block | {name: tuple(block[name]) for name in lists}) for block in run["blocks"]]
    found: list[list[Quadrature]] = [[] for _ in blocks]
    pieces = [(done.unit, done.part) for _, done, _ in saved]
    if working is not None and working[0].num_probes:
        unit, state, *_ = working
        pieces.append((unit, _quadrature(run, [blocks[l] for l in unit.blocks], unit, state)))
    for unit, part in sorted(pieces, key=lambda piece: piece[0].first_probe):
        for column, l in enumerate(unit.blocks):
            block = part.select_block(column)
            if not unit.num_probes:  # computed exactly, perhaps after its first probes
                found[l] = [block]
            elif not any("exact" in other.reorthogonalize for other in found[l]):
                found[l].append(block)
    known = [l for l, parts in enumerate(found) if any(part.num_probes for part in parts)]
    if not known:
        raise ValueError(f"{op}: {printable(path)} holds no step of any block yet")
    quadrature = Quadrature.concatenate([Quadrature.concatenate(found[l], 0) for l in known], 1)
    made = {name: run["identity"][name] for name in ("model", "loss")} | {"partial": True}
    made |= {"hvps": _hvps(saved, working), "hvps_planned": run["hvps"], "blocks_missing": len(blocks) - len(known)}
    return SpectraData([blocks[l] for l in known], quadrature, made)


def _quadrature(run: dict[str, Any], blocks: list[BlockInfo], unit: Unit, state: State) -> Quadrature:
    """Return the quadrature of the steps made by a state, with the labels of the finished unit."""
    identity = run["identity"]

    def none(v: torch.Tensor) -> torch.Tensor:
        raise AssertionError("no step is left")

    options = {name: identity[name] for name in ("tol", "distribution")} | {"sigma": identity["tol_sigma"]}
    part = batched_slq(
        none, [block.dim for block in blocks], num_probes=unit.num_probes, num_steps=state.step, seed=run["seed"],
        dtype=getattr(torch, identity["dtype"]), on_nonfinite="mark", state=state, **options,
    )  # fmt: skip
    ids = tuple(block_id(block.name) for block in blocks)
    return replace(part, num_steps=identity["num_steps"], block_ids=ids)


def _saved(
    path: Path, op: str
) -> tuple[dict[str, Any], list[tuple[int, UnitResult, float]], tuple[Unit, State, int, float] | None]:
    """Return run.json, the computed units, and the saved state unless its unit is already computed."""
    run = directory.begun_run(path)
    if run is None:
        shown = printable(path)
        raise ValueError(
            f"{op}: {shown} must be the directory of a run; start one with: blockhess run JOB --out {shown}"
        )
    parts, state = directory.parts(path, run["id"]), directory.state_of(path / directory.STATE, run["id"])
    return run, parts, None if state is None or any(done.unit == state[0] for _, done, _ in parts) else state


def _hvps(parts: list[tuple[int, UnitResult, float]], state: tuple[Unit, State, int, float] | None) -> int:
    return sum(done.hvps for _, done, _ in parts) + (state[2] if state else 0)
