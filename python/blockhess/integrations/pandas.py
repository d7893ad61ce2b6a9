"""Results as pandas data frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blockhess.report.rows import block_records, pair_records
from blockhess.spectra import Spectra

if TYPE_CHECKING:
    from pandas import DataFrame


def block_dataframe(spectra: Spectra) -> DataFrame:
    """Return one row per block, indexed by its name, with the columns of report.rows.block_records.

    Raises:
        ImportError: pandas is missing.

    Example:
        >>> block_dataframe(spectra).nlargest(5, "lambda_max")[["dim", "lambda_max", "lambda_max_upper"]]
    """
    return _frame(block_records(spectra)).set_index("block")


def pair_dataframe(spectra: Spectra, **comparison: Any) -> DataFrame:
    """Return one row per pair of blocks: block_a, block_b, and their entry of js_matrix in a column named by its kind.

    Args:
        spectra: result.
        comparison: arguments of Spectra.js_matrix, by name.

    Raises:
        ImportError: pandas is missing.
        ValueError: see Spectra.js_matrix.

    Example:
        >>> pair_dataframe(spectra).sort_values("distance")
    """
    return _frame(pair_records(spectra, **comparison))


def _frame(records: list[dict[str, Any]]) -> DataFrame:
    try:
        import pandas
    except ImportError:
        raise ImportError('data frames need pandas; type: pip install "blockhess[frames]"') from None
    return pandas.DataFrame.from_records(records)
