"""Write docs/calibration.md and the shipped calibration from docs/results/paper.

python -m docs._generate.paper_results --keep FOLDER calibrate fig1 fig10 fig11    # copy results of `blockhess paper`
python -m docs._generate.calibration_page                                          # rewrite both files
"""

from __future__ import annotations

import json
from typing import Any

from blockhess_paper.commands import TRAINING_EXPERIMENTS
from blockhess_paper.training.calibration import LEAST_DECIDED, MOST_WRONG, NEEDED_GAP, Calibration, chance_of_best
from docs._generate.readme import ROOT, replaced
from docs._generate.theory_page import experiment_part, result

PAGE = ROOT / "docs" / "calibration.md"
SHIPPED = ROOT / "python" / "blockhess_paper" / "data" / "calibration.json"


def calibration(content: dict[str, Any]) -> Calibration:
    """Return the calibration of a result, with the commit that made it."""
    found = Calibration.from_json(json.dumps(content["numbers"]["calibration"]))
    return Calibration(found.subjects, {**found.made, "commit": content["environment"]["commit"]})


def summary_part() -> str:
    """Return what advice() may conclude, and why."""
    content = result("calibrate")
    found = calibration(content)
    correlations = content["numbers"]["correlations"]
    seconds = content["numbers"]["seconds of trainings and spectra, whenever made"]
    above = sum(lower > 0 for _, lower, _ in correlations.values())
    answer = (
        f'**`advice()` answers "undecided": {found.failure}.**'
        if found.failure
        else f"**`advice()` decides: SGD fine below JS0 = {found.rule.fine_below:.3g}, Adam needed above "
        f"{found.rule.needed_above:.3g}, undecided between.**"
    )
    said = "\n".join(
        f"| {name} | {verdict} | {'Adam needed' if needs else 'SGD fine'} |"
        for name, (verdict, needs) in found.leave_one_out.items()
    )
    numbers = content["numbers"]
    mean_gaps = [subject.gap for subject in found.subjects]
    best = max(correlations, key=lambda key: correlations[key][0])
    by_chance = chance_of_best(list(numbers["JS0"].values()), mean_gaps)
    value, lower, upper = correlations[best]
    return "\n\n".join(
        [
            answer,
            f"{str(found)[0].upper()}{str(found)[1:]}.",
            f"Of {len(correlations)} predictors {above} have a bootstrap interval above zero. The best has "
            f"{value:+.2f} ({lower:+.2f} ... {upper:+.2f}): {best}. It was chosen after the fact; with gaps shuffled "
            f"among the networks the best of the {len(correlations)} reaches as much in {100 * by_chance:.1f} % of the "
            "shuffles. Only networks that were not used to choose it could confirm it.",
            f"A network needs Adam if its gap is above {NEEDED_GAP:g}. The rule counts as holding if the "
            "correlation's interval is above zero and the rule made without a family decides on at least "
            f"{100 * LEAST_DECIDED:.0f} % of all and is wrong about {100 * MOST_WRONG:.0f} % of those at most.",
            f"| left out with its family | rule of the others | measured |\n|---|---|---|\n{said}",
            f"Trainings and spectra took {seconds:.0f} s of one processor, which other programs shared; the time of "
            "the command below is that of its last run, which found them made.",
        ]
    )


def page(text: str) -> str:
    """Return the page with every measured part rewritten."""
    for name in TRAINING_EXPERIMENTS:
        text = replaced(text, name, experiment_part(name))
    return replaced(text, "summary", summary_part())


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    SHIPPED.write_text(calibration(result("calibrate")).to_json())
