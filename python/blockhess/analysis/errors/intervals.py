"""Confidence intervals of means over few random probes, and the jackknife for other statistics.

For a probe v, uniform on the sphere of dimension n, and a function f >= 0, the variance of v^T f(H) v is

    2 / (n + 2) (mean f^2 - (mean f)^2),    means over the eigenvalues of H.

Its distribution is close to c chi^2_k / k, with small k if few eigenvalues dominate: far from normal. The mean of N
probes is therefore taken as Gamma with mean E and variance E c / N, c = variance / mean, and the interval contains all
E for which the observed mean lies between the outer quantiles. It is symmetric for a mean much larger than c / N.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import scipy  # submodules load on first use
import torch
from torch import Tensor

from blockhess import _checks

# Number of degrees of freedom from which chi^2 is taken as normal.
_NORMAL_FROM = 1e5


def check_confidence(op: str, confidence: float) -> float:
    """Return confidence as a float; raise ValueError unless it is between 0 and 1."""
    value = _checks.real(op, "confidence", confidence)
    # The quantile is 0 or infinite for values that round to 0 or 1.
    if not 0 < value < 1 or not 0 < normal_quantile(value) < math.inf:
        raise ValueError(f"{op}: confidence must be between 0 and 1, got {confidence}")
    return value


def normal_quantile(confidence: float) -> float:
    """Return z such that a standard normal variable is in [-z, z] with this probability."""
    return float(scipy.special.ndtri((1 + confidence) / 2))


def student_quantile(confidence: float, degrees: int) -> float:
    """Return t such that Student's variable is in [-t, t] with this probability."""
    return float(scipy.special.stdtrit(degrees, (1 + confidence) / 2))


def mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the mean over the first axis, the unbiased sample variance (infinite for one value) and the count."""
    count = len(values)
    mean = values.mean(0)
    if count == 1:
        return mean, torch.full_like(mean, math.inf), 1
    return mean, ((values - mean) ** 2).sum(0) / (count - 1), count


def variance_of_mean(values: Tensor, known: Tensor, confidence: float) -> Tensor:
    """Return a variance of the mean over the first axis for which a normal interval has this confidence.

    Args:
        values: (n_probes, ...) float64.
        known: (...) float64, theoretical lower bound of the variance of a value, 0 if unknown. The excess of the sample
            variance is multiplied by the square of Student's over the normal quantile.
        confidence: probability in (0, 1).

    Returns:
        (...), infinite for a single value.
    """
    _, sample, count = mean_and_variance(values)
    student = student_quantile(confidence, count - 1) if count > 1 else math.inf
    excess = torch.where(sample > known, (sample - known) * (student / normal_quantile(confidence)) ** 2, 0.0)
    return (known + excess) / count


def gamma_interval(mean: Tensor, variance: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Return the interval of E for which `mean` lies between the outer quantiles of a Gamma distribution.

    The distribution has mean E and variance E variance / mean.

    Args:
        mean: (...) float64, not negative.
        variance: (...) float64, variance of the mean.
        confidence: probability in (0, 1).

    Returns:
        lower, upper: (...) float64, extended to contain the mean; 0 and infinity for an infinite variance.

    Source: Clopper and Pearson 1934 (the inversion); Satterthwaite 1946 (the Gamma approximation).

    Example:
        >>> lower, upper = gamma_interval(torch.tensor([2.0]).double(), torch.tensor([1.0]).double(), 0.95)
        >>> round(lower.item(), 2), round(upper.item(), 2)
        (0.58, 4.41)
    """
    degrees = 2 * mean * (mean / variance)  # 2 mean / c, the chi^2 variable observed
    half = normal_quantile(confidence) * variance.sqrt()
    lower, upper = mean - half, mean + half
    skewed = (mean > 0) & (variance > 0) & (degrees > 0) & (degrees < _NORMAL_FROM)
    observed, unit = degrees[skewed].numpy(), (mean / degrees)[skewed]
    tail = (1 - confidence) / 2
    lower[skewed] = torch.from_numpy(scipy.special.chdtriv(1 - tail, observed)) * unit
    upper[skewed] = torch.from_numpy(scipy.special.chdtriv(tail, observed)) * unit
    certain = variance == 0
    lower = torch.where(certain, mean, torch.minimum(lower.clamp(min=0.0), mean))
    return lower, torch.where(certain, mean, torch.maximum(upper, mean))


def leave_one_out(estimate: Callable[[list[int]], Tensor], n_probes: int) -> tuple[Tensor, Tensor]:
    """Return a statistic of all probes, and of all but one, (n_probes, ...); the latter is empty with one probe.

    Args:
        estimate: maps indices of probes to the statistic of these probes.
        n_probes: number of probes.
    """
    everything = list(range(n_probes))
    value = estimate(everything)
    if n_probes < 2:
        return value, value.new_empty(0, *value.shape)
    return value, torch.stack([estimate([p for p in everything if p != omitted]) for omitted in everything])


def jackknife(value: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the jackknife estimates of the bias and standard error of a statistic.

    Args:
        value, parts: (...) and (n_probes, ...), from leave_one_out.

    Returns:
        bias, stderr: (...), NaN with one probe. value - bias has no bias of order 1 / n_probes.

    Source: Quenouille 1956; Tukey 1958.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 6.0])
        >>> value, parts = leave_one_out(lambda probes: x[probes].mean(), 3)
        >>> [round(t.item(), 4) for t in jackknife(value, parts)]
        [0.0, 1.5275]
    """
    n = len(parts)
    if n == 0:
        return torch.full_like(value, math.nan), torch.full_like(value, math.nan)
    mean = parts.mean(0)
    return (n - 1) * (mean - value), ((n - 1) / n * ((parts - mean) ** 2).sum(0)).sqrt()
