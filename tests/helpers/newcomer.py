"""Run everything that README.md and the pages of docs show, in order, and compare the output with what they show.

    follow(page)                        Python examples and commands of a page, in the working directory; test_readme.py
                                        and test_docs.py list what was not run at the end of pytest's output
    python -m tests.helpers.newcomer    all pages: installation in fresh clones, then every page in a fresh folder with
                                        the first installation; minutes, and several GB where pip's torch is for CUDA

Blocks of a page run in order, Python in one namespace. The first line of a Python block may say otherwise: with
`# not run here: REASON` it is not run, with `# needs: MODULE` only where that module is installed, and commands after
it wait for the next block that runs. With `# FILE.py` the block becomes that file. Every command in a block of sh or
bash, or inline, is run once, or is listed below with a reason. Text blocks after a block of commands are its output:
words must agree; numbers and rules of tables may differ, and a line of ... stands for anything.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Pattern of a command that is not run -> reason.
LEFT_OUT = {
    r".*\b(COMMAND|DIR|FILE|FOLDER|JOB|NAME|RUNS)\b.*": "capitals stand for something of the reader's",
    r"blockhess (run|status)": "the command's name alone",
    r"blockhess --install-completion": "it writes into the shell's files; test_options.py tests the script in bash",
    r"blockhess show blockhess-demo/.*": "it reads a file of `make demo`",
    r"blockhess paper (?!fig6|fig7|--help).*": "minutes to hours; tests/paper runs each with --quick",
    r"make test(-all)?": "this is part of it",
    r"make [\w-]+ TORCH=.*": "the same as without TORCH, from another index",
    r"python -m (bench|docs\._generate)(\.\w+)*( --\w+)?": "it overwrites results",
    r"python -m tests\.(fuzz|crash|helpers\.rank_kills)": "hours; their short versions are tests",
    r"tests/sanitizers\.sh": "minutes; a step of .ci/run",
    r"torchrun .*": "job.py is to be written; test_distributed.py starts such processes",
    r"export TORCH_DISABLE.*": "for torchrun",
    r"#!/bin/bash.*": "a job for Slurm, of which there is none here",
}
# Commands that need a clone of the repository, and minutes: run by `python -m tests.helpers.newcomer`.
IN_A_CLONE = r"make (demo|docs)|python3 -m venv .*|pip install .*"

# Files that pages assume.
FILES = {
    "my_job.py": """
from tests import ROOT
import torch

def make():
    data = torch.randn(64, 10), torch.randint(3, (64,))
    return {"model": torch.nn.Linear(10, 3), "data": data, "loss_fn": torch.nn.CrossEntropyLoss()}
