"""The commands and options of the `blockhess` program; what they do is imported only when one runs."""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockhess.cli.options import AsJson, completed, text_on_stderr

if TYPE_CHECKING:
    from blockhess.spectra import Spectra

EXIT_CODES = {
    0: "done",
    1: "doctor found a fault, or blockhess has one: then with a traceback",
    2: "a wrong option, bad input, a missing extra or a failing model, told in one line on stderr",
    130: "interrupted",
    143: "ended by SIGTERM",
}

app = typer.Typer(
    help="Hessian eigenvalue densities of every parameter block of a neural network.",
    epilog=f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}. "
    "BLOCKHESS_TRACEBACK=1 in the environment shows the traceback of every failure.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _other in entry_points(group="blockhess.commands"):  # of other packages, blockhess_paper among them
    app.add_typer(_other.load(), name=_other.name)

Tol = Annotated[float | None, typer.Option(help="Error asked for; probes and steps are the most then.")]
Sigma = Annotated[float | None, typer.Option(help="With --tol: blur, as a share of a block's range.")]

# What options take, known here without an import of torch.
ENGINES = ("auto", "autograd", "traced", "ggn", "exact")
SORT_KEYS = ("order", "name", "dim", "lambda_min", "lambda_max", "trace", "negative")


def _print_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        from blockhess import __version__

        print(json.dumps({"version": __version__}) if context.params["as_json"] else f"blockhess {__version__}")
        raise typer.Exit()


@app.callback()
def _blockhess(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, help="Show the version and exit.")] = (
        False
    ),
    # Eager, so that it is known when --version is met.
    as_json: Annotated[bool, typer.Option("--json", is_eager=True, help="With --version: print JSON.")] = False,
) -> None:
    if as_json:
        raise ValueError("--json must follow the command, as in: blockhess doctor --json")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.")] = Path("blockhess-demo"),
    probes: Annotated[int | None, typer.Option(help="Random probes per block.")] = None,
    steps: Annotated[int | None, typer.Option(help="Lanczos steps per probe.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, text windows and probes.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models, for a smoke test.")] = False,
    tol: Tol = None,
    sigma: Sigma = None,
    as_json: AsJson = False,
) -> None:
    """Compare a GPT and a ResNet block by block.

    Both at initialisation, on real data that comes with the package: Shakespeare and Fashion-MNIST. Takes 1 to 3
    minutes on 2 cores.
    """
    from blockhess.cli.demo import run
    from blockhess.report.rows import to_json

    with text_on_stderr(as_json):
        found = run(out, num_probes=probes, num_steps=steps, seed=seed, quick=quick, tol=tol, sigma=sigma)
    if as_json:
        print(to_json(found))


