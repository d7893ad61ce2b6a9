"""A run directory: all that a run needs to go on after any kind of end, to the same bits.

    run.json             what the run is, its plan, seed and blocks: written before the first product
    parts/00000.safetensors ...     the units of work that are done
    vectors/00000.safetensors ...   their states after the last step, where they are kept
    state.safetensors    the state of the unit in work; state-1.safetensors ... those of other ranks
    spectra.npz          the result, once all is done
    lock                 who works in it

A part is written before the next unit begins, so the state counts as long as there is no part of its unit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from blockhess._text import format_table
from blockhess.problem.blocks import BlockInfo
from blockhess.problem.prepare import LOSS_TOLERANCE
from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup
from blockhess.results import files
from blockhess.run.plan import Plan
from blockhess.run.recorder import Recorder, Unit, UnitResult
from blockhess.run.storage import store
from blockhess.run.storage.checkpoint import Checkpoints
from blockhess.run.storage.lock import locked
from blockhess.run.storage.parts import read_part, read_state, write_part, write_state
from blockhess.run.storage.signals import Catcher, caught
from blockhess.spectra import Spectra
from blockhess_ext import State

RUN, STATE, RESULT, PARTS, VECTORS = "run.json", "state.safetensors", "spectra.npz", "parts", "vectors"
VERSION = 1

# What may be there before run.json: also what another process, or one that was killed, tries writing with.
_OURS = re.compile(rf"lock|{PARTS}|{VECTORS}|\.[0-9a-f]{{16}}\.tmp")


class RunMismatch(ValueError):
    """A directory holds another run; the text has a table of what differs."""


class RunDirectory(Recorder):
    """The records of a run, on disk.

    Ranks that share recurrences write their own parts and states, and read those of all; of those that share batches,
    and so have the same, the first one writes.

    Args:
        path: of the directory.
        signals: what asks the run to end.
        ranks: which share the run.

    Attributes:
        run: content of run.json, or None where no run was begun.
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
        """That the run has taken, as far as it was saved, and this process."""
        return self._seconds + time.perf_counter() - self._start

    @property
    def plan(self) -> Plan | None:
        """Of the run that was begun."""
        return None if self.run is None else plan_of(self.run)

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuses a directory whose run is another one.

        Raises:
            OtherRun: with a table of what differs.
        """
        if self.run is None:
            return
        differing = differences(self.run["identity"], identity)
        if differing:
            table = format_table(["", "this run", "in the directory"], [[n, now, then] for n, then, now in differing])
            raise RunMismatch(f"spectrum: run_dir must hold a run of the same job, {self.path} differs:\n{table}")

    def begin(
        self,
        identity: Mapping[str, Any],
        plan: Plan,
        seed: int,
        blocks: tuple[BlockInfo, ...],
        keep_vectors: bool,
        hvps: int,
    ) -> None:
        """Writes what the run is, or reads what it has done; hvps are at most to be made."""
        self.keep_vectors = keep_vectors
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
                for folder in (PARTS, VECTORS) if keep_vectors else (PARTS,):
                    (self.path / folder).mkdir(exist_ok=True)
                store.write_json(self.path / RUN, self.run)
            return
        with _explained(self.path):
            found, self._state = parts(self.path, self.run["id"]), state_of(self._state_file, self.run["id"])
        self._next_file = max((number for number, *_ in found), default=-1) + 1 + self._ranks.rank
        for number, done, seconds in found:
            if keep_vectors and done.unit.num_probes:
                last = _state_in(_file(self.path, VECTORS, number), self.run["id"])
                if last is None:
                    store.disk.unlink(_file(self.path, PARTS, number))
                    continue
                done = dataclasses.replace(done, last=last[1])
            self._done[done.unit] = done
            self._seconds = max(self._seconds, seconds)
        self._seconds = max(self._seconds, self._state[3] if self._state else 0.0)

    def result(self) -> Spectra | None:
        """The result of a run that was finished, with its vectors."""
        if not (self.path / RESULT).exists():
            return None
        return finished(self.path)

    def finish(self, spectra: Spectra) -> None:
        """Writes the result; the states are of no use any more."""
        if self._ranks.rank:
            return
        try:
            files.save(spectra, self.path / RESULT)
        except ValueError as error:
            raise OSError(f"spectrum: all is computed and kept, but {error}; mend that and call again") from None
        for file in self.path.glob("state*.safetensors*"):
            with contextlib.suppress(OSError):
                store.disk.unlink(str(file))

    def done(self, unit: Unit) -> UnitResult | None:
        """As in `Records`."""
        done = self._done.get(unit)
        if done is not None and done.last is not None:
            self.vectors.append((unit, done.last))
        return done

    def finished(self) -> list[UnitResult]:
        """As in `Records`."""
        return list(self._done.values())

    def in_work(self) -> Unit | None:
        """As in `Records`."""
        return None if self._state is None else self._state[0]

    def is_cut(self, unit: Unit) -> bool:
        """As in `Records`."""
        begun = [*self._done, *([self._state[0]] if self._state else [])]
        return any(unit.holds(other) for other in begun)

    def state(self, unit: Unit) -> tuple[State | None, int]:
        """As in `Records`."""
        if self._state is None or self._state[0] != unit:
            return None, 0
        return self._state[1], self._state[2]

    @contextmanager
    def working(self) -> Iterator[None]:
        """As in `Records`; signals wait until the state is saved."""
        with self._signals.working():
            yield

    def after_step(self, unit: Unit, state: State, hvps: int) -> None:
        """As in `Records`; saves the state where it is time, or where a signal waits."""
        self._unit = unit
        if self._signals.pending is not None:
            if not self._ranks.data_rank:
                self.checkpoints.save_now(state, hvps)
            self._signals.check()
        if not self._ranks.data_rank:
            self.checkpoints.after_step(state, hvps)

    def add(self, done: UnitResult) -> None:
        """As in `Records`."""
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
    """The run directory, made if it is missing, for these ranks alone, the first of which locks it.

    Raises:
        ValueError: it is in use, or cannot be made or written to, or holds other things.
        TypeError: path is no path.
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
            raise ValueError(f"run_dir: cannot write in {folder}: {error.strerror or error}") from None
        ranks.gather(None)  # the others need the folder
        with _explained(folder):
            run = RunDirectory(folder, stack.enter_context(caught()), ranks)
        yield run


