"""Text for terminals: aligned tables, numbers, escaped names."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: object) -> str:
    """Return the text with every unprintable character escaped, as names and paths from outside may hold any.

    Example:
        >>> print(printable("w\\x1b[2J"))
        w\\x1b[2J
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a table of aligned columns, without columns that are empty in every row.

    Args:
        header: column titles.
        rows: cells, one per column.
        left: number of leading columns to left-align; the others are right-aligned.

    Example:
        >>> print(format_table(["block", "dim"], [["w", "12"], ["bias", "4"]]))
        block  dim
        -----  ---
        w       12
        bias     4
    """
    keep = [c for c in range(len(header)) if c < left or not rows or any(row[c] for row in rows)]
    lines = [[header[c], *(printable(row[c]) for row in rows)] for c in keep]
    widths = [max(map(len, column)) for column in lines]
    columns = [
        [cell.ljust(width) if c < left else cell.rjust(width) for cell in (column[0], "-" * width, *column[1:])]
        for c, column, width in zip(keep, lines, widths)
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns))


def plural(n: int, name: str) -> str:
    """Return "1 block", "1,000 blocks" and so on.

    Example:
        >>> plural(1, "block"), plural(1000, "block")
        ('1 block', '1,000 blocks')
    """
    return f"{n:,} {name}{'s' * (n != 1)}"


def number(value: float, digits: int = 3) -> str:
    """Return the value in exponential notation with this many significant digits; "0" for zero, "-" for NaN.

    Example:
        >>> number(0.012345), number(0.0), number(float("nan"))
        ('1.23e-02', '0', '-')
    """
    if value != value:
        return "-"
    return f"{value:.{digits - 1}e}" if value else "0"
