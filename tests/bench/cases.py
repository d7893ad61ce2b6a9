"""Small inputs for the tests of the benchmarks."""

from __future__ import annotations

from bench.end_to_end import fixed_budget
from bench.harness import result_file
from bench.harness.machine import Machine
from bench.harness.rows import Row
from bench.harness.timing import CPU, Entry

TINY = Machine(CPU, "tiny", {"copy": 1e9, "triad": 2e9, "read": 4e9, "gemm": 8e9})


def result_of(rows: dict, size: str = "full") -> dict:
    environment = {"cpu": "a CPU", "threads": 1, "clock": "wall", "torch": "2"}
    limits = {"copy": 1e9, "gemm": 1e9}
    return {
        "schema": result_file.SCHEMA,
        "size": size,
        "environment": environment,
        "peers": {},
        "limits": limits,
        "rows": rows,
    }


def row_of(**milliseconds: float) -> dict:
    entries = {name: Entry(error=0.0, seconds=[ms / 1e3]) for name, ms in milliseconds.items()}
    return {**vars(Row.of(entries)), "load": [1.0, 2.0], "seconds": 1.0}


def small_case():
    return fixed_budget._small_gpt().case
