"""Merging of runs with different probes, or with different blocks, into the result of one run with all of them.

different probes:  same blocks,  spectrum(..., first_probe=...)
different blocks:  same probes,  spectrum(..., blocks=...)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from blockhess._text import printable
from blockhess.problem.batches import DRAWN_ANEW
from blockhess.problem.blocks import BlockInfo, with_note
from blockhess.problem.prepare import LOSS_TOLERANCE
from blockhess.results import files
from blockhess.results.data import SpectraData
from blockhess.run.storage.directory import finished
from blockhess_ext import Quadrature

# Entries of provenance that must be equal.
SHARED = (
    "model", "fingerprints", "loss", "batchnorm", "dtype", "matmul_precision", "seed", "distribution", "num_steps",
    "tol", "tol_sigma",
)  # fmt: skip
_TEXTS = {"fingerprints": "fingerprints of parameters and data"}
# Entries that may differ; the result lists those of every run.
_OWN = ("first_probe", "num_probes", "engine", "torch", "blockhess", "hvps", "seconds")
_NEEDED = (*SHARED, *_OWN, "loss_value", "plan")


def load_run(path: str | PathLike[str]) -> SpectraData:
    """Return the result in a file, or that of a finished run's directory with its vectors."""
    return finished(path) if Path(path).is_dir() else SpectraData(*files.read(path))


def merge(runs: Sequence[SpectraData | str | PathLike[str]]) -> SpectraData:
    """Merge runs; see `blockhess.merge`."""
    if isinstance(runs, str | PathLike | SpectraData):
        raise TypeError(f"merge: runs must be a list of runs, got {type(runs).__name__}")
    found = [run if isinstance(run, SpectraData) else load_run(run) for run in runs]
    labels = [printable(run) if isinstance(run, str | PathLike) else f"run {i + 1}" for i, run in enumerate(runs)]
    if len(found) < 2:
        raise ValueError(f"merge: runs must be at least two, got {len(found)}")
    for label, run in zip(labels, found):
        missing = [name for name in _NEEDED if name not in run.provenance]
        if missing:
            raise ValueError(
                f"merge: {label} must be computed by this version of spectrum, whose provenance has {missing[0]}"
            )
    for label, run in zip(labels[1:], found[1:]):
        _check_compatible(labels[0], found[0].provenance, label, run.provenance)
    if all(set(run.names) == set(found[0].names) for run in found):
        return _of_probes(labels, found)
    return _of_blocks(labels, found)


def _check_compatible(label: str, first: dict[str, Any], other_label: str, other: dict[str, Any]) -> None:
    different = [name for name in SHARED if first[name] != other[name]]
    differing = [f"{_TEXTS.get(name, name)} ({first[name]!r} and {other[name]!r})" for name in different]
    if not math.isclose(first["loss_value"], other["loss_value"], rel_tol=LOSS_TOLERANCE):
        differing.append(f"value of the loss ({first['loss_value']!r} and {other['loss_value']!r})")
    if (first["engine"] == "ggn") != (other["engine"] == "ggn"):
        differing.append(f"matrix ({first['engine']!r} and {other['engine']!r})")
    if differing:
        text = "; ".join(differing)
        advice = f"; {DRAWN_ANEW}" if first["fingerprints"]["data"] != other["fingerprints"]["data"] else ""
        raise ValueError(f"merge: runs must belong together, {label} and {other_label} differ in {text}{advice}")


