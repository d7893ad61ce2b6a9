"""A plain-text table with aligned columns, as `spectra.table()` and the command line print it."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """The text with every character that a terminal would act on, or not show, written as its escape.

    Names in files come from whoever made them.

    Example:
        >>> print(printable("w\\x1b[2J"))
        w\\x1b[2J
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return header, a rule and rows as aligned lines; columns that are empty in every row are left out.

    Args:
        header: column titles.
        rows: cells, one per column.
        left: how many leading columns stand flush left; the others are numbers, flush right.

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


def number(value: float, digits: int = 3) -> str:
    """Return value with so many significant digits in exponent form, "0" for zero, "-" for NaN.

    Example:
        >>> number(0.012345), number(0.0), number(float("nan"))
        ('1.23e-02', '0', '-')
    """
    if value != value:
        return "-"
    return f"{value:.{digits - 1}e}" if value else "0"
