"""The commands of the `blockhess` program and their options; each command imports what it needs when it runs."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockhess._text import printable
from blockhess.cli.options import AsJson, completed, text_on_stderr

if TYPE_CHECKING:
    from blockhess.spectra import Spectra

EXIT_CODES = {
    0: "success, also if the output is closed",
    1: "a check of doctor failed, or an internal error, with a traceback",
    2: "a wrong option, bad input, a missing extra or a failing model, in one line on stderr",
    129: "ended by SIGHUP",
    130: "interrupted",
    143: "ended by SIGTERM",
}

app = typer.Typer(
    help="Hessian eigenvalue densities of every parameter block of a neural network.",
    epilog=f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}. "
    "Set BLOCKHESS_TRACEBACK=1 to see the traceback of every error.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def add_entry_points(app: typer.Typer) -> None:
    """Add the typer.Typer of every entry point in the group "blockhess.commands", such as blockhess_paper's.

    One that fails to load is skipped, with one line on stderr.
    """
    for entry in entry_points(group="blockhess.commands"):
        try:
            commands = entry.load()
            if not isinstance(commands, typer.Typer):
                raise TypeError(f"must be a typer.Typer, got {type(commands).__name__}")
        except Exception as error:
            if os.environ.get("BLOCKHESS_TRACEBACK"):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            text = f"blockhess: skipped the commands {entry.name!r}: cannot load {entry.value!r}: {reason}"
            print(printable(text), file=sys.stderr)
        else:
            app.add_typer(commands, name=entry.name)


add_entry_points(app)

# Values of options, listed here because their own modules import torch.
ENGINES = ("auto", "autograd", "traced", "ggn", "difference", "exact")
SORT_KEYS = ("order", "name", "dim", "lambda_min", "lambda_max", "trace", "negative")

Job = Annotated[str, typer.Argument(help="FILE.py:FUNCTION or MODULE:FUNCTION that returns spectrum's arguments.")]
Probes = Annotated[int | None, typer.Option(help="Random probes per block; 10 if only --steps is given.")]
Steps = Annotated[int | None, typer.Option(help="Lanczos steps per probe; 100 if only --probes is given.")]
Tol = Annotated[float | None, typer.Option(help="Error tolerance, of which counts are limits; 0.01 without counts.")]
Engine = Annotated[
    str | None, typer.Option(help=f"Engine for products: {', '.join(ENGINES)}.", autocompletion=completed(ENGINES))
]
Plot = Annotated[Path | None, typer.Option(help="Also draw the spectra into this PNG.")]
Device = Annotated[
    str | None, typer.Option(help="Device on which to compute, such as cuda; default: that of the model.")
]
TolSigma = Annotated[float | None, typer.Option(help="With --tol: Gaussian width, as a fraction of a block's range.")]


def _print_version(context: typer.Context, wanted: bool) -> None:
    if wanted:
        from blockhess import __version__

        print(json.dumps({"version": __version__}) if context.params["as_json"] else f"blockhess {__version__}")
        raise typer.Exit()


@app.callback()
def _blockhess(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, help="Print the version.")] = False,
    # Eager: it is parsed before the callback of --version runs.
    as_json: Annotated[bool, typer.Option("--json", is_eager=True, help="With --version: print JSON.")] = False,
) -> None:
    if as_json:
        raise ValueError("--json must follow the command, as in: blockhess doctor --json")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for results and pictures.")] = Path("blockhess-demo"),
    probes: Probes = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, text windows and probes.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny models, for a smoke test.")] = False,
    tol: Tol = None,
    tol_sigma: TolSigma = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare the block spectra of a GPT and a ResNet.

    Both are at initialization, on real data shipped with the package: Shakespeare and Fashion-MNIST. Takes 1 to 3
    minutes on 2 cores.
    """
    from blockhess.cli.demo import run

    with text_on_stderr(as_json):
        limits: dict[str, Any] = {"num_probes": probes, "num_steps": steps, "tol": tol, "tol_sigma": tol_sigma}
        found = run(out, seed=seed, quick=quick, device=device, **limits)
    if as_json:
        _print(found, "", as_json)


