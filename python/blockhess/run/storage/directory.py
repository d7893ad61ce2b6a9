"""A run directory: all that is needed to resume a run, bit for bit, after any end of the process.

    run.json             identity, plan, seed and blocks of the run; written before the first product
    parts/00000.safetensors ...     results of the computed units
    vectors/00000.safetensors ...   their states after the last step, if vectors are kept
    state.safetensors    state of the unit being computed; state-1.safetensors ... those of other ranks
    spectra.npz          the result of the finished run
    lock                 names the process that uses the directory

The result of a unit is written before the next unit is begun: the state is valid until its unit has a result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from blockhess._text import format_table, printable
from blockhess.problem.batches import DRAWN_ANEW
from blockhess.problem.blocks import BlockInfo
from blockhess.problem.prepare import LOSS_TOLERANCE
from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup, _short
from blockhess.results import files
from blockhess.results.data import SpectraData
from blockhess.results.unit import Unit
from blockhess.run.plan import Plan
from blockhess.run.recorder import Recorder, UnitResult
from blockhess.run.storage import store
from blockhess.run.storage.checkpoint import Checkpoints
from blockhess.run.storage.lock import locked
from blockhess.run.storage.parts import read_part, read_state, write_part, write_state
from blockhess.run.storage.signals import Catcher, caught
from blockhess_ext import State

RUN, STATE, RESULT, PARTS, VECTORS = "run.json", "state.safetensors", "spectra.npz", "parts", "vectors"
VERSION = 1

# Names that a directory may contain before run.json is written, by this process or one that was killed.
_OURS = re.compile(rf"lock|{PARTS}|{VECTORS}|\.[0-9a-f]{{16}}\.tmp")


class RunMismatch(ValueError):
    """The directory holds a different run; the message is a table of the differences."""


class RunDirectory(Recorder):
    """Records a run on disk.

    Ranks that share recurrences write their own results and states and read those of all ranks. Of the ranks that share
    batches, which have the same results, the first one writes. `run` is the content of run.json, None for a new run.
    """

    def __init__(self, path: Path, signals: Catcher, ranks: ProcessGroup = SINGLE_PROCESS) -> None:
        super().__init__()
        self.path, self.run, self._ranks = path, read_run(path), ranks
        self._state_file = path / (f"state-{ranks.work_rank}.safetensors" if ranks.work_rank else STATE)
        self._signals = signals
        self._done: dict[Unit, UnitResult] = {}
        self._state: tuple[Unit, State, int, float] | None = None
        self._unit: Unit | None = None
        self._next_file = ranks.rank
        self._seconds, self._start = 0.0, time.perf_counter()
        self.checkpoints = Checkpoints(self._save_state)

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken: those recorded, and those of this process."""
        return self._seconds + time.perf_counter() - self._start

    @property
    def plan(self) -> Plan | None:
        """Plan of the recorded run, or None for a new run."""
        return None if self.run is None else plan_of(self.run)

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise RunMismatch, with a table of the differences, unless a recorded run is the one of this identity."""
        differing = [] if self.run is None else differences(self.run["identity"], identity)
        if differing:
            table = format_table(["", "this run", "in the directory"], [[n, now, then] for n, then, now in differing])
            advice = f"\n{DRAWN_ANEW}" if any(name == "data" for name, *_ in differing) else ""
            raise RunMismatch(
                f"spectrum: run_dir must hold a run of the same job, {printable(self.path)} differs:\n{table}{advice}"
            )

    def begin(self, identity: Mapping[str, Any], plan: Plan, seed: int, blocks: Sequence[BlockInfo], hvps: int) -> None:
        """Write run.json of a new run, which needs at most `hvps` products, or read the results of a recorded one."""
        self.keep_vectors = identity["keep_vectors"]
        if self.run is None:
            self.run = {
                "version": VERSION,
                "id": self._ranks.gather(secrets.token_hex(16))[0],
                "identity": dict(identity),
                "plan": dataclasses.asdict(plan),
                "seed": seed,
                "hvps": hvps,
                "blocks": [dataclasses.asdict(block) for block in blocks],
            }
            if self._ranks.rank:
                return
            with _explained(self.path):
                for folder in (PARTS, VECTORS) if self.keep_vectors else (PARTS,):
                    (self.path / folder).mkdir(exist_ok=True)
                store.write_json(self.path / RUN, self.run)
            return
        with _explained(self.path):
            found, self._state = parts(self.path, self.run["id"]), state_of(self._state_file, self.run["id"])
        self._next_file = max((number for number, *_ in found), default=-1) + 1 + self._ranks.rank
        self._seconds = max([seconds for *_, seconds in found] + ([self._state[3]] if self._state else []), default=0.0)
        for number, done, _ in found:
            if self.keep_vectors and done.unit.num_probes:
                last = state_of(_file(self.path, VECTORS, number), self.run["id"])
                if last is None:
                    store.disk.unlink(_file(self.path, PARTS, number))
                    continue
                done = dataclasses.replace(done, last=last[1])
            self._done[done.unit] = done

    def result(self) -> SpectraData | None:
        """Return the result of a finished run with its vectors, else None."""
        return finished(self.path) if (self.path / RESULT).exists() else None

    def finish(self, result: SpectraData) -> None:
        """Write the result and remove the states."""
        if self._ranks.rank:
            return
        try:
            files.write(self.path / RESULT, result.blocks, result.quadrature, result.provenance)
        except ValueError as error:
            raise OSError(f"spectrum: the run is complete, but {error}; fix this and call again") from None
        for file in self.path.glob("state*.safetensors*"):
            with contextlib.suppress(OSError):
                store.disk.unlink(str(file))

    # Methods of Recorder.

    def done(self, unit: Unit) -> UnitResult | None:
        done = self._done.get(unit)
        if done is not None and done.last is not None:
            self.vectors.append((unit, done.last))
        return done

    def finished(self) -> list[UnitResult]:
        return list(self._done.values())

    def in_work(self) -> Unit | None:
        return None if self._state is None else self._state[0]

    def is_cut(self, unit: Unit) -> bool:
        return any(unit.holds(other) for other in [*self._done, self.in_work()] if other)

    def state(self, unit: Unit) -> tuple[State | None, int]:
        if self._state is None or self._state[0] != unit:
            return None, 0
        return self._state[1], self._state[2]

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._signals.working():  # signals wait until the state is saved
            yield

    def after_step(self, unit: Unit, state: State, hvps: int) -> None:
        self._unit = unit
        if self._signals.pending is not None:
            if not self._ranks.data_rank:
                self.checkpoints.save_now(state, hvps)
            self._signals.check()
        if not self._ranks.data_rank:
            self.checkpoints.after_step(state, hvps)

    def add(self, done: UnitResult) -> None:
        super().add(done)
        self.checkpoints.forget()
        if self._ranks.data_rank:
            return
        assert self.run is not None
        number, seconds, run = self._next_file, self.seconds, self.run["id"]
        with _explained(self.path):
            if done.last is not None:
                write_state(_file(self.path, VECTORS, number), run, done.unit, done.last, done.hvps, seconds)
            write_part(_file(self.path, PARTS, number), run, done, seconds)
        self._next_file = number + self._ranks.size

    def _save_state(self, state: State, hvps: int) -> None:
        assert self._unit is not None and self.run is not None
        with _explained(self.path):
            write_state(self._state_file, self.run["id"], self._unit, state, hvps, self.seconds)


@contextmanager
def opened(path: str | PathLike[str], ranks: ProcessGroup = SINGLE_PROCESS) -> Iterator[RunDirectory]:
    """Open a run directory, created if it is missing, for exclusive use by these ranks. The first one locks it.

    Raises:
        ValueError: it is in use, cannot be created or written to, or holds other files.
        TypeError: path is not a path.
    """
    if not isinstance(path, str | PathLike):
        raise TypeError(f"run_dir: must be a path, got {path!r}")
    folder = Path(path).absolute()  # the working directory may change
    if ranks.rank == 0:
        files.writable_folder(folder)
    with contextlib.ExitStack() as stack:
        try:
            if ranks.rank == 0:
                stack.enter_context(locked(folder))
        except OSError as error:
            raise ValueError(f"run_dir: cannot write in {printable(folder)}: {error.strerror or error}") from None
        ranks.gather(None)  # the folder exists for the other ranks
        with _explained(folder):
            run = RunDirectory(folder, stack.enter_context(caught()), ranks)
        yield run


def begun_run(path: Path) -> dict[str, Any] | None:
    """Return the content of run.json, or None if path is a file, or a folder that holds no run."""
    return read_run(path) if path.is_dir() and _any_generation(path / RUN) else None


def read_run(path: Path) -> dict[str, Any] | None:
    """Return the content of run.json, or None for a new run directory.

    Raises:
        ValueError: run.json is damaged or of another version, or the directory holds other files instead.
    """
    if not _any_generation(path / RUN):
        others = sorted(file.name for file in path.iterdir() if not _OURS.fullmatch(file.name))
        if others:
            raise ValueError(
                f"run_dir: must be empty or hold a run, {printable(path)} holds {printable(', '.join(others[:3]))}"
            )
        return None
    try:
        run = store.read_json(path / RUN)
    except ValueError:
        if not store.disk.exists(path / RUN):  # killed during the first write
            return None
        raise
    if not isinstance(run, dict) or run.get("version") != VERSION:
        raise ValueError(f"run_dir: {printable(path / RUN)} must be of version {VERSION}")
    return run | {"identity": files.with_current_names(run["identity"])}


def _any_generation(file: Path) -> bool:
    return any(store.disk.exists(f"{file}{end}") for end in ("", ".new", ".previous"))


def plan_of(run: Mapping[str, Any]) -> Plan:
    """Return the plan in run.json, also of a run before all blocks had one linear program: it is continued by that."""
    plan = {"traced": run["plan"]["engine"] == "traced", "checked": range(len(run["plan"]["exact"])), "check_bytes": 0}
    plan |= run["plan"]
    plan.pop("compiled", None)
    passes = tuple((first, count, tuple(blocks)) for first, count, blocks in plan["passes"])
    return Plan(**plan | {"exact": tuple(plan["exact"]), "checked": tuple(plan["checked"]), "passes": passes})


def parts(path: Path, run: str) -> list[tuple[int, UnitResult, float]]:
    """Return number of the file, result, and seconds of the run so far, of every computed unit in order.

    Files that are damaged or do not have the id `run` are skipped with a warning; their units are computed again.
    """
    names = (re.match(r"(\d+)\.safetensors", file.name, re.ASCII) for file in (path / PARTS).iterdir())
    found = []
    for number in sorted({int(name[1]) for name in names if name}):
        with _warned(_file(path, PARTS, number)):
            found.append((number, *read_part(_file(path, PARTS, number), run)))
    return found


def state_of(file: Path, run: str) -> tuple[Unit, State, int, float] | None:
    """Return unit, state, number of products and seconds of the run in a state file, or None if it is not readable."""
    if _any_generation(file):
        with _warned(file):
            return read_state(file, run)
    return None


@contextmanager
def _warned(file: Path, consequence: str = "its work is repeated") -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if store.disk.exists(file):  # else killed during the first write
            warnings.warn(f"run_dir: {error}; {consequence}", stacklevel=4)


def _file(path: Path, folder: str, number: int) -> Path:
    return path / folder / f"{number:05}.safetensors"


def finished(path: str | PathLike[str]) -> SpectraData:
    """Return the result of a finished run, with its vectors if they were kept.

    Raises:
        ValueError: the run is not finished, or a file is damaged.
    """
    path = Path(path)
    if not (path / RESULT).exists() and begun_run(path) is not None:
        raise ValueError(
            f"run_dir: run must be finished, {printable(path)} is not; resume it with the same arguments first"
        )
    result = files.read(path / RESULT)
    run = ((path / VECTORS).is_dir() and read_run(path)) or {}
    vectors = []
    for number, done, _ in parts(path, run["id"]) if run else []:
        if done.unit.num_probes:
            with _warned(_file(path, VECTORS, number), "extend cannot add steps to it"):
                vectors.append(read_state(_file(path, VECTORS, number), run["id"])[:2])
    return SpectraData(*result, vectors)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return name, recorded value and present value of every entry in which two identities differ."""
    found = []
    for name in [*then, *(name for name in now if name not in then)]:
        a: Any = then.get(name)
        b: Any = now.get(name)
        same_loss = name == "value of the loss" and math.isclose(a, b, rel_tol=LOSS_TOLERANCE)
        if a != b and not same_loss:
            found.append((name, _short(a), _short(b)))
    return found


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"spectrum: run_dir must be writable, got {printable(path)}: {error.strerror or error}; the state saved "
            "last is intact: fix this and call again"
        ) from None
