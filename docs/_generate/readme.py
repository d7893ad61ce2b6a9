"""Writes the measured parts of README.md from bench/results, so that no number in it is typed by hand.

python -m bench --json bench/results/cpu_1_thread.json ...    # measures; bench/README.md has all commands
python -m docs._generate.readme --demo                                  # runs the demo and keeps what README shows of it
python -m docs._generate.readme                                         # rewrites the parts between the markers, and the tables
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.harness import result_file
from bench.harness.environment import describe
from bench.harness.report import ROWS, environment, judge_of, load, report, targets_of
from bench.harness.rows import target_table
from bench.hvp.products import Row
from bench.ops import scaling

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
EARLIER = RESULTS / "earlier"  # of another machine
PICTURE, COMPARISON = "demo_gpt_spectra.png", "demo_comparison.txt"


def keep_demo() -> None:
    """Run `blockhess demo` and keep its comparison, with where it was made, and one picture."""
    from blockhess.cli.demo import run

    made = ", ".join(f"{key} {value}" for key, value in describe().items())  # before anything changes the checkout
    with tempfile.TemporaryDirectory() as folder:
        run(folder)
        shutil.copy(Path(folder) / "gpt_spectra.png", RESULTS / PICTURE)
        comparison = (Path(folder) / "comparison.txt").read_text()
    (RESULTS / COMPARISON).write_text(f"{comparison}\nMade by blockhess demo; {made}\n")


def demo_part() -> str:
    """The picture, the comparison up to its caveats, and where it was made."""
    text = (RESULTS / COMPARISON).read_text()
    body, rest = text.split("\nBefore you quote", 1)
    made = rest.strip().splitlines()[-1]
    return (
        f"![Hessian spectra of the blocks of a small GPT at initialisation](bench/results/{PICTURE})\n\n"
        "The spectra of a small GPT's blocks at initialisation. The demo then compares the GPT with a ResNet under\n"
        "several definitions, with how much of each number is noise, and its verdict follows from the numbers:\n\n"
        f"```text\n{body.strip()}\n```\n\n"
        f"{made}"
    )


def runs(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The committed runs of `python -m bench`, by the names of their files."""
    return {path.stem: result_file.read(path) for path in sorted(folder.glob("cpu_*.json"))}


def rows_of(threads: int, folder: Path = RESULTS) -> dict[str, Any]:
    """All rows that were run with so many threads."""
    return {
        name: row
        for result in runs(folder).values()
        if result["environment"]["threads"] == threads
        for name, row in result["rows"].items()
    }


def bench_part() -> str:
    """Every target of the CPU with what was measured, from the JSON of `python -m bench`."""
    columns = {
        f"{words}{when}": judge_of(rows_of(threads, folder))
        for when, folder in (("", RESULTS), (", earlier", EARLIER))
        for threads, words in ((1, "1 thread"), (2, "2 threads"))
    }
    table = target_table(targets_of(list(ROWS)), columns)
    return "\n".join(
        [
            "What CPU kernels and whole runs should reach, and what was measured beside rivals in the same run;",
            "`python -m bench` ([how](bench/README.md), [all of it](bench/results/cpu.md)):",
            "",
            *table,
            "",
            *map(_made, runs().values()),
            "",
            "Earlier, on another machine:",
            "",
            *map(_made, runs(EARLIER).values()),
        ]
    )


def _made(result: dict[str, Any]) -> str:
    """Where a run was made, and what that machine can do."""
    triad, product = result["limits"]["triad"] / 1e9, result["limits"]["gemm"] / 1e9
    limits = f"triad {triad:.1f} GB/s, matrix product {product:.0f} GFLOP/s"
    return f"- {environment(result)}; {limits}; {load(result)}"


def results_page() -> str:
    """All tables of the committed runs."""
    return "\n\n".join(f"# {name}\n\n{report(result)}" for name, result in runs().items())


def product_part() -> str:
    """How many times longer each rival takes for one product, from the JSON of bench.hvp.products."""
    data = json.loads((RESULTS / "hvp_cpu.json").read_text())
    rivals = [row["rival"] for row in data["results"][0]["rows"]]
    error = max(row["error"] for result in data["results"] for row in result["rows"])
    lines = [
        "One product H_l v once everything that steps share is ready, every rival in turn, all within "
        f"{error:.0e} of float64;",
        'how many times as long as `engine="traced"` each takes; `python -m bench.hvp.products`',
        "([all of it](bench/results/hvp_cpu.md)):",
        "",
        f"| model | traced, ms | {' | '.join(rivals[1:])} |",
        f"|---|{'--:|' * len(rivals)}",
    ]
    for result in data["results"]:
        rows = [Row(**row) for row in result["rows"]]
        if [row.rival for row in rows] != rivals:  # what compiling gains is a table of its own
            continue
        ratios = [
            statistics.median(theirs / ours for theirs, ours in zip(row.rounds, rows[0].rounds)) for row in rows[1:]
        ]
        lines.append(f"| {result['name']} | {1e3 * rows[0].each:.0f} | {' | '.join(f'{r:.2f}' for r in ratios)} |")
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in data["environment"].items())])


def replaced(readme: str, name: str, part: str) -> str:
    """The README with what stands between <!-- name --> and <!-- /name --> replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = readme.split(begin, 1)
    return f"{before}{begin}\n{part}\n{end}{rest.split(end, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="run the demo first and keep its results")
    if parser.parse_args().demo:
        keep_demo()
    path = ROOT / "README.md"
    readme = replaced(path.read_text(), "demo", demo_part())
    readme = replaced(readme, "products", product_part())
    path.write_text(replaced(readme, "bench", bench_part()))
    (RESULTS / "cpu.md").write_text(f"{results_page()}\n")
    (row,) = scaling.ROWS
    curves = {f"{n} thread(s)": rows_of(n)[row]["curves"] for n in (1, 2) if row in rows_of(n)}
    if curves:
        scaling.plot(curves, RESULTS / "cpu_scaling.png")


if __name__ == "__main__":
    main()
