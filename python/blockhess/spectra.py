"""Spectra: eigenvalue densities of every block of a model, their statistics and comparisons.

    SpectraData (results/data.py)     nodes and weights, names, provenance
    + analysis/                       statistics, error bars, comparisons
    + report/                         table, plots, HTML page
    = Spectra                         all of these as methods, and files

The methods assigned below are functions of a SpectraData, documented where they are defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockhess.analysis import (
    block_rate_gain,
    comparison,
    curvature_spread,
    learning_rates,
    selection,
    sensitivity,
    statistics,
)
from blockhess.analysis.errors import error_bars
from blockhess.analysis.statistics import BlockSpectrum
from blockhess.report import html, plots, text
from blockhess.results import files
from blockhess.results.data import SpectraData
from blockhess.run import merge as run_merge

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Spectra(SpectraData):
    """Spectra of every block of a model, immutable: their statistics, error bars, comparisons, plots and files.

    See SpectraData for the arguments and attributes. All tensors are float64 on the CPU, with rows in the order of
    `names`.

    Example:
        >>> spectra = blockhess.load("gpt.npz")
        >>> print(spectra.curvature_spread())
        >>> print(spectra.js0())
    """

    def __getitem__(self, name: str) -> BlockSpectrum:
        return statistics.block_spectrum(self, name)

    comparable_blocks = selection.comparable_blocks
    default_sigma = selection.default_sigma

    density = statistics.density
    cdf = statistics.cdf
    quantiles = statistics.quantiles
    trace = statistics.trace
    frobenius_norm = statistics.frobenius_norm
    eigenvalue_range = statistics.eigenvalue_range
    negative_mass = statistics.negative_mass
    zero_mass = statistics.zero_mass
    kth_eigenvalue = statistics.kth_eigenvalue
    histogram = statistics.histogram
    outliers = statistics.outliers

    density_band = error_bars.density_band
    cdf_band = error_bars.cdf_band
    resolved_sigma = error_bars.resolved_sigma
    trace_interval = error_bars.trace_interval
    frobenius_interval = error_bars.frobenius_interval
    eigenvalue_bounds = error_bars.eigenvalue_bounds
    negative_interval = error_bars.negative_interval
    zero_interval = error_bars.zero_interval
    wasserstein_error = error_bars.wasserstein_error
    error_table = error_bars.error_table

    curvature_spread = curvature_spread.curvature_spread
    js_matrix = comparison.js_matrix
    js0 = comparison.js0
    js_matrix_error = comparison.js_matrix_error
    compare = comparison.compare
    distance_matrix = comparison.distance_matrix
    sensitivity = sensitivity.sensitivity
    param_groups = learning_rates.param_groups
    gradient_spread = block_rate_gain.gradient_spread
    block_rate_gain = block_rate_gain.block_rate_gain

    table = text.table

    def save(self, path: str | PathLike[str]) -> Path:
        """Write a result file, from which blockhess.load restores equal bits: see results.files.write."""
        return files.write(path, self.blocks, self.quadrature, self.provenance)

    def report(self, path: str | PathLike[str]) -> Path:
        """Write a self-contained HTML page with table, interactive spectra and heat map: see report.html.write.

        Example:
            >>> spectra.report("gpt.html")
        """
        return html.write([self], path)

    def plot(self, path: str | PathLike[str] | None = None, **options: Any) -> Figure:
        """Draw the log-density of every block, as in Figure 3 of the paper.

        Args:
            path: file to save the figure to, in the format of its suffix; None means none.
            options: arguments of report.plots.plot_density.
        """
        return plots.save_figure(plots.plot_density(self, **options), path)

    def heatmap(self, path: str | PathLike[str] | None = None, **options: Any) -> Figure:
        """Draw js_matrix as a heat map, as in Figure 4 of the paper.

        Args:
            path: file to save the figure to, in the format of its suffix; None means none.
            options: arguments of report.plots.plot_heatmap.
        """
        return plots.save_figure(plots.plot_heatmap(self, **options), path)


def load(path: str | PathLike[str]) -> Spectra:
    """Read a result file of Spectra.save, equal bit for bit to the result saved.

    Raises:
        ValueError: the file does not exist, or is not a complete and valid result file of this or an older version.

    Example:
        >>> spectra = blockhess.load("gpt.npz")
    """
    return Spectra(*files.read(path))


def merge(runs: Sequence[SpectraData | str | PathLike[str]]) -> Spectra:
    """Merge runs of one problem with different probes and the same blocks, or different blocks and the same probes.

    To add blocks to a finished run, run `spectrum(..., blocks=...)` on them and merge the results.

    Args:
        runs: results, or paths of result files or of directories of finished runs. Runs with different probes may be in
            any order; different blocks keep the order of the runs.

    Returns:
        Spectra with the recurrences of a single run, but without vectors: extend runs before merging them.

    Raises:
        ValueError: the runs differ in more than their probes or blocks, or overlap.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> given = model, (torch.randn(32, 4), torch.randint(3, (32,))), torch.nn.CrossEntropyLoss()
        >>> options = {"num_probes": 5, "engine": "autograd"}
        >>> first, second = (blockhess.spectrum(*given, first_probe=p, **options) for p in (0, 5))
        >>> merge([first, second]).quadrature.num_probes
        10
    """
    return as_spectra(run_merge.merge(runs))


def as_spectra(data: SpectraData) -> Spectra:
    """Return data as Spectra."""
    return data if isinstance(data, Spectra) else Spectra(data.blocks, data.quadrature, data.provenance, data.vectors)