@app.command()
def plan(
    job: Annotated[str, typer.Argument(help="FILE.py:FUNCTION or MODULE:FUNCTION that returns spectrum's arguments.")],
    probes: Annotated[int | None, typer.Option(help="Random probes per block.")] = None,
    steps: Annotated[int | None, typer.Option(help="Lanczos steps per probe.")] = None,
    tol: Tol = None,
    sigma: Sigma = None,
    engine: Annotated[
        str | None, typer.Option(help=f"{', '.join(ENGINES)}.", autocompletion=completed(ENGINES))
    ] = None,
    memory_budget: Annotated[str | None, typer.Option(help="Bytes, or a size such as '6 GiB'.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Processes that share the job, one on each GPU.")] = None,
    batch_ranks: Annotated[int, typer.Option(min=1, help="Of these, how many share batches; divides --gpus.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what a job would take: engine, products, FLOPs, time and memory. Computes no product, but a few with --gpus.

    Try: blockhess plan blockhess.cli.demo:gpt_job. For the paper's own jobs: blockhess paper plan
    """
    import blockhess
    from blockhess.cli.job_file import load
    from blockhess.report.rows import to_json

    asked = {"num_probes": probes, "num_steps": steps, "tol": tol, "sigma": sigma, "engine": engine}
    asked["memory_budget"] = memory_budget
    arguments = load(job) | {name: value for name, value in asked.items() if value is not None}
    if gpus is None:
        made: Any = blockhess.plan(**arguments)
    else:
        from blockhess.run.forecast import forecast

        if gpus % batch_ranks:
            raise ValueError(f"plan: --batch-ranks must divide --gpus, got {batch_ranks} and {gpus}")
        made = forecast(work=gpus // batch_ranks, data_shares=batch_ranks, **arguments)
    print(to_json(made.to_dict()) if as_json else made)


@app.command("run")
def run_config(
    config: Annotated[Path, typer.Argument(help="A TOML file: see the documentation of blockhess.cli.config.")],
    out: Annotated[Path, typer.Option(help="Directory of the run, and of its result spectra.npz.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the directory.")] = False,
    allow: Annotated[list[str] | None, typer.Option(help="A job that the file may import; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compute the spectra that a configuration file describes, in a directory from which it can be resumed.

    SIGTERM and SIGINT save the state; after any other end, kill -9 too, it goes on from what was saved last.
    """
    import blockhess
    from blockhess.cli.config import load_config
    from blockhess.run.storage.directory import RESULT, RunMismatch, holds_run
    from blockhess.run.storage.signals import Interrupted

    arguments = load_config(config).arguments(allow or ())
    if holds_run(out) and not resume:
        raise ValueError(f"run: {out} holds a run already; add --resume to go on with it, or choose another --out")
    try:
        spectra = blockhess.spectrum(**arguments | {"run_dir": out})
    except Interrupted as interrupted:
        print(f"blockhess: {interrupted}; what is done is in {out}, go on with --resume", file=sys.stderr)
        raise typer.Exit(128 + interrupted.signal) from None
    except RunMismatch as other:  # a table, so of more than one line
        print(f"blockhess: {other}", file=sys.stderr)
        raise typer.Exit(2) from None
    _print_written(spectra, out / RESULT, as_json)


@app.command("status")
def run_status(
    directory: Annotated[Path, typer.Argument(help="The directory of a run, which may be working.")],
    plot: Annotated[Path | None, typer.Option(help="Also draw the spectra so far into this PNG.")] = None,
    save: Annotated[Path | None, typer.Option(help="Also write the spectra so far into this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say how far a run has come: products, rate, time left."""
    from blockhess.report.rows import to_json
    from blockhess.run.status import partial, status

    found = status(directory)
    print(to_json(found.to_dict()) if as_json else found)
    if plot is not None or save is not None:
        spectra = partial(directory, "status")
        if plot is not None:
            spectra.plot(plot)
            print(f"\nSpectra so far drawn into {plot}", file=sys.stderr if as_json else sys.stdout)
        if save is not None:
            print(f"\nSpectra so far written to {spectra.save(save)}", file=sys.stderr if as_json else sys.stdout)


@app.command("merge")
def merge_runs(
    out: Annotated[Path, typer.Argument(help="The result file.")],
    runs: Annotated[list[Path], typer.Argument(help="Result files, or directories of finished runs.")],
    as_json: AsJson = False,
) -> None:
    """Join runs of different probes of the same blocks, or of different blocks with the same probes."""
    import blockhess
    from blockhess.results.files import check_writable

    if out.exists():  # the first of the runs, where the result was forgotten
        raise ValueError(f"merge: the result must be a new file, got {out}, which exists")
    check_writable(out)
    spectra = blockhess.merge(runs)
    _print_written(spectra, spectra.save(out), as_json)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="A result file of Spectra.save or of the demo, or a run's directory.")],
    sort: Annotated[str, typer.Option(help=f"{', '.join(SORT_KEYS)}.", autocompletion=completed(SORT_KEYS))] = "order",
    plot: Annotated[Path | None, typer.Option(help="Also draw the spectra into this PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a result file holds: its origin, its table of blocks and its JS0; of an unfinished run, so far."""
    from blockhess.report.rows import to_json
    from blockhess.report.text import describe, to_dict

    spectra = _loaded("show", file)
    print(to_json(to_dict(spectra, sort)) if as_json else describe(spectra, sort))
    if plot is not None:
        spectra.plot(plot)
        print(f"\nSpectra drawn into {plot}", file=sys.stderr if as_json else sys.stdout)


@app.command()
def report(
    files: Annotated[
        list[Path],
        typer.Argument(help="Result files, or directories of runs; several: checkpoints of one model, in order."),
    ],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default: FILE.html, of the last.")] = None,
    figures: Annotated[str | None, typer.Option(help="Also figures for a paper, beside it: pdf, svg or png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page: summary, table, interactive spectra, heat map, evolution.

    Of an unfinished run it shows what there is so far, and says so.
    """
    from blockhess.report import html
    from blockhess.report.rows import to_json

    results = [_loaded("report", file) for file in files]
    labels = [file.stem for file in files]
    path = html.write(results, out or files[-1].with_suffix(".html"), labels)
    drawn: list[Path] = []
    told = [f"Report written into {path}"]
    if figures is not None:
        from blockhess.report.figures import shown, write

        drawn = write(results, path.with_suffix(""), figures, labels)
        told.append(f"Figures written into {', '.join(map(str, drawn))}")
        if len(shown(results[-1])) < len(results[-1]):
            told.append(f"Spectra are those of {len(shown(results[-1]))} of its {len(results[-1])} blocks")
    record = {"written": str(path), "figures": list(map(str, drawn)), "results": [repr(spectra) for spectra in results]}
    print(to_json(record) if as_json else "\n".join(told))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed and built, and test it on known numbers. Exit code 1 where something fails."""
    from blockhess.cli.doctor import as_records, examine, told
    from blockhess.report.rows import to_json

    checks = examine()
    print(to_json(as_records(checks)) if as_json else told(checks))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _loaded(op: str, path: Path) -> Spectra:
    import blockhess
    from blockhess.run.status import partial
    from blockhess.run.storage.directory import holds_run

    if not path.is_dir():
        return blockhess.load(path)
    if not holds_run(path):
        raise ValueError(
            f"{op}: each path must be a result file or a run's directory, got {path}, a folder that holds no run; "
            f"name the result files in it: blockhess {op} {path / 'NAME.npz'}"
        )
    return partial(path, op)


def _print_written(spectra: Spectra, path: Path, as_json: bool) -> None:
    from blockhess.report.rows import to_json
    from blockhess.report.text import to_dict

    record = {"written": str(path), **to_dict(spectra)} if as_json else {}
    print(to_json(record) if as_json else f"{spectra!r}\nwritten to {path}")