def holds_run(path: str | PathLike[str]) -> bool:
    """Whether a run was begun in the directory; False for a file, and for a folder of other things."""
    return begun_run(Path(path)) is not None


def begun_run(path: Path) -> dict[str, Any] | None:
    """The content of run.json; None where no run was begun, as of a file or a folder of other things.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    return read_run(path) if path.is_dir() and _is_begun(path) else None


def _is_begun(path: Path) -> bool:
    return any(store.disk.exists(f"{path / RUN}{end}") for end in ("", ".new", ".previous"))


def read_run(path: Path) -> dict[str, Any] | None:
    """The content of run.json; None where no run was begun.

    Raises:
        ValueError: it is damaged, or of another version, or the directory holds other things instead.
    """
    if not _is_begun(path):
        others = sorted(file.name for file in path.iterdir() if not _OURS.fullmatch(file.name))
        if others:
            raise ValueError(f"run_dir: must be empty or hold a run, {path} holds {', '.join(others[:3])}")
        return None
    try:
        run = store.read_json(path / RUN)
    except ValueError:
        if not store.disk.exists(path / RUN):  # killed while it was written for the first time
            return None
        raise
    if not isinstance(run, dict) or run.get("version") != VERSION:
        raise ValueError(f"run_dir: {path / RUN} must be of version {VERSION}")
    return run


def plan_of(run: Mapping[str, Any]) -> Plan:
    """The plan in run.json."""
    plan = dict(run["plan"])
    passes = tuple((first, count, tuple(blocks)) for first, count, blocks in plan["passes"])
    return Plan(**plan | {"exact": tuple(plan["exact"]), "passes": passes})


def parts(path: Path, run: str) -> list[tuple[int, UnitResult, float]]:
    """The number of the file, the unit, and the seconds so far, of every unit that is done, in order.

    What cannot be read, or is of another run, is no part: its unit is computed again. A kill in the middle of a write
    leaves such files.

    Args:
        run: id in run.json.
    """
    found = []
    for number in _numbers(path):
        with _unreadable_told(_file(path, PARTS, number)):
            found.append((number, *read_part(_file(path, PARTS, number), run)))
    return found


def state_of(file: Path, run: str) -> tuple[Unit, State, int, float] | None:
    """The state of a unit in work, the products that it took, and the seconds so far, if it can be read."""
    if any(store.disk.exists(f"{file}{end}") for end in ("", ".new", ".previous")):
        return _state_in(file, run)
    return None


def _state_in(file: Path, run: str) -> tuple[Unit, State, int, float] | None:
    with _unreadable_told(file):
        return read_state(file, run)
    return None


def _numbers(path: Path) -> list[int]:
    """Of the files of parts, in order."""
    names = (re.match(r"(\d+)\.safetensors", file.name, re.ASCII) for file in (path / PARTS).iterdir())
    return sorted({int(name[1]) for name in names if name})


@contextmanager
def _unreadable_told(file: Path, so: str = "that work is done again") -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if store.disk.exists(file):  # else it was killed while it was written for the first time
            warnings.warn(f"run_dir: {error}; {so}", stacklevel=4)


def _file(path: Path, folder: str, number: int) -> Path:
    return path / folder / f"{number:05}.safetensors"


def finished(path: str | PathLike[str]) -> Spectra:
    """The result of a finished run, with the vectors that it kept.

    Raises:
        ValueError: it is not finished, or a file is damaged.
    """
    path = Path(path)
    if not (path / RESULT).exists() and holds_run(path):
        raise ValueError(f"run_dir: run must be finished, {path} is not; go on with it, with the same arguments, first")
    spectra = files.load(path / RESULT)
    run = ((path / VECTORS).is_dir() and read_run(path)) or {}
    vectors = []
    for number, done, _ in parts(path, run["id"]) if run else []:
        if done.unit.num_probes:
            with _unreadable_told(_file(path, VECTORS, number), "more steps cannot be made from it"):
                vectors.append(read_state(_file(path, VECTORS, number), run["id"])[:2])
    return Spectra(spectra.blocks, spectra.quadrature, spectra.provenance, vectors)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What differs between two runs: name, value there, value here."""
    found = []
    for name in [*then, *(name for name in now if name not in then)]:
        a: Any = then.get(name)
        b: Any = now.get(name)
        same_loss = name == "value of the loss" and math.isclose(a, b, rel_tol=LOSS_TOLERANCE)
        if a != b and not same_loss:
            found.append((name, _short(a), _short(b)))
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"spectrum: run_dir must take the state, got {path}: {error.strerror or error}; the last good state is "
            "kept: mend that and call again"
        ) from None
