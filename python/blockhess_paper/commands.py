"""`blockhess paper ...`: the experiments as commands; their modules are imported only when one runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from blockhess._text import printable
from blockhess.cli.options import AsJson, completed, text_on_stderr

app = typer.Typer(
    help="Reproduce the paper: each experiment writes its data, a figure and verdicts on the paper's claims.",
    rich_markup_mode=None,
)

# Command -> MODULE, whose run(seed=, quick=, ...) it calls, or MODULE:FUNCTION; in the order of `all-theory`.
EXPERIMENTS = {
    "prop1": "theory.proposition1",
    "theorems": "theory.theorems",
    "section33": "theory.section33",
    "prop2": "theory.proposition2",
    "table2": "theory.table2",
    "fig6": "theory.figure6",
    "fig7": "theory.figure6:run_figure7",
    "fig8": "theory.figure8",
    "fig2": "structure.figure2",
    "table3": "scaled_mlp.table3",
    "fig5": "scaled_mlp.figure5",
}

# The networks of sections 2.3 to 2.5; not in `all-theory`.
NETWORK_EXPERIMENTS = {"fig3": "networks.figure3", "fig4": "networks.figure4", "table1": "networks.table1"}

# Trainings; an interrupted run resumes in the same folder.
TRAINING_EXPERIMENTS = {
    "fig1": "training.figure1",
    "fig10": "training.figure10",
    "fig11": "training.figure10:run_figure11",
    "calibrate": "training.calibrate",
}

Out = Annotated[Path, typer.Option(help="Folder for data and figures.")]
Seed = Annotated[int, typer.Option(help="Random seed.", min=0)]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes, for a smoke test.")]
DEFAULT_OUT = Path("blockhess-paper")


def _run(names: Sequence[str], out: Path, seed: int, quick: bool, as_json: bool, **options: Any) -> None:
    """Run experiments; as JSON, print the list of their NAME.json."""
    from blockhess.run.storage.signals import Interrupted
    from blockhess_paper.experiments import run_experiments

    known = EXPERIMENTS | NETWORK_EXPERIMENTS | TRAINING_EXPERIMENTS
    try:
        with text_on_stderr(as_json):
            run_experiments({name: known[name] for name in names}, out, seed=seed, quick=quick, **options)
    except Interrupted as interrupted:
        print(
            f"blockhess: {interrupted}; finished work is in {printable(out)}, the same command resumes it",
            file=sys.stderr,
        )
        raise typer.Exit(128 + interrupted.signal) from None
    if as_json:
        print(f"[{', '.join((out / f'{name}.json').read_text() for name in names)}]")


Device = Annotated[str, typer.Option(help="torch device: cpu, cuda, cuda:1 ...")]


def _add(name: str, text: str) -> None:
    def command(out: Out = DEFAULT_OUT, seed: Seed = 0, quick: Quick = False, as_json: AsJson = False) -> None:
        _run([name], out, seed, quick, as_json)

    app.command(name, help=text)(command)


for _name, _text in {
    "prop1": "Proposition 1: the lower bound for GD, as printed and corrected, at every iteration.",
    "theorems": "Theorems 1 and 2: upper bounds, as printed and corrected, at every iteration of every trial.",
    "section33": "Section 3.3: r, preconditioned condition numbers, kappa / max kappa_l.",
    "prop2": "Proposition 2: the limit cycle of Adam with beta2 < 1.",
    "table2": "Table 2: iterations fitted against kappa, max kappa_l and r.",
    "fig6": "Figure 6: eigenvalues of case 1.",
    "fig7": "Figure 7: eigenvalues of case 2.",
    "fig8": "Figure 8: gradient norms of GD and Adam on the four cases.",
}.items():
    _add(_name, _text)

Data = Annotated[
    Path | None,
    typer.Option(help="Folder with the idx files of MNIST or Fashion-MNIST; default: the shipped subset."),
]


@app.command()
def fig2(
    out: Out = DEFAULT_OUT, seed: Seed = 0, quick: Quick = False, device: Device = "cpu", as_json: AsJson = False
) -> None:
    """Figure 2: exact Hessians of small Transformers and MLPs; block structure of larger models."""
    _run(["fig2"], out, seed, quick, as_json, device=device)


def _add_scaled_mlp(names: Sequence[str], command: str, text: str) -> None:
    def run(
        out: Out = DEFAULT_OUT,
        seed: Seed = 0,
        quick: Quick = False,
        data: Data = None,
        device: Device = "cpu",
        as_json: AsJson = False,
    ) -> None:
        _run(names, out, seed, quick, as_json, data=data, device=device)

    app.command(command, help=text)(run)


_add_scaled_mlp(
    ["fig5"], "fig5", "Figure 5: SGD and Adam on the MLP with scaled layers, over a grid of learning rates."
)
_add_scaled_mlp(
    ["table3"], "table3", "Table 3: JS0 of the MLP with scaled layers in every definition, against the paper's numbers."
)


# Values of the options, repeated here so that torch need not be imported.
SCALES = ("mini", "paper")
NETWORKS = ("resnet18", "vgg16", "vit-base", "bert", "gpt2-nano", "gpt2")

Scale = Annotated[
    str,
    typer.Option(
        help="mini: CPU-sized, on shipped data; paper: the paper's sizes, which have never been run in full.",
        autocompletion=completed(SCALES),
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help=f"{', '.join(NETWORKS)}, hf:TYPE, timm:NAME or torchvision:NAME; may be repeated.",
        autocompletion=completed(NETWORKS),
    ),
]
Corpora = Annotated[
    Path | None,
    typer.Option(help="For --scale paper: imagenet/CLASS/*.JPEG, cornell/movie_*.txt, openwebtext/train.bin."),
]
Precision = Annotated[
    str, typer.Option(help="Precision of float32 matrix products: highest, high or medium (both TF32 on CUDA).")
]


def _selection(scale: str, model: list[str] | None, data: Path | None, device: str, precision: str) -> Any:
    from blockhess_paper.networks.networks import Selection

    return Selection(model or (), scale, data, device, precision)


def _add_network(name: str, text: str) -> None:
    def command(
        out: Out = DEFAULT_OUT,
        seed: Seed = 0,
        quick: Quick = False,
        scale: Scale = "mini",
        model: Models = None,
        data: Corpora = None,
        device: Device = "cpu",
        precision: Precision = "highest",
        as_json: AsJson = False,
    ) -> None:
        _run([name], out, seed, quick, as_json, selection=_selection(scale, model, data, device, precision))

    app.command(name, help=f"{text} Resumes in the same --out.")(command)


for _name, _text in {
    "fig1": "Figure 1: spectra of the full Hessian, and of the blocks, along training.",
    "fig3": "Figure 3: spectra of four blocks of every network at initialization.",
    "fig4": "Figure 4: JS distances between all blocks of every network.",
    "table1": "Table 1: JS0 of the six networks in every definition, against the paper's numbers.",
    "fig10": "Figure 10: AdamW against SGD on CNNs, at the best rates.",
    "fig11": "Figure 11: AdamW against SGD on Transformers, at the best rates.",
}.items():
    _add_network(_name, _text)


@app.command()
def calibrate(
    out: Out = DEFAULT_OUT,
    seed: Seed = 0,
    quick: Quick = False,
    scale: Annotated[str, typer.Option(help="Only mini: six networks of two families are too few.")] = "mini",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """What predicts how many more steps SGD needs than AdamW? Trains 39 networks; resumes in the same --out."""
    _run(["calibrate"], out, seed, quick, as_json, selection=_selection(scale, None, None, device, "highest"))


@app.command()
def plan(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="One of the networks; may be repeated.", autocompletion=completed(NETWORKS)),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Count only; do not time any products.")] = False,
    device: Device = "cpu",
    precision: Precision = "highest",
    gflops: Annotated[
        float | None,
        typer.Option(help="Sustained GFLOP/s of another device; default: an assumed share of the peak of an H100."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate the cost of the paper's six jobs at full size: products, FLOPs, memory and time.

    Products, FLOPs and memory are counted without computing anything. Then a few products of each network are timed on
    a small batch, in some minutes on a CPU; times on other devices are extrapolated. No job has been run at full size.
    """
    from blockhess.report.rows import to_json
    from blockhess_paper.networks.cost import format_plans, plans, plans_to_dict

    selection = _selection("paper", model, None, device, precision)
    if gflops is not None and not 0 < gflops < math.inf:
        raise ValueError(f"plan: --gflops must be positive and finite, got {gflops}")
    jobs = plans(selection, measure=not quick)
    print(to_json(plans_to_dict(jobs, gflops)) if as_json else format_plans(jobs, device, gflops))


_add_scaled_mlp(
    list(EXPERIMENTS),
    "all-theory",
    "Run all experiments of the theory, on the CPU, and Figures 2 and 5 and Table 3: none of sections 2.3 to 2.5.",
)


@app.command()
def spectra(
    out: Out = DEFAULT_OUT, seed: Seed = 0, quick: Quick = False, device: Device = "cpu", as_json: AsJson = False
) -> None:
    """Recompute the shipped block spectra of cases 1 and 2; some minutes."""
    from blockhess.report.rows import to_json
    from blockhess_paper.experiments import measure_spectra

    with text_on_stderr(as_json):
        written = measure_spectra(out, seed=seed, quick=quick, device=device)
    if as_json:
        print(to_json({"written": list(map(str, written))}))
