"""Write the measured parts of README.md and docs/benchmarks.md from committed results: no number is typed by hand.

python -m bench --json bench/results/cpu_1_thread.json ...   # measure; bench/README.md has all commands
python -m docs._generate.readme --demo                       # run the demo and keep its comparison and pictures
python -m docs._generate.readme                              # rewrite the parts between markers, and cpu.md
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bench.harness import result_file
from bench.harness.environment import describe
from bench.harness.report import ROWS, environment, judge_of, load, report, targets_of
from bench.harness.rows import target_table
from bench.ops import scaling

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
EARLIER = RESULTS / "earlier"  # of another machine
README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
GPT, PICTURE, COMPARISON = "demo_gpt_spectra.png", "demo_comparison.png", "demo_comparison.txt"
RIVALS = ("the paper's procedure", "hessian-eigenthings", "curvlinops", "PyHessian")

# Network -> file and row of a job of 10 probes and 100 steps.
JOBS = {
    "GPT 0.8M": ("cpu_end_to_end_small", "end to end, 10 x 100, GPT of 0.8M parameters, 512 tokens"),
    "ResNet18 0.7M": ("cpu_end_to_end_small", "end to end, 10 x 100, ResNet18 of width 16, 32 images"),
    "GPT2-nano 10.7M": ("cpu_end_to_end", "end to end, 10 x 100, GPT2-nano (10.7M), 1,024 tokens"),
}
SAME_ACCURACY = "cpu_same_accuracy", "end to end to the same accuracy (adaptive), nearly all in blocks of 1e5 elements"
# Network -> file and row of products that are made one by one.
PRODUCTS = {
    "GPT 0.8M": ("cpu_products", "one product, GPT 0.8M, 512 tokens"),
    "GPT2-nano 10.7M": ("cpu_products", "one product, GPT2-nano 10.7M, 1,024 tokens"),
}


def keep_demo() -> None:
    """Run `blockhess demo` and keep its comparison, with where it was made, its picture, and one of the GPT."""
    import blockhess
    from blockhess.cli.demo import run

    made = ", ".join(f"{key} {value}" for key, value in describe().items())  # before anything changes the checkout
    with tempfile.TemporaryDirectory() as folder:
        run(folder)
        shutil.copy(Path(folder) / "comparison.png", RESULTS / PICTURE)
        blockhess.load(Path(folder) / "gpt.npz").plot(RESULTS / GPT)
        comparison = (Path(folder) / "comparison.txt").read_text()
    (RESULTS / COMPARISON).write_text(f"{comparison}\nMade by blockhess demo; {made}\n")


def runs(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return the committed runs of `python -m bench`, by the names of their files."""
    return {path.stem: result_file.read(path) for path in sorted(folder.glob("cpu_*.json"))}


def rows_of(threads: int, folder: Path = RESULTS) -> dict[str, Any]:
    """Return all rows that were run with so many threads."""
    return {
        name: row
        for result in runs(folder).values()
        if result["environment"]["threads"] == threads
        for name, row in result["rows"].items()
    }


def speed_part() -> str:
    """Return README's table: how many times as long as blockhess each package takes, and on which machine."""
    committed = runs()

    def ratios(file: str, row: str, when: str = "") -> list[float]:
        measured = committed[file]["rows"][row]["measured"]
        return [measured[f"times faster than {rival}{when}"] for rival in RIVALS]

    table = {f"10 probes, 100 steps: {network}": ratios(*place, ", cold") for network, place in JOBS.items()}
    table["same accuracy, `tol=0.02`: GPT of one layer"] = ratios(*SAME_ACCURACY)
    table |= {f"one product: {network}": ratios(*place) for network, place in PRODUCTS.items()}
    used = [committed[file]["environment"] for file, _ in (*JOBS.values(), SAME_ACCURACY, *PRODUCTS.values())]
    (machine,) = {f"{e['cpu']}, {e['threads']} thread, torch {e['torch']}" for e in used}
    return "\n".join(
        [
            "| time / blockhess's | paper's procedure | hessian-eigenthings | curvlinops | PyHessian |",
            "|---|--:|--:|--:|--:|",
            *(f"| {label} | {' | '.join(f'{ratio:.1f}' for ratio in row)} |" for label, row in table.items()),
            "",
            f"{machine}; jobs extrapolated from one probe. [Method, machines, missed targets](docs/benchmarks.md).",
        ]
    )


