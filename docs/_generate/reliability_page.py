"""Write the measured parts of docs/reliability.md from bench/results/reliability, naming missing measurements.

python -m tests.fuzz --inputs 100000 --out bench/results/reliability/fuzz.json
python -m tests.crash --kills 200 --faults 50 --out bench/results/reliability/crash.json
python -m tests.helpers.rank_kills --runs 40 --json bench/results/reliability/rank_kills.json
OUT=bench/results/reliability/sanitizers.json tests/sanitizers.sh
python -m docs._generate.reliability_page          # rewrite the parts between the markers
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from docs._generate.readme import ROOT, replaced

RESULTS = ROOT / "bench" / "results" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"

TARGETS = {
    "result": "result files, `blockhess.load`",
    "state": "state files, `runs.store.read`",
    "text": "texts of a run, `runs.store.read_json`",
    "crashes": "writes of states under random faults of the disk, `runs.store.write`",
}


def machine(content: dict[str, Any]) -> str:
    """Return where a result was made."""
    return ", ".join(f"{key} {value}" for key, value in content["machine"].items())


def fuzz_part(content: dict[str, Any]) -> str:
    """Return the counts of `python -m tests.fuzz`."""
    rows = [
        f"| {what} | {c['inputs']:,} | {c['accepted']:,} | {c['refused']:,} | {c['findings']:,} | "
        f"{c['slowest_seconds']:.2f} | {c['memory_growth_bytes'] / 2**20:.0f} |"
        for name, what in TARGETS.items()
        if (c := content.get(name))
    ]
    missing = [what for name, what in TARGETS.items() if name not in content]
    made = sorted({f"seed {c['seed']}; {machine(c)}" for name, c in content.items() if name in TARGETS})
    return "\n".join(
        [
            "| what | inputs | accepted | refused | findings | slowest, s | memory, MiB |",
            "|---|--:|--:|--:|--:|--:|--:|",
            *rows,
            *([f"\nNot measured yet: {'; '.join(missing)}."] if missing else []),
            f"\nMade by `python -m tests.fuzz`, {'; and '.join(made)}",
        ]
    )


def sanitizers_part(content: dict[str, Any]) -> str:
    """Return the findings of tests/sanitizers.sh."""
    bad = content["failures"] + content["errors"]
    return (
        f"{content['tests']} tests, {bad} failed, {content['skipped']} skipped, {content['seconds']:.0f} s; planted "
        f"and found before: {', '.join(content['planted_and_found'])}.\n\n"
        f"Made by `tests/sanitizers.sh`; {machine(content)}"
    )


def counts_part(content: dict[str, Any]) -> str:
    """Return every number and text of a result, one per line, entries of a table after its name."""
    rows = []
    for key, value in content.items():
        if key != "machine":
            inner = value.items() if isinstance(value, dict) else [("", value)]
            rows += [f"| {' '.join(f'{key} {name}'.split()).replace('_', ' ')} | {v} |" for name, v in inner]
    return "\n".join(["| what | |", "|---|--:|", *rows, f"\nMade on {machine(content)}"])


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "fuzz": fuzz_part,
    "sanitizers": sanitizers_part,
    "crash": counts_part,
    "checkpoints": counts_part,
    "rank_kills": counts_part,
}


def page(text: str) -> str:
    """Return the page with every measured part rewritten."""
    for name, part in PARTS.items():
        file = RESULTS / f"{name}.json"
        missing = f"**Not measured yet:** there is no `bench/results/reliability/{name}.json`."
        text = replaced(text, name, part(json.loads(file.read_text())) if file.exists() else missing)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
