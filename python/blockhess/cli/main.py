"""The `blockhess` command: runs one command line and turns errors into exit codes, see cli.commands.EXIT_CODES.

Wrong input, missing packages, and RuntimeErrors of torch or of the user's model are reported in one line. All other
errors keep their traceback, and so does every error if BLOCKHESS_TRACEBACK is set. Only commands that compute import
torch, so `blockhess --help` is fast.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from blockhess._text import printable


def _fail(message: str) -> int:
    print(printable(f"blockhess: {' '.join(message.split())}"), file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: words after the program's name; None means sys.argv[1:].

    Example:
        >>> main(["show", "missing.npz"])
        2
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller; its number must not become that of a file
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  (open until the process ends)
    try:
        try:
            import typer
        except ImportError:
            return _fail('the command line needs typer; type: pip install "blockhess[cli]"')
        from blockhess.cli.commands import app

        for stream in (sys.stdout, sys.stderr):  # their encoding may lack characters of block names
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")

        # Click's UsageError, the parent of BadParameter, which typer imports or vendors depending on its version.
        usage_error: Any = typer.BadParameter.__bases__[0]
        try:
            given = list(sys.argv[1:] if arguments is None else arguments)
            code = app(given or ["--help"], prog_name="blockhess", standalone_mode=False)
            sys.stdout.flush()
        except usage_error as error:
            command = error.ctx.command_path if error.ctx else "blockhess"
            return _fail(f"{error.format_message().rstrip('.')}; see: {command} --help")
        except typer.Abort:
            raise KeyboardInterrupt from None
        except SystemExit as error:  # typer exits with 1 where the reader of an unbuffered stdout has exited
            if isinstance(error.__context__, BrokenPipeError):
                raise error.__context__ from None
            raise
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        print("blockhess: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has exited, as in: blockhess show FILE | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("BLOCKHESS_TRACEBACK"):
            raise
        return _fail(str(error) or type(error).__name__)


if __name__ == "__main__":
    sys.exit(main())