def found_part() -> str:
    """Return README's findings, with the numbers of the pages that are written from docs/results."""
    theory, findings, calibration = (
        (ROOT / "docs" / f"{page}.md").read_text() for page in ("theory", "findings", "calibration")
    )

    def numbers(pattern: str, page: str) -> tuple[str, ...]:
        match = re.search(pattern, page)
        assert match, f"no page says {pattern}"
        return match.groups()

    above, pairs = numbers(r"disjoint intervals, in (\d) of (\d) comparisons", findings)
    batch_more, eval_less = numbers(
        r"with batch statistics more in (\d) .*?eval mode more in 0, less in (\d) ", findings
    )
    (measures,) = numbers(r"of the (\d) measures ResNet18 is", findings)
    count, rank, low, high, predicts = numbers(
        r"is the best of (\d+) predictors .* it has (\S+) \((\S+) to (\S+), n = \d+\): it (.+) the ratio",
        calibration,
    )
    (networks,) = numbers(r"(\d+) networks of \d+ families", calibration)
    claims, reproduced, partly, not_reproduced = numbers(
        r"(\d+) claims: (\d+) reproduced, (\d+) partly, (\d+) not reproduced", theory
    )
    return f"""\
- GPT2-nano has a larger curvature spread and JS0 than ResNet18, beyond error bars, in {above} of {pairs} cases: two
  seeds, three modes of BatchNorm. Of {measures} measures of JS0, four of them on a linear axis, ResNet18's is
  smaller in {eval_less} in eval mode and larger in {batch_more} with batch statistics ([findings](docs/findings.md)).
- How many more steps SGD needs than AdamW on {networks} small networks: the best of {count} predictors {predicts} it
  on other families, rank correlation {rank} (95 %: {low} to {high}; [calibration](docs/calibration.md)).
- Of {claims} claims on theory and small models {reproduced} were reproduced, {partly} in part, {not_reproduced} not \
([theory](docs/theory.md))."""


def targets_part() -> str:
    """Return every target of the CPU with what was measured, from the JSON of `python -m bench`."""
    columns = {
        f"{words}{when}": judge_of(rows_of(threads, folder))
        for when, folder in (("", RESULTS), (", earlier", EARLIER))
        for threads, words in ((1, "1 thread"), (2, "2 threads"))
    }
    return "\n".join(
        [
            *target_table(targets_of(list(ROWS)), columns),
            "",
            *map(_made, runs().values()),
            "",
            "Earlier, on another machine:",
            "",
            *map(_made, runs(EARLIER).values()),
        ]
    )


def _made(result: dict[str, Any]) -> str:
    """Return where a run was made, and what that machine can do."""
    units = {"triad": "GB/s", "gemm": "GFLOP/s"}
    limits = ", ".join(f"{name} {x / 1e9:.0f} {units[name]}" for name, x in result["limits"].items() if name in units)
    return f"- {environment(result)}; {limits}; {load(result)}"


def results_page() -> str:
    """Return all tables of the committed runs."""
    return "\n\n".join(f"# {name}\n\n{report(result)}" for name, result in runs().items())


def replaced(page: str, name: str, part: str) -> str:
    """Return the page with what stands between <!-- name --> and <!-- /name --> replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = page.split(begin, 1)
    return f"{before}{begin}\n{part}\n{end}{rest.split(end, 1)[1]}"


def pages() -> dict[Path, str]:
    """Return the text that every page written here should have."""
    readme = replaced(README.read_text(), "speed", speed_part())
    return {
        README: replaced(readme, "found", found_part()),
        BENCHMARKS: replaced(BENCHMARKS.read_text(), "targets", targets_part()),
        RESULTS / "cpu.md": f"{results_page()}\n",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", action="store_true", help="run the demo first and keep its results")
    if parser.parse_args().demo:
        keep_demo()
    for path, text in pages().items():
        path.write_text(text)
    (row,) = scaling.ROWS
    curves = {f"{n} thread(s)": rows_of(n)[row]["curves"] for n in (1, 2) if row in rows_of(n)}
    if curves:
        scaling.plot(curves, RESULTS / "cpu_scaling.png")


if __name__ == "__main__":
    main()
