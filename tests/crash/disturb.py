"""Children that run a scenario and are disturbed: killed by their parent, or by a disk that fails."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blockhess
from blockhess.run.storage import store
from tests.crash.scenarios import SCENARIOS, run, same_bits
from tests.helpers.faulty_disk import FaultyDisk, Killed, broken, disk_full, kill_halfway, short

FAULTS = {"short write": short, "disk full": disk_full, "I/O error": broken, "killed within a call": kill_halfway}
DONE, WRONG, REFUSED, DEAD = 0, 1, 3, 4  # exit codes of children


def child(name: str, directory: Path, disk: FaultyDisk | None = None) -> int:
    """Starts a process that runs the scenario, and returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = WRONG
    try:
        if disk is not None:
            store.disk = disk
        run(name, directory)
        code = DONE
    except Killed:
        code = DEAD
    except OSError as error:
        code = REFUSED if "the state saved last is intact" in str(error) else WRONG
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code of a child, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Trials:
    """Disturbed runs of some scenarios in a folder, counted.

    Attributes:
        counts: of kills, of where they struck, of faults. failures: what went wrong.
    """

    def __init__(self, folder: Path, seed: int, names: Sequence[str] = tuple(SCENARIOS)) -> None:
        self.folder, self.seed, self.names = folder, seed, names
        self.counts, self.failures = Counter[str](), list[str]()
        self._expected = {name: run(name, None) for name in names}
        self._seconds, self._calls = {}, {}
        for name in names:
            start = time.perf_counter()
            self._end(name, child(name, self._new("undisturbed")), "undisturbed")
            self._seconds[name] = time.perf_counter() - start
            disk = store.disk = FaultyDisk()
            run(name, self._new("counted"))
            store.disk, self._calls[name] = store.Disk(), len(disk.log)

    def kill(self, number: int) -> None:
        """Kills a run at a random moment, sometimes twice or more, and resumes it."""
        rng, name = self._random("kill", number)
        directory = self._new("run")
        while True:
            pid = child(name, directory)
            time.sleep(rng.uniform(0, self._seconds[name]))
            os.kill(pid, signal.SIGKILL)
            if ended(pid) == -signal.SIGKILL:
                self.counts["kills"] += 1
                self.counts[f"killed {_where(directory)}"] += 1
            if rng.random() < 0.6:
                break
        self._end(name, child(name, directory), f"kill {number}")

    def fault(self, number: int) -> None:
        """Lets a random call of the system fail, and resumes the run."""
        rng, name = self._random("fault", number)
        kind = rng.choice(list(FAULTS))
        directory = self._new("run")
        code = ended(child(name, directory, FaultyDisk(rng.randrange(self._calls[name]), FAULTS[kind])))
        self.counts["faults"] += 1
        self.counts[kind] += 1
        self.counts[{DONE: "went on", REFUSED: "ended with an error"}.get(code, "ended")] += 1
        if code == WRONG or (code == DEAD) != (kind == "killed within a call"):
            self.failures.append(f"fault {number} ({name}, {kind}) ended with {code}")
        self._end(name, child(name, directory), f"fault {number}")

    def _random(self, kind: str, number: int) -> tuple[random.Random, str]:
        rng = random.Random(f"{self.seed} {kind} {number}")
        return rng, self.names[number % len(self.names)]

    def _new(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def _end(self, name: str, pid: int, trial: str) -> None:
        """Waits for a run that nothing disturbs any more, and compares its bits."""
        directory = self.folder / ("undisturbed" if trial == "undisturbed" else "run")
        code = ended(pid)
        problem = f"ended with {code}" if code else ""
        if not problem and not same_bits(blockhess.load(directory / "spectra.npz"), self._expected[name]):
            problem = "has other bits"
        if problem:
            self.failures.append(f"{trial} of seed {self.seed} ({name}) {problem}")

    def report(self) -> dict[str, Any]:
        """What came of all trials, as numbers."""
        counts = {name: self.counts[name] for name in sorted(self.counts)}
        return {"seed": self.seed, **counts, "resumed to other bits, or not": len(self.failures)}


def _where(directory: Path) -> str:
    if not (directory / "run.json").exists():
        return "before the plan was there"
    if (directory / "spectra.npz").exists():
        return "after the result was there"
    if any(directory.rglob("*.new")):
        return "within a write"
    return "between writes"
