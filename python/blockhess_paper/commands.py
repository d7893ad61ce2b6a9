"""`blockhess paper ...`: the experiments of this folder as commands; what they do is imported only when one runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from blockhess.cli.options import AsJson, completed, text_on_stderr

app = typer.Typer(
    help="The paper's networks, quadratic models, MLP and theory, checked: each writes data, picture and verdict.",
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

# The same for the networks of section 2.3 to 2.5, which `all-theory` leaves out.
NETWORK_EXPERIMENTS = {"fig3": "networks.figure3", "fig4": "networks.figure4", "table1": "networks.table1"}

# Trainings: an interrupted run goes on in the same folder.
TRAINING_EXPERIMENTS = {
    "fig1": "training.figure1",
    "fig10": "training.figure10",
    "fig11": "training.figure10:run_figure11",
    "calibrate": "training.calibrate",
}

Out = Annotated[Path, typer.Option(help="Folder for data and pictures.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0)]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes, for a smoke test.")]
DEFAULT_OUT = Path("blockhess-paper")


def _run(names: Sequence[str], out: Path, seed: int, quick: bool, as_json: bool, **options: Any) -> None:
    """As JSON: a list of what the experiments' NAME.json hold."""
    from blockhess.run.storage.signals import Interrupted
    from blockhess_paper.experiments import run_experiments

    known = EXPERIMENTS | NETWORK_EXPERIMENTS | TRAINING_EXPERIMENTS
    try:
        with text_on_stderr(as_json):
            run_experiments({name: known[name] for name in names}, out, seed=seed, quick=quick, **options)
    except Interrupted as interrupted:
        print(f"blockhess: {interrupted}; what is done is in {out}, go on with the same command", file=sys.stderr)
        raise typer.Exit(128 + interrupted.signal) from None
    if as_json:
        print(f"[{', '.join((out / f'{name}.json').read_text() for name in names)}]")


def _add(name: str, text: str) -> None:
    def command(out: Out = DEFAULT_OUT, seed: Seed = 0, quick: Quick = False, as_json: AsJson = False) -> None:
        _run([name], out, seed, quick, as_json)

    app.command(name, help=text)(command)


for _name, _text in {
    "prop1": "Proposition 1: GD's lower bound, printed and corrected, at every iteration.",
    "theorems": "Theorems 1 and 2, printed and corrected, at every iteration of every trial.",
    "section33": "The numbers of section 3.3: r, preconditioned condition numbers, kappa over max kappa_l.",
    "prop2": "Proposition 2: the limit cycle of Adam with beta2 < 1.",
    "table2": "Table 2: iterations fitted against kappa, max kappa_l and r.",
    "fig6": "Figure 6: eigenvalues of case 1.",
    "fig7": "Figure 7: eigenvalues of case 2.",
    "fig8": "Figure 8: gradient norms of GD and Adam on the four cases.",
    "fig2": "Figure 2: exact Hessians of small Transformers and MLPs, and block structure of larger models.",
}.items():
    _add(_name, _text)

Data = Annotated[
    Path | None,
    typer.Option(help="Folder with MNIST's or Fashion-MNIST's four idx files; default: the subset that is shipped."),
]


@app.command()
def fig5(
    out: Out = DEFAULT_OUT, seed: Seed = 0, quick: Quick = False, data: Data = None, as_json: AsJson = False
) -> None:
    """Figure 5: the MLP with scaled layers, SGD and Adam over a grid of rates."""
    _run(["fig5"], out, seed, quick, as_json, data=data)


@app.command()
def table3(
    out: Out = DEFAULT_OUT, seed: Seed = 0, quick: Quick = False, data: Data = None, as_json: AsJson = False
) -> None:
    """Table 3: JS0 of the MLP for every scale, in every definition, against the paper's numbers."""
    _run(["table3"], out, seed, quick, as_json, data=data)


# What the options take, known here without an import of torch.
SCALES = ("mini", "paper")
NETWORKS = ("resnet18", "vgg16", "vit-base", "bert", "gpt2-nano", "gpt2")

Scale = Annotated[
    str,
    typer.Option(
        help="mini: CPU-sized, on data that ship; paper: the paper's sizes, which nobody has run in full.",
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
Device = Annotated[str, typer.Option(help="Of torch: cpu, cuda, cuda:1 ...")]
Precision = Annotated[
    str, typer.Option(help="Of float32 matrix products in spectra: highest, high (TF32 on CUDA) or medium (bfloat16).")
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

    app.command(name, help=f"{text} Resumable: goes on in the same --out.")(command)


for _name, _text in {
    "fig1": "Figure 1: spectra of the full Hessian, and of the blocks, along training.",
    "fig3": "Figure 3: spectra of four blocks of every network at initialisation.",
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
    scale: Annotated[str, typer.Option(help="mini: there is no other, six networks of two families being too few.")] = (
        "mini"
    ),
    as_json: AsJson = False,
) -> None:
    """Does JS0 predict the gap between SGD and AdamW? Fifteen architectures, many trainings; resumable."""
    _run(["calibrate"], out, seed, quick, as_json, selection=_selection(scale, None, None, "cpu", "highest"))


@app.command()
def plan(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="One of the networks; may be repeated.", autocompletion=completed(NETWORKS)),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Count only: measure no products here.")] = False,
    device: Device = "cpu",
    precision: Precision = "highest",
    gflops: Annotated[
        float | None,
        typer.Option(help="GFLOP/s that another device sustains; default: an assumed share of an H100's peak."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What the paper's six jobs take at its size, and how long: measured here, extrapolated elsewhere.

    Counts products, FLOPs and memory without computing any; then measures a few products of each network on a small
    batch, some minutes on a CPU. Nobody has run these jobs at full size yet.
    """
    from blockhess.report.rows import to_json
    from blockhess_paper.networks.cost import as_records, plans, told

    selection = _selection("paper", model, None, device, precision)
    if gflops is not None and not 0 < gflops < math.inf:
        raise ValueError(f"plan: --gflops must be positive and finite, got {gflops}")
    works = plans(selection, measure=not quick)
    print(to_json(as_records(works, gflops)) if as_json else told(works, device, gflops))


@app.command("all-theory")
def all_theory(
    out: Out = DEFAULT_OUT, seed: Seed = 0, quick: Quick = False, data: Data = None, as_json: AsJson = False
) -> None:
    """All of the theory, one after the other: neither networks nor trainings."""
    _run(list(EXPERIMENTS), out, seed, quick, as_json, data=data)


@app.command()
def spectra(out: Out = DEFAULT_OUT, seed: Seed = 0, quick: Quick = False, as_json: AsJson = False) -> None:
    """Measure the block spectra of cases 1 and 2 again, as they were for the shipped files; some minutes."""
    from blockhess.report.rows import to_json
    from blockhess_paper.experiments import measure_spectra

    with text_on_stderr(as_json):
        written = measure_spectra(out, seed=seed, quick=quick)
    if as_json:
        print(to_json({"written": list(map(str, written))}))