""",
}

FENCE = r"^ *```(?P<language>.*?)\n(?P<block>.*?)^ *```$"
INLINE = r"`(?P<inline>(?:blockhess|python3?|make|pip|torchrun) [^`]+|[\w/]+\.sh)`"
PART = re.compile(rf"{FENCE}|{INLINE}", flags=re.DOTALL | re.MULTILINE)
COMMANDS = ("sh", "bash", "inline")
NOT_RUN, NEEDS = "# not run here: ", "# needs: "
FILE = re.compile(r"# (\w+\.py)")


def parts(page: Path) -> Iterator[tuple[str, str]]:
    """Yield language and text of every block of a page in order; "inline" for a command within a line."""
    for match in PART.finditer(page.read_text()):
        yield ("inline", match["inline"]) if match["inline"] else (match["language"], match["block"])


def needed(block: str) -> str | None:
    """Return the module that a Python block needs, "" if it never runs, None if it always runs."""
    if block.startswith(NOT_RUN):
        return ""
    return block.split("\n", 1)[0].removeprefix(NEEDS).strip() if block.startswith(NEEDS) else None


def commands(block: str) -> list[str]:
    """Return the commands of a block, without comments and with continued lines joined; a script is one command."""
    if block.startswith("#!"):
        return [block]
    lines = re.sub(r" *\\\n *", " ", block).splitlines()
    return [line for line in (re.sub(r"(^| +)# .*", "", line).strip() for line in lines) if line]


def left_out(command: str) -> str | None:
    """Return why a command is not run, None if it is run."""
    return next((why for pattern, why in LEFT_OUT.items() if re.fullmatch(pattern, command, flags=re.DOTALL)), None)


def in_a_clone(command: str) -> bool:
    """Return whether a command needs a clone of the repository."""
    return re.fullmatch(IN_A_CLONE, command) is not None


@dataclass(frozen=True)
class Followed:
    """Result of running a page.

    Attributes:
        names: namespace of its Python examples.
        passed_over: example or command -> why it was not run.
    """

    names: dict[str, object]
    passed_over: dict[str, str]


def words(text: str) -> str:
    """Return the text without numbers, their width, units of time, and rules of tables, which may differ."""
    text = re.sub(r"[-+]?(\d[\d.,]*(e[-+]?\d+)?|\binf\b)", "0", text)
    text = re.sub(r"\b0 (seconds|minutes|hours|days)\b", "0 seconds", text)
    return " ".join(re.sub(r"-{3,}", "-", text).split())


def shown_after(found: Sequence[tuple[str, str]]) -> list[str]:
    """Return the blocks of text that follow commands, up to the next block of code."""
    shown = []
    for language, text in found:
        if language not in ("text", "inline"):
            break
        if language == "text":
            shown.append(text)
    return shown


def type_in(lines: Sequence[str], environment: dict[str, str], folder: Path, shown: Sequence[str] = ()) -> None:
    """Run commands in one shell and compare their output with what the page shows.

    Raises:
        AssertionError: one fails, or prints something else.
    """
    script = "set -e\n" + "\n".join(lines)
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    told = f"{script}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, f"exit code {done.returncode}:\n{told}"
    for text in shown:
        for piece in re.split(r"^\.\.\.$", text, flags=re.MULTILINE):
            assert words(piece) in words(done.stdout), f"the page shows\n{piece}\nand this was printed:\n{told}"


def follow(page: Path) -> Followed:
    """Run the examples and commands of a page in the working directory, which should be empty.

    Raises:
        AssertionError: a command fails, or prints something else than is shown; an example may raise any error.
    """
    for name, text in FILES.items():
        Path(name).write_text(text)
    names: dict[str, object] = {"__name__": "__main__"}
    done: set[str] = set()
    passed_over: dict[str, str] = {}
    waits = False
    found = list(parts(page))
    for i, (language, text) in enumerate(found):
        if language == "python" and (file := FILE.fullmatch(text.split("\n", 1)[0])):
            Path(file[1]).write_text(text)
        elif language == "python":
            module = needed(text)
            waits = not (module is None or (module and importlib.util.find_spec(module)))
            if waits:
                first, *code = filter(None, text.splitlines())
                passed_over[code[0] if code else first] = (
                    f"needs {module}, which is not installed" if module else first.removeprefix(NOT_RUN)
                )
            else:
                exec(compile(text, f"{page.name}: {text[:40]!r}", "exec"), names)
        elif language in COMMANDS:
            todo = []
            for line in commands(text):
                why = left_out(line) or (in_a_clone(line) and "python -m tests.helpers.newcomer does it, in a clone")
                why = why or (waits and "the example before it does not run")
                if why:
                    passed_over[line] = why
                elif line not in done:
                    todo.append(line)
            done.update(todo)
            if todo:
                with tempfile.TemporaryDirectory() as programs:
                    shown = () if language == "inline" else shown_after(found[i + 1 :])
                    type_in(todo, _with_script(Path(programs)), Path.cwd(), shown)
    return Followed(names, {what: why for what, why in passed_over.items() if what not in done})


def _with_script(programs: Path) -> dict[str, str]:
    """Return an environment where `python` is this interpreter and `blockhess` its package, installed or not."""
    for name, arguments in (("python", ""), ("python3", ""), ("blockhess", "-m blockhess.cli.main ")):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments}"$@"\n')
        script.chmod(0o755)
    added = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": ":".join(filter(None, sys.path))}
    return os.environ | added | {"OMP_NUM_THREADS": "1"}


def install(page: Path, clone: Path) -> bool:
    """Run the installation commands of a page in a fresh clone and environment; return False if there are none."""
    found = list(parts(page))
    for i, (language, text) in enumerate(found):
        lines = [line for line in commands(text) if not left_out(line)] if language in ("sh", "bash") else []
        if any(map(in_a_clone, lines)):
            if not clone.exists():
                subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
            print(f"{page.name}: {'; '.join(lines)}", flush=True)
            bare = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME") or "PIP" in name}
            if any(line.startswith("pip ") for line in lines):  # the reader's own environment
                subprocess.run([sys.executable, "-m", "venv", f"{clone}-venv"], check=True)
                bare["PATH"] = f"{clone}-venv/bin:{bare['PATH']}"
            type_in(lines, bare, clone, shown_after(found[i + 1 :]))
    return clone.exists()


def main(arguments: Sequence[str]) -> None:
    """Run one page in the working directory, or all pages without arguments."""
    if arguments:
        for what, why in follow(Path(arguments[0])).passed_over.items():
            print(f"  passed over: {what!r}: {why}", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        clones = [Path(folder, page.stem) for page in PAGES if install(page, Path(folder, page.stem))]
        for page in PAGES:
            print(f"{page.name}: in a fresh folder", flush=True)
            with tempfile.TemporaryDirectory() as fresh:
                command = [str(clones[0] / ".venv/bin/python"), "-m", "tests.helpers.newcomer", str(page)]
                subprocess.run(command, cwd=fresh, env=os.environ | {"PYTHONPATH": str(clones[0])}, check=True)
    print("Every page is as it says.")


if __name__ == "__main__":
    main(sys.argv[1:])