@app.command()
def plan(
    job: Job,
    probes: Probes = None,
    steps: Steps = None,
    tol: Tol = None,
    tol_sigma: TolSigma = None,
    engine: Engine = None,
    memory_budget: Annotated[str | None, typer.Option(help="Memory limit: bytes, or a size such as '6 GiB'.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Processes that share the job, one per GPU.")] = None,
    data_parallel: Annotated[int, typer.Option(min=1, help="Of these, how many share the batches.")] = 1,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Predict the cost of a job without running it: engine, products, FLOPs, time and memory.

    Only --gpus computes a few products, to measure their time. Try: blockhess plan blockhess.cli.demo:gpt_job
    """
    import blockhess
    from blockhess.cli.job_file import load

    options = {"num_probes": probes, "num_steps": steps, "tol": tol, "tol_sigma": tol_sigma, "engine": engine}
    options |= {"memory_budget": memory_budget}
    arguments: dict[str, Any] = load(job, device) | {
        name: value for name, value in options.items() if value is not None
    }
    if gpus is not None:
        if gpus % data_parallel:
            raise ValueError(f"plan: --data-parallel must divide --gpus, got {data_parallel} and {gpus}")
        arguments["processes"] = gpus // data_parallel, data_parallel
    made = blockhess.plan(**arguments)
    _print(made.to_dict(), made, as_json)


@app.command()
def run(
    job: Job,
    out: Annotated[Path, typer.Option(help="Directory of the run and of its result, spectra.npz.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the directory, if any.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compute the spectra of a job in a directory from which it can be resumed.

    SIGTERM, SIGINT and SIGHUP save the state first; after any other end, kill -9 included, the last saved state is
    resumed.
    """
    import blockhess
    from blockhess.cli.job_file import load
    from blockhess.run.storage.directory import RESULT, RunMismatch, begun_run
    from blockhess.run.storage.signals import Interrupted

    if begun_run(out) is not None and not resume:
        raise ValueError(
            f"run: {printable(out)} already holds a run; add --resume to continue it, or choose another --out"
        )
    try:
        spectra = blockhess.spectrum(**load(job, device) | {"run_dir": out})
    except Interrupted as interrupted:
        print(
            f"blockhess: {interrupted}; the state is saved in {printable(out)}, continue with --resume",
            file=sys.stderr,
        )
        raise typer.Exit(128 + interrupted.signal) from None
    except RunMismatch as mismatch:  # its message is a table, more than the one line of other errors
        print(f"blockhess: {mismatch}", file=sys.stderr)
        raise typer.Exit(2) from None
    _print_written(spectra, out / RESULT, as_json)


@app.command()
def status(
    directory: Annotated[Path, typer.Argument(help="Directory of a run, which may still be working.")],
    plot: Plot = None,
    save: Annotated[Path | None, typer.Option(help="Also write the spectra to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the progress of a run: products done, rate, time left; draw or write the spectra computed so far."""
    from blockhess.run.status import status

    found = status(directory)
    _print(found.to_dict(), found, as_json)
    with text_on_stderr(as_json):
        if plot is not None:
            _draw(_load("status", directory), plot)
        if save is not None:
            print(f"\nSpectra written to {printable(_load('status', directory).save(save))}")


@app.command()
def merge(
    runs: Annotated[list[Path], typer.Argument(help="Result files, or directories of finished runs.")],
    out: Annotated[Path, typer.Option(help="The result file, which must not exist yet.")],
    as_json: AsJson = False,
) -> None:
    """Merge runs with different probes of the same blocks, or with the same probes of different blocks."""
    import blockhess
    from blockhess.results.files import check_writable

    if out.exists():
        raise ValueError(f"merge: --out must be a new file, got {printable(out)}, which exists")
    check_writable(out)
    spectra = blockhess.merge(runs)
    _print_written(spectra, spectra.save(out), as_json)


@app.command()
def show(
    file: Annotated[Path, typer.Argument(help="Result file, or directory of a run.")],
    sort: Annotated[str, typer.Option(help=f"{', '.join(SORT_KEYS)}.", autocompletion=completed(SORT_KEYS))] = "order",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Print the curvature spread, provenance, table of blocks and JS0 of a result, or of an unfinished run so far."""
    from blockhess.report.text import describe, to_dict

    spectra = _load("show", file)
    shown = (to_dict if as_json else describe)(spectra, sort)
    _print(shown, shown, as_json)
    if plot is not None:
        with text_on_stderr(as_json):
            _draw(spectra, plot)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="Results or directories of runs; several: checkpoints in order.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default: FILE.html, of the last.")] = None,
    figures: Annotated[str | None, typer.Option(help="Also figures for a paper, beside it: pdf, svg or png.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a self-contained HTML page: summary, table, interactive spectra, heat map, evolution.

    Of an unfinished run the page shows what is computed so far, and says so.
    """
    from blockhess.report import html

    results = [_load("report", file) for file in files]
    labels = [file.stem for file in files]
    path = html.write(results, out or files[-1].with_suffix(".html"), labels)
    drawn: list[Path] = []
    lines = [f"Report written into {printable(path)}"]
    if figures is not None:
        from blockhess.report.figures import shown, write

        drawn = write(results, path.with_suffix(""), figures, labels)
        lines.append(f"Figures written into {', '.join(map(printable, drawn))}")
        if len(shown(results[-1])) < len(results[-1]):
            lines.append(f"Spectra are those of {len(shown(results[-1]))} of its {len(results[-1])} blocks")
    record = {"written": str(path), "figures": list(map(str, drawn)), "results": [repr(spectra) for spectra in results]}
    _print(record, "\n".join(lines), as_json)


@app.command()
def doctor(
    device: Annotated[str | None, typer.Option(help="Device to test; default: the GPU, if there is one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the installation, and test it on known eigenvalues. Exit code 1 if a check fails."""
    from blockhess.cli.doctor import examine, format_checks, to_dict

    checks = examine(device)
    _print(to_dict(checks), format_checks(checks), as_json)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _load(op: str, path: Path) -> Spectra:
    import blockhess
    from blockhess.run.status import partial
    from blockhess.run.storage.directory import begun_run
    from blockhess.spectra import as_spectra

    if not path.is_dir():
        return blockhess.load(path)
    if begun_run(path) is None:
        raise ValueError(
            f"{op}: each path must be a result file or the directory of a run, got {printable(path)}, which holds no "
            f"run; name the result files in it: blockhess {op} {printable(path / 'NAME.npz')}"
        )
    return as_spectra(partial(path, op))


def _draw(spectra: Spectra, path: Path) -> None:
    spectra.plot(path)
    print(f"\nSpectra drawn into {printable(path)}")


def _print_written(spectra: Spectra, path: Path, as_json: bool) -> None:
    from blockhess.report.text import to_dict

    record = {"written": str(path), **to_dict(spectra)} if as_json else None
    _print(record, f"{spectra!r}\nwritten to {printable(path)}", as_json)


def _print(record: Any, text: object, as_json: bool) -> None:
    from blockhess.report.rows import to_json

    print(to_json(record) if as_json else text)
