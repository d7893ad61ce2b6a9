"""Who follows the pages notices what is not as they say, and leaves out no more than is listed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.helpers import newcomer
from tests.helpers.newcomer import COMMANDS, LEFT_OUT, PAGES, commands, follow, install, left_out, parts, words

SHOWN = [line for page in PAGES for language, text in parts(page) if language in COMMANDS for line in commands(text)]


def test_commands_are_found() -> None:
    assert len(SHOWN) > 60
    for command in ("make demo", "blockhess doctor", "blockhess plan my_job.py:make --gpus 8 --data-parallel 2"):
        assert command in SHOWN
    assert commands("a  # why\n\nb \\\n    --c 'x # y'\n# no\n")[0] == "a"
    assert commands("b \\\n    --c\n") == ["b --c"]


def test_no_more_is_left_out_than_there_is() -> None:
    for pattern, reason in LEFT_OUT.items():
        assert reason and any(re.fullmatch(pattern, command, flags=re.DOTALL) for command in SHOWN), pattern
    assert sum(not left_out(command) for command in SHOWN) >= 20
    assert left_out("python -m docs._generate.paper_results --plan") and not left_out(
        "blockhess doctor"
    )  # it would overwrite results


def page_of(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_a_page_that_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = "```python\nopen('a', 'w').write('x 2.5e-3')\n```\n```python\n# b.py\nraise SystemExit\n```\n"
    text += "```sh\ncat a; ls b.py\n```\nwords\n```text\nx   7\n...\nb.py\n```\n"
    follow(page_of(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```sh\nls\nfalse\n```\n", "exit code 1"),
        ("It is shown by `blockhess show nothing.npz`.\n", "no such file: nothing.npz"),
        ("```sh\necho 1 cat\n```\n```text\n2 dogs\n```\n", "the page shows\n2 dogs"),
        ("```sh\necho 1 cat\n```\n```text\n1 cat\n...\nmore\n```\n", "the page shows\n\nmore"),
        ("`python -c 'raise SystemExit(3)'`", "exit code 3"),
    ],
)
def test_a_page_that_is_wrong(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=re.escape(message)):
        follow(page_of(tmp_path, text))


def test_commands_after_an_example_that_does_not_run_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    follow(page_of(tmp_path, "```python\n# needs: no_such_module\n```\n```sh\nfalse\n```\n"))


def test_what_is_passed_over_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        "```python\n# not run here: why\n```\n```sh\nfalse\n```\n```python\n# needs: no_such_module\n\nimport b\n```\n"
    )
    text += "```python\na = 1\n```\n```sh\nmake demo\ntorchrun x\ntrue\n```\n"
    followed = follow(page_of(tmp_path, text))
    assert followed.names["a"] == 1
    assert list(followed.passed_over.items()) == [
        ("# not run here: why", "why"),
        ("false", "the example before it does not run"),
        ("import b", "needs no_such_module, which is not installed"),
        ("make demo", "python -m tests.helpers.newcomer does it, in a clone"),
        ("torchrun x", LEFT_OUT["torchrun .*"]),
    ]


def test_python_is_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tests run in an environment that is not on PATH, another Python is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 7\n")
    (tmp_path / "bin/python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    follow(page_of(tmp_path, "`python -c 'import blockhess'`"))


def test_nothing_that_is_kept_is_measured_anew() -> None:
    kept = [command for command in SHOWN if command.startswith(("python -m bench", "python -m docs"))]
    assert len(kept) > 5 and all(map(left_out, kept))


def test_what_installs_is_done_in_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(
        tmp_path,
        "```sh\nmake demo  # why\nmake test\npip --version | grep -q clone-venv/\n```\n```text\nspectra 1\n```\n",
    )
    source = tmp_path / "source"
    source.mkdir()
    (source / "Makefile").write_text("demo:\n\t@echo spectra 2\ntest:\n\t@false\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        newcomer.subprocess.run([*git, *arguments], cwd=source, check=True)
    monkeypatch.setattr(newcomer, "ROOT", source)
    assert install(page, tmp_path / "clone")
    assert not install(page_of(tmp_path, "```sh\nls\n```\n"), tmp_path / "other")


def test_words() -> None:
    assert words("a -----  1,234.5 %\n  inf") == words("a ---------- -7e-03 % 3")
    assert words("10 cats") != words("10 dogs")
    assert words("takes 25 seconds") == words("takes 2.1 minutes") != words("takes 2.1 bytes")
