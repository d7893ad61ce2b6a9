"""The JSON of a run of `python -m bench`: written, read with one clear error, and compared with an older one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCHEMA = "blockhess-bench/1"
# A median that is slower by this, and whose fastest time is slower than the slowest before, is called so.
SLOWER = 1.1


def write(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A result that was written.

    Raises:
        ValueError: the file cannot be read, is no JSON, or has another schema.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"bench: {path} must be the JSON of a run, got {error}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"bench: {path} must have the schema {SCHEMA!r}, got {schema!r}")
    return content  # type: ignore[no-any-return]


def check_writable(path: Path) -> None:
    """Raise ValueError unless the file can be written; what it holds stays."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"bench: --json must be a file that can be written, got {error}") from None


def check_comparable(old: dict[str, Any], size: str) -> None:
    """Raise ValueError unless a run had this size."""
    if old["size"] != size:
        raise ValueError(f"bench: runs must have one size to be compared, got {old['size']!r} and {size!r}")


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Every time of two runs of one size as a ratio, new over old."""
    lines = ["| work | rival | old, ms | new, ms | new / old | |", "|---|---|--:|--:|--:|---|"]
    for name in dict.fromkeys([*old["rows"], *new["rows"]]):
        before, after = (result["rows"].get(name, {}).get("times", {}) for result in (old, new))
        for rival in dict.fromkeys([*before, *after]):
            a, b = (times.get(rival, {}) for times in (before, after))
            if "median_ms" in a and "median_ms" in b:
                ratio = b["median_ms"] / a["median_ms"]
                word = _word(ratio, a, b)
                lines.append(
                    f"| {name} | {rival} | {a['median_ms']:.4g} | {b['median_ms']:.4g} | {ratio:.2f} | {word} |"
                )
            else:
                told = [times.get("failure", "timed" if times else "not there") for times in (a, b)]
                lines.append(f"| {name} | {rival} | | | | old: {told[0]}; new: {told[1]} |")
    for key in ("cpu", "cores", "threads", "clock", "torch"):
        before, now = (result["environment"].get(key, "not told") for result in (old, new))
        if before != now:
            lines.append(f"\nNot the same {key}: {before}, now {now}.")
    return "\n".join(lines)


def _word(ratio: float, old: dict[str, float], new: dict[str, float]) -> str:
    if ratio > SLOWER and new["min_ms"] > old["max_ms"]:
        return "slower"
    return "faster" if ratio < 1 / SLOWER and new["max_ms"] < old["min_ms"] else ""