def _of_probes(labels: list[str], runs: list[SpectraData]) -> SpectraData:
    order = sorted(range(len(runs)), key=lambda i: runs[i].provenance["first_probe"])
    labels, runs = [labels[i] for i in order], [runs[i] for i in order]
    first = runs[0]
    for i, run in enumerate(runs[1:]):
        before, start = runs[i].provenance, run.provenance["first_probe"]
        stop = before["first_probe"] + before["num_probes"]
        if start < stop:
            raise ValueError(
                f"merge: runs of the same blocks must have different probes, {labels[i]} has those up to {stop - 1} "
                f"and {labels[i + 1]} those from {start}; see first_probe of spectrum"
            )
        if start > stop:
            raise ValueError(
                f"merge: probes must follow each other, {labels[i]} ends at {stop - 1} and {labels[i + 1]} begins at "
                f"{start}; the runs between are missing"
            )
    columns, notes, tolerant = [], list(first.blocks), first.provenance["tol"] is not None
    for l, name in enumerate(first.names):
        parts = []
        for label, run in zip(labels, runs):
            row = run.rows([name])[0]
            part = run.quadrature.select_block(row)
            modes = {part.reorthogonalize[0], first.quadrature.reorthogonalize[l]}
            # With a tolerance, a block may be computed exactly in the runs whose first probes ask for it.
            if part.dims != (first.dims[l],) or (len(modes) > 1 and not (tolerant and "exact" in modes)):
                raise ValueError(
                    f"merge: runs must treat block {name!r} alike, {labels[0]} has size {first.dims[l]}, "
                    f"{first.quadrature.reorthogonalize[l]!r}, and {label} {part.dims[0]}, {part.reorthogonalize[0]!r}"
                )
            parts.append(part)
            note = run.blocks[row].note
            notes[l] = notes[l] if note in notes[l].note else with_note(notes[l], note)
        columns.append(Quadrature.concatenate([p for p in parts if "exact" in p.reorthogonalize] or parts, 0))
    return _merged(runs, notes, columns, sum(run.provenance["num_probes"] for run in runs))


def _of_blocks(labels: list[str], runs: list[SpectraData]) -> SpectraData:
    first = runs[0].provenance
    seen: dict[str, str] = {}
    for label, run in zip(labels, runs):
        for name in ("first_probe", "num_probes"):
            if run.provenance[name] != first[name]:
                raise ValueError(
                    f"merge: runs of different blocks must have the same {name}, {labels[0]} has {first[name]} and "
                    f"{label} {run.provenance[name]}"
                )
        for name in run.names:
            if name in seen:
                raise ValueError(
                    f"merge: runs must have all blocks in common, or none, {seen[name]} and {label} share {name!r}"
                )
            seen[name] = label
    columns = [run.quadrature.select_block(l) for run in runs for l in range(len(run))]
    return _merged(runs, [block for run in runs for block in run.blocks], columns, first["num_probes"])


def _union(of_runs: Iterable[dict[str, Any] | None]) -> dict[str, Any]:
    """Return the entries of all runs, by block; the first run's where several have one."""
    return {name: value for entries in reversed(list(of_runs)) for name, value in (entries or {}).items()}


def _merged(
    runs: list[SpectraData], blocks: list[BlockInfo], columns: list[Quadrature], num_probes: int
) -> SpectraData:
    made = [run.provenance for run in runs]
    quadrature = Quadrature.concatenate(columns, 1)
    ghosts = quadrature.ghosts().sum(0).tolist()
    bare = [mode == "none" for mode in quadrature.reorthogonalize]
    exact = [name for run in made for name in run["plan"]["exact"]]
    errors = [run["hvp_error"] for run in made if run.get("hvp_error")]
    of_block = [[run for run, data in zip(made, runs) if block.name in data.names] for block in blocks]
    changed = {
        "first_probe": min(run["first_probe"] for run in made),
        "num_probes": num_probes,
        "hvps": sum(run["hvps"] for run in made),
        "hvps_saved": sum(run["hvps_saved"] for run in made),
        "seconds": sum(run["seconds"] for run in made),
        "ghosts": {block.name: count for block, count, b in zip(blocks, ghosts, bare) if b and count},
        "hvp_error": _union(errors) or None,
        "hvp_error_unknown": "" if errors else made[0].get("hvp_error_unknown", ""),
        **{name: _union(run.get(name) for run in made) for name in ("gradient_norms", "slices")},
        "unchecked": [
            block.name
            for block, its_runs in zip(blocks, of_block)
            if all(block.name in run.get("unchecked", ()) for run in its_runs)
        ],
        "plan": made[0]["plan"] | {"exact": list(dict.fromkeys(exact))},
        "keep_vectors": False,
        "merged": [{name: run[name] for name in _OWN} | {"blocks": list(data.names)} for run, data in zip(made, runs)],
    }
    return SpectraData(blocks, quadrature, made[0] | changed)
