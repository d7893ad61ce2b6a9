"""Write the measured parts of docs/theory.md from docs/results/paper, so that no number is typed by hand.

python -m docs._generate.paper_results    # run the experiments
python -m docs._generate.theory_page      # rewrite the parts between the markers
"""

from __future__ import annotations

import json
from typing import Any

from blockhess_paper.commands import EXPERIMENTS
from docs._generate.readme import ROOT, replaced

RESULTS = ROOT / "docs" / "results" / "paper"
PAGE = ROOT / "docs" / "theory.md"


def result(name: str) -> dict[str, Any]:
    """Return the committed result of an experiment, in American spelling."""
    text = (RESULTS / f"{name}.json").read_text()
    content: dict[str, Any] = json.loads(text.replace("ialisation", "ialization").replace("normalis", "normaliz"))
    return content


def made(content: dict[str, Any]) -> str:
    """Return the command, duration, seed and environment of a result."""
    environment = ", ".join(f"{key} {value}" for key, value in content["environment"].items())
    seed = f", seed {content['settings']['seed']}" if "seed" in content["settings"] else ""
    return f"`blockhess paper {content['name']}` in {content['seconds']:.0f} s{seed}; {environment}"


def experiment_part(name: str) -> str:
    """Return claims, figure, table and origin of an experiment."""
    content = result(name)
    parts = [
        "\n".join(
            f"- **{claim['verdict'].capitalize()}.** {_plain(claim['paper'])}  \n  Here: {_plain(claim['measured'])}"
            for claim in content["claims"]
        )
    ]
    if (RESULTS / f"{name}.png").exists():
        parts.append(f"![{content['title']}](results/paper/{name}.png)")
    if content["text"]:
        parts.append(f"```text\n{content['text'].strip()}\n```")
    return "\n\n".join([*parts, f"Made by {made(content)}"])


def _plain(text: str) -> str:
    """Escape the characters that Markdown would format."""
    return text.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*").replace("<", "&lt;")


def summary_part() -> str:
    """Return every claim with its verdict, and the number of each verdict."""
    every = [claim for name in EXPERIMENTS for claim in result(name)["claims"]]
    claims = list({claim["paper"]: claim for claim in every}.values())  # Figures 6 and 7 share one
    words = ("reproduced", "partly", "not reproduced")
    counts = ", ".join(f"{sum(claim['verdict'] == word for claim in claims)} {word}" for word in words)
    rows = "\n".join(f"| {claim['verdict']} | {_plain(claim['paper'])} |" for claim in claims)
    return f"{len(claims)} claims: {counts}.\n\n| verdict | claim |\n|---|---|\n{rows}"


def speed_part() -> str:
    """Return the times measured by docs/_generate/paper_results.py --speed."""
    content = json.loads((RESULTS / "speed.json").read_text())
    timings = [(what, *times) for what, times in content["seconds"].items()]
    timings += [
        (f"`blockhess paper {name}`", *map(result(name).get, ("seconds", "cpu_seconds"))) for name in EXPERIMENTS
    ]
    rows = "\n".join(f"| {what} | {wall:.1f} | {'-' if cpu is None else f'{cpu:.1f}'} |" for what, wall, cpu in timings)
    environment = ", ".join(f"{key} {value}" for key, value in content["environment"].items())
    return (
        f"| what | seconds | CPU seconds |\n|---|--:|--:|\n{rows}\n\n"
        "One thread, on two cores that other programs used too (load average "
        f"{content['load'][0]:.1f} after the first five); CPU seconds, where recorded, are what an idle core would "
        f"take; {environment}"
    )


def page(text: str) -> str:
    """Return the page with every measured part rewritten."""
    for name in EXPERIMENTS:
        text = replaced(text, name, experiment_part(name))
    return replaced(replaced(text, "summary", summary_part()), "speed", speed_part())


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
