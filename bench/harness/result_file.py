"""The JSON file of `python -m bench`: read it with clear errors, and compare it with an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = "blockhess-bench/1"
# A ratio of medians beyond this is reported if the ranges of the two measurements are disjoint, too.
SLOWER = 1.1


def read(path: Path) -> dict[str, Any]:
    """Return the result in a file.

    Raises:
        ValueError: The file cannot be read, is not JSON, or has another schema.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"bench: {path} must be a JSON file of `python -m bench`, got {error}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"bench: {path} must have the schema {SCHEMA!r}, got {schema!r}")
    return content  # type: ignore[no-any-return]


def check_writable(path: Path) -> None:
    """Raise ValueError unless the file can be written; its content is not changed."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"bench: --json must be a writable file, got {error}") from None


def check_comparable(old: dict[str, Any], size: str) -> None:
    """Raise ValueError unless the result was measured at this size."""
    if old["size"] != size:
        raise ValueError(f"bench: both results must be measured at one size, got {old['size']!r} and {size!r}")


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return a table with the ratio, new over old, of every time of two results of one size."""
    lines = ["| work | rival | old, ms | new, ms | new / old | |", "|---|---|--:|--:|--:|---|"]
    for name in dict.fromkeys([*old["rows"], *new["rows"]]):
        before, after = (result["rows"].get(name, {}).get("times", {}) for result in (old, new))
        for rival in dict.fromkeys([*before, *after]):
            a, b = (times.get(rival, {}) for times in (before, after))
            if "median_ms" in a and "median_ms" in b:
                ratio = b["median_ms"] / a["median_ms"]
                numbers = f"{a['median_ms']:.4g} | {b['median_ms']:.4g} | {ratio:.2f}"
                lines.append(f"| {name} | {rival} | {numbers} | {_change(ratio, a, b)} |")
            else:
                states = [times.get("failure", "timed" if times else "not measured") for times in (a, b)]
                lines.append(f"| {name} | {rival} | | | | old: {states[0]}; new: {states[1]} |")
    for key in ("cpu", "cores", "threads", "clock", "torch"):
        before, after = (result["environment"].get(key, "unknown") for result in (old, new))
        if before != after:
            lines.append(f"\nDifferent {key}: {before}, now {after}.")
    return "\n".join(lines)


def _change(ratio: float, old: dict[str, float], new: dict[str, float]) -> str:
    if ratio > SLOWER and new["min_ms"] > old["max_ms"]:
        return "slower"
    return "faster" if ratio < 1 / SLOWER and new["max_ms"] < old["min_ms"] else ""
