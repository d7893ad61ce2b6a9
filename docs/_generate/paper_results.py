"""Run the experiments of `blockhess paper` and write the results that the pages of docs/ show.

python -m docs._generate.paper_results                     # all of the theory, at the paper's scale
python -m docs._generate.paper_results table1 fig4 fig3    # the networks, CPU-sized
python -m docs._generate.paper_results --keep FOLDER NAME  # copy what `blockhess paper NAME --out FOLDER` wrote
python -m docs._generate.paper_results --speed             # time Figure 8 at given rates, and an exact Hessian
python -m docs._generate.paper_results --plan              # cost of the networks' jobs at the paper's size
python -m docs._generate.paper_results --batchnorm         # spectra for BatchNorm, 3 probes; two hours on one thread
python -m docs._generate.paper_results --batchnorm mini    # those whose name begins with "mini"
python -m docs._generate.paper_results --batchnorm --probes 4    # extend the existing spectra to 4 probes
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.harness.environment import describe
from blockhess.models import GPT, GPTConfig, next_token_loss
from blockhess_paper.commands import EXPERIMENTS, NETWORK_EXPERIMENTS, TRAINING_EXPERIMENTS
from blockhess_paper.experiments import run_experiments
from blockhess_paper.networks import batchnorm
from blockhess_paper.networks.cost import format_plans, plans, plans_to_dict
from blockhess_paper.networks.networks import Selection
from blockhess_paper.structure.hessian import exact_hessian
from blockhess_paper.theory.descent import search_rate
from blockhess_paper.theory.figure8 import BETA2, NUM_STEPS, NUM_TRIALS, curves
from blockhess_paper.theory.quadratics import case

RESULTS = Path(__file__).parents[1] / "results" / "paper"
BATCHNORM_RESULTS = RESULTS.with_name("findings")
KNOWN = EXPERIMENTS | NETWORK_EXPERIMENTS | TRAINING_EXPERIMENTS


def keep(folder: Path, names: list[str], made: dict[str, str | int]) -> None:
    """Copy the JSON of these experiments, with the environment they were made in, and their figures."""
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        source = folder / f"{name}.json"
        if not source.exists():
            continue
        content = json.loads(source.read_text())
        if content["quick"]:
            raise SystemExit(f"paper_results: {source} holds a quick run")
        (RESULTS / source.name).write_text(json.dumps({**content, "environment": made}, indent=1) + "\n")
        if (picture := folder / f"{name}.png").exists():
            shutil.copy(picture, RESULTS)


def speed() -> None:
    """Time Figure 8 at given rates, and an exact Hessian of some 2,000 parameters."""
    made = describe()
    seconds = {}

    def timed(what: str, work: Callable[[], object]) -> None:
        start, cpu = time.perf_counter(), time.process_time()
        work()
        seconds[what] = [time.perf_counter() - start, time.process_time() - cpu]

    for number, num_trials in NUM_TRIALS.items():
        problems = case(number, num_trials=num_trials)
        few = torch.tensor([0.003, 0.03])
        searches = {name: search_rate(problems, few, 20, beta2=beta2) for name, beta2 in BETA2.items()}
        what = f"Figure 8, case {number}: 4 optimizers, {num_trials} trials, {NUM_STEPS} iterations"
        timed(what, partial(curves, problems, searches, NUM_STEPS))
    model = GPT(GPTConfig(vocab_size=76, context=8, num_layers=3, num_heads=2, width=8, mlp_width=16)).double()
    tokens = torch.randint(76, (4, 8))
    count = sum(parameter.numel() for parameter in model.parameters())
    work = partial(exact_hessian, model, (tokens, tokens), next_token_loss, blocks="full")
    timed(f"exact Hessian of a GPT of {count} parameters", work)
    result = {"environment": made, "load": list(os.getloadavg()), "seconds": seconds}
    (RESULTS / "speed.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def plan() -> None:
    """Count the jobs at the paper's size and measure a few products of each."""
    made = describe()
    jobs = plans(Selection(), measure=True, clock=time.process_time)
    result = {"environment": made, "clock": "of the processor", "load": list(os.getloadavg()), **plans_to_dict(jobs)}
    (RESULTS / "plan.json").write_text(json.dumps(result, indent=1) + "\n")
    print(format_plans(jobs, "cpu", None))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="experiments, by default the theory; or prefixes for --batchnorm")
    parser.add_argument("--keep", type=Path, help="copy the results in this folder instead of running")
    parser.add_argument("--speed", action="store_true", help="measure speed instead")
    parser.add_argument("--plan", action="store_true", help="count and measure the jobs at the paper's size instead")
    parser.add_argument("--batchnorm", action="store_true", help="measure the spectra for BatchNorm instead")
    parser.add_argument("--probes", type=int, default=batchnorm.NUM_PROBES, help="probes of every block of --batchnorm")
    arguments = parser.parse_args()
    if arguments.batchnorm:
        torch.set_num_threads(1)
        batchnorm.measure(BATCHNORM_RESULTS, describe, arguments.names, arguments.probes)
        return
    if unknown := [name for name in arguments.names if name not in KNOWN]:
        parser.error(f"names must be of {', '.join(KNOWN)}, got {', '.join(unknown)}")
    names = arguments.names or list(EXPERIMENTS)
    made = describe()  # before anything changes the checkout
    if arguments.speed:
        speed()
    elif arguments.plan:
        plan()
    elif arguments.keep:
        keep(arguments.keep, names, made)
    else:
        with tempfile.TemporaryDirectory() as folder:
            for name in names:  # one by one, so that finished results are written
                run_experiments({name: KNOWN[name]}, folder)
                keep(Path(folder), [name], made)


if __name__ == "__main__":
    main()
