"""Write the measured parts of docs/calibration.md from docs/results/paper.

python -m docs._generate.paper_results --keep FOLDER calibrate fig1 fig10 fig11    # copy results of `blockhess paper`
python -m docs._generate.calibration_page                                          # rewrite the page
"""

from __future__ import annotations

from blockhess_paper.commands import TRAINING_EXPERIMENTS
from blockhess_paper.training.calibrate import BASELINES, BEHIND, CHOOSING, ON_PAR
from docs._generate.readme import ROOT, replaced
from docs._generate.theory_page import experiment_part, result

PAGE = ROOT / "docs" / "calibration.md"


def told(found: list[float] | None) -> str:
    """Return a correlation with its interval and the number of networks."""
    return "undefined" if found is None else "{:+.2f} ({:+.2f} to {:+.2f}, n = {})".format(*found)


def summary_part() -> str:
    """Return what the calibration found, in sentences."""
    numbers = result("calibrate")["numbers"]
    of, best = numbers["correlations"], numbers["best"]
    families = {network["family"] for network in numbers["networks"].values()}
    candidates = [key for key in of["all"] if key not in BASELINES]
    above = [key for key in candidates if (found := of["all"][key]) and found[1] > 0]
    below = [key for key in candidates if (found := of["all"][key]) and found[2] < 0]

    def listed(keys: list[str]) -> str:
        found = ", ".join(f"{key} {told(of['all'][key])}" for key in keys)
        return f"{len(keys)} of {len(candidates)} predictors" + (f" ({found})" if keys else "")

    return "\n\n".join(
        [
            f"**{best[0].upper()}{best[1:]} is the best of {len(candidates)} predictors over {', '.join(CHOOSING)}: "
            f"rank correlation {told(of['choosing'][best])}. Over the other families, which did not choose it, it has "
            f"{told(of['held out'][best])}: it {'predicts' if numbers['holds'] else 'does not predict'} the ratio "
            "there.**",
            f"{len(numbers['networks'])} networks of {len(families)} families: on {numbers['behind']} SGD needs more "
            f"than {BEHIND:g} times the steps of AdamW, on {numbers['on par']} less than {ON_PAR:g} times. The rank "
            f"correlation of the ratios of two seeds is {numbers['rank correlation of two seeds']:+.2f}; noise limits "
            "a predictor to about that.",
            f"Over all networks the interval is above zero for {listed(above)}, and below zero for {listed(below)}.",
            f"Without any curvature, the number of classes has {told(of['all'][BASELINES[0]])} and the size of the "
            f"batch {told(of['all'][BASELINES[1]])}.",
            f"{numbers['trainings']} trainings took {numbers['processor seconds of trainings'] / 60:.0f} minutes of "
            "one processor, which other programs shared; the time of the command below is that of its last run, which "
            "found them made.",
        ]
    )


def page(text: str) -> str:
    """Return the page with every measured part rewritten."""
    for name in TRAINING_EXPERIMENTS:
        text = replaced(text, name, experiment_part(name))
    return replaced(text, "summary", summary_part())


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
