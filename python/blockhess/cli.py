"""The `blockhess` command: runs blockhess.commands and turns failures into exit codes.

0 done; 1 `doctor` found a fault; 2 a wrong option, bad input or a missing extra, told in one line on stderr; 130
interrupted; 143 ended by SIGTERM. torch is imported only by the commands that compute, so `blockhess --help` answers
at once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from blockhess.table import printable


def _fail(message: str) -> int:
    print(printable(f"blockhess: {' '.join(message.split())}"), file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: what follows the command's name; None means sys.argv[1:].

    Example:
        >>> main(["show", "missing.npz"])
        2
    """
    try:
        try:
            import typer
        except ImportError:
            return _fail('the command line needs typer; type: pip install "blockhess[cli]"')
        from blockhess.commands import app

        for stream in (sys.stdout, sys.stderr):  # which may not be able to show every name
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")

        # Wrong options are click's UsageError, the parent of BadParameter, wherever this typer keeps its click.
        usage_error: Any = typer.BadParameter.__bases__[0]
        try:
            given = list(sys.argv[1:] if arguments is None else arguments)
            code = app(given or ["--help"], prog_name="blockhess", standalone_mode=False)
            sys.stdout.flush()
        except usage_error as error:
            return _fail(f"{error.format_message().rstrip('.')}; see: blockhess --help")
        except typer.Abort:
            raise KeyboardInterrupt from None
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        print("blockhess: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has what it wanted: blockhess show FILE | head.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        return _fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
