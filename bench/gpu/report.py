"""Print the tables of a results.json of bench/run_gpu.sh, and write those of the documentation.

python -m bench.gpu.report FILE                print the tables
python -m bench.gpu.report FILE --name NAME    write bench/results/NAME.json and NAME.md, and bench/results/gpu.md,
                                               the targets and measured values that docs/benchmarks.md includes
python -m bench.gpu.report --unproven          write bench/results/gpu.md without measurements
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.gpu.rows import ROWS
from bench.harness.command import write_json
from bench.harness.environment import one_line
from bench.harness.rows import Target, format_value, missing, target_table, verdict

UNPROVEN = "unproven on hardware"
RESULTS = Path(__file__).parents[1] / "results"


def targets(results: dict[str, Any] | None) -> str:
    """Return the table of targets, judged if the results were measured on a GPU at full size."""
    found = results or {}
    full = found.get("size") == "full" and found.get("environment", {}).get("device") != "cpu"
    rows = found.get("rows", {})

    def judge(name: str, target: Target) -> tuple[str, str]:
        measured = name in rows and (full or "failure" in rows[name])
        return verdict(target, rows[name]) if measured else ("-", UNPROVEN)

    return "\n".join(target_table({name: wanted for name, (_, wanted) in ROWS.items()}, {"measured": judge}))


def summary(results: dict[str, Any]) -> str:
    """Return how many targets are met, and the steps that failed."""
    words = [line.rsplit("|", 2)[1].strip() for line in targets(results).splitlines()[2:]]
    failed = [name for name, step in results["steps"].items() if step["outcome"] != "ok"]
    return f"{words.count('met')} of {len(words)} targets met, {words.count('missed')} missed. " + (
        f"Steps that did not pass: {', '.join(failed)}." if failed else "All steps passed."
    )


def report(results: dict[str, Any]) -> str:
    """Return steps, targets, all times and other quantities, and the environment."""
    lines = ["| step | outcome | s |", "|---|---|--:|"]
    lines += [f"| {name} | {s['outcome']} | {s['seconds']:.0f} |" for name, s in results["steps"].items()]
    lines += ["", targets(results), ""]
    lines += ["| row | timed | median, ms | fastest | slowest | repeats |", "|---|---|--:|--:|--:|--:|"]
    for name, row in results["rows"].items():
        for what, t in row.get("times", {}).items():
            numbers = f"{t['median_ms']:.4g} | {t['min_ms']:.4g} | {t['max_ms']:.4g} | {t['repeats']}"
            lines.append(f"| {name} | {what} | {numbers} |")
    lines += ["", "| row | also measured |", "|---|---|"]
    for name, row in results["rows"].items():
        also = [f"**{why}**: {row.get('failure', '')}"] if (why := missing(row)) else []
        if "measured" in row:
            also += [f"{what} {format_value(what, value)}" for what, value in row["measured"].items()]
            also += [f"error {row['error']:.2g}", *row["notes"]]
        lines.append(f"| {name} | {'; '.join(also)} |")
    limits = ", ".join(f"{name} {value / 1e9:,.4g}" for name, value in results["limits"].items())
    lines += ["", f"Limits of this device in this run, GB/s read and written, and GFLOP/s: {limits or 'not measured'}."]
    lines += [f"Sizes: {results['size']}. {one_line(results['environment'])}.", "", summary(results)]
    return "\n".join(lines)


def of_documentation(results: dict[str, Any] | None, name: str = "") -> str:
    """Return bench/results/gpu.md."""
    said = "No GPU has run this yet."
    if results is not None:
        said = f"Measured by bench/run_gpu.sh, see bench/results/{name}.md. {summary(results)}"
    return f"{said}\n\n{targets(results)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="results.json")
    parser.add_argument("--name", help="name of the device: write the files of the documentation")
    parser.add_argument("--unproven", action="store_true", help="write the targets without measurements")
    options = parser.parse_args()
    if options.unproven:
        (RESULTS / "gpu.md").write_text(of_documentation(None))
        return
    if options.file is None:
        parser.error("FILE or --unproven is required")
    results = json.loads(options.file.read_text())
    print(report(results))
    if options.name:
        if results["size"] != "full" or results["environment"].get("device", "cpu") == "cpu":
            parser.error("--name needs the results of a full run on a GPU")
        write_json(results, RESULTS / f"{options.name}.json")
        (RESULTS / f"{options.name}.md").write_text(report(results) + "\n")
        (RESULTS / "gpu.md").write_text(of_documentation(results, options.name))


if __name__ == "__main__":
    main()
