"""The quadratic models of section 3: min 1/2 w' H w with H = diag(H_1, ..., H_L), for many random trials at once.

    H_l = Q_l Lambda_l Q_l',   w^0 ~ N(0, I),   h = 0

In the paper Q_l is an "independent standard Gaussian random matrix", but only an orthogonal Q_l keeps the stated
eigenvalues. Here Q_l is the orthogonal factor of a Gaussian matrix (uniformly distributed). With Gaussian Q_l,
available as `rotation="gaussian"`, every trial has another condition number. h only moves the minimum, so h = 0.

All tensors are float64. A trial depends only on the arguments and the seed; global generators are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess.analysis.axes import Axis
from blockhess.analysis.selection import compared
from blockhess.spectra import Spectra
from blockhess_paper.theory.block_spectra import gpt_spectra, resnet_spectra

KAPPA = 2000.0

# Eigenvalues of every block in cases 3 and 4.
CASE_3 = ((1.0, 2.0, 3.0), (99.0, 100.0, 101.0), (1998.0, 1999.0, 2000.0))
CASE_4 = ((1.0, 99.0, 1998.0), (2.0, 100.0, 1999.0), (3.0, 101.0, 2000.0))

TITLES = {
    1: "Case 1: Transformer-type spectra",
    2: "Case 2: CNN-type spectra",
    3: "Case 3: simplified heterogeneous spectra",
    4: "Case 4: simplified homogeneous spectra",
}


@dataclass(frozen=True)
class Quadratics:
    """Quadratic problems of equal shape, one per trial.

    Attributes:
        hessian: (n_trials, L, d, d) float64, the diagonal blocks.
        eigenvalues: (n_trials, L, d), ascending in every block.
        start: (n_trials, L, d), the initial point w^0.
    """

    hessian: Tensor
    eigenvalues: Tensor
    start: Tensor

    @property
    def smallest(self) -> Tensor:
        """mu of every trial, (n_trials,)."""
        return self.eigenvalues.amin((1, 2))

    @property
    def largest(self) -> Tensor:
        """L of every trial, (n_trials,)."""
        return self.eigenvalues.amax((1, 2))

    @property
    def kappa(self) -> Tensor:
        """Condition number of every H, (n_trials,)."""
        return self.largest / self.smallest

    @property
    def block_kappa(self) -> Tensor:
        """Condition number of every H_l, (n_trials, L)."""
        return self.eigenvalues[..., -1] / self.eigenvalues[..., 0]


def make_quadratics(
    eigenvalues: Tensor | Sequence[Sequence[float]],
    *,
    num_trials: int = 1,
    seed: int = 0,
    rotation: str = "orthogonal",
) -> Quadratics:
    """Make problems with given eigenvalues, random rotations and random initial points.

    Args:
        eigenvalues: (L, d), the same in every trial, or (n_trials, L, d).
        num_trials: number of trials, for eigenvalues of shape (L, d).
        seed: seed of rotations and initial points.
        rotation: "orthogonal", or "gaussian" as the paper writes; see above.

    Raises:
        ValueError: an eigenvalue is not positive and finite, blocks differ in size, or an argument is invalid.

    Source: Zhang et al. 2024, section 3.2.

    Example:
        >>> make_quadratics(CASE_3, num_trials=5).block_kappa[0].tolist()
        [3.0, 1.02020202020202, 1.001001001001001]
    """
    if rotation not in ("orthogonal", "gaussian"):
        raise ValueError(f'make_quadratics: rotation must be "orthogonal" or "gaussian", got {rotation!r}')
    if num_trials < 1:
        raise ValueError(f"make_quadratics: num_trials must be at least 1, got {num_trials}")
    values = _checked(eigenvalues).sort(-1).values
    if values.ndim == 2:
        values = values.expand(num_trials, -1, -1)
    trials, n_blocks, d = values.shape

    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(trials, n_blocks, d, d, generator=generator, dtype=torch.float64)
    start = torch.randn(trials, n_blocks, d, generator=generator, dtype=torch.float64)
    if rotation == "orthogonal":
        q, r = torch.linalg.qr(q)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # otherwise the signs of QR are not uniform
    hessian = (q * values[..., None, :]) @ q.mT
    hessian = (hessian + hessian.mT) / 2
    if rotation == "gaussian":
        values = torch.linalg.eigvalsh(hessian)
    return Quadratics(hessian, values, start)


def _checked(eigenvalues: Tensor | Sequence[Sequence[float]]) -> Tensor:
    if not isinstance(eigenvalues, Tensor):
        sizes = [len(block) for block in eigenvalues]
        if len(set(sizes)) > 1:
            raise ValueError(f"make_quadratics: blocks must have the same size, got {sizes}")
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    if values.ndim not in (2, 3) or values.numel() == 0:
        raise ValueError(
            f"make_quadratics: eigenvalues must have shape (L, d) or (n_trials, L, d), got {tuple(values.shape)}"
        )
    bad = ~((values > 0) & values.isfinite())
    if bad.any():
        *_, block, position = bad.nonzero()[0].tolist()
        raise ValueError(
            f"make_quadratics: eigenvalues must be positive and finite, got {values[bad][0].item():g} at position "
            f"{position} of block {block} ({int(bad.sum())} in all)"
        )
    return values


def quadratic_from_spectra(
    spectra: Spectra,
    blocks: Sequence[str] | None = None,
    *,
    samples: int = 100,
    kappa: float = KAPPA,
    num_trials: int = 1,
    seed: int = 0,
) -> Quadratics:
    """Make strongly convex problems of a given condition number with eigenvalues drawn from measured block spectra.

        lambda -> 1 + (kappa - 1) (lambda - lowest) / (highest - lowest)

    where lowest and highest are over all blocks of the trial: one shift and one scale keep the relative ranges of the
    blocks.

    Args:
        spectra: block spectra of any model.
        blocks: names, in order; None means all blocks that comparisons take.
        samples: number of eigenvalues per block, drawn independently with the weights of the quadrature.
        kappa: condition number of H, above 1.
        num_trials: number of trials, each with its own eigenvalues, rotations and initial point.
        seed: random seed.

    Raises:
        ValueError: a name is unknown, samples is below 2, kappa is not finite and above 1, or all eigenvalues of a
            trial are equal.

    Source: Zhang et al. 2024, section 3.2, cases 1 and 2.

    Example:
        >>> quadratic_from_spectra(gpt_spectra(), num_trials=20).kappa[0].item()
        2000.0
    """
    if samples < 2:
        raise ValueError(f"quadratic_from_spectra: samples must be at least 2, got {samples}")
    if not 1 < kappa < float("inf"):
        raise ValueError(f"quadratic_from_spectra: kappa must be finite and above 1, got {kappa}")
    if num_trials < 1:
        raise ValueError(f"quadratic_from_spectra: num_trials must be at least 1, got {num_trials}")
    rows = spectra.rows(compared(spectra, blocks, Axis()))
    nodes, weights = (values[rows] for values in spectra.merged)
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(weights, num_trials * samples, replacement=True, generator=generator)
    drawn = nodes.gather(1, index).view(len(rows), num_trials, samples).transpose(0, 1)

    lowest, highest = drawn.amin((1, 2), keepdim=True), drawn.amax((1, 2), keepdim=True)
    flat = (highest <= lowest).flatten()
    if flat.any():
        raise ValueError(
            f"quadratic_from_spectra: samples must hold two different eigenvalues, got {samples} times "
            f"{lowest.flatten()[flat][0].item():g} from every block; take more samples or Lanczos steps"
        )
    scaled = 1 + (kappa - 1) * (drawn - lowest) / (highest - lowest)
    return make_quadratics(scaled, seed=seed)


def case(number: int, *, num_trials: int = 1, seed: int = 0) -> Quadratics:
    """Return trials of one of the paper's four cases, all of condition number 2000.

    Cases 1 and 2 draw eigenvalues from the shipped spectra of block_spectra, which replace those of the paper.

    Args:
        number: 1, 2, 3 or 4.
        num_trials, seed: see make_quadratics.

    Raises:
        ValueError: number is not 1, 2, 3 or 4.

    Source: Zhang et al. 2024, section 3.2.

    Example:
        >>> case(4).hessian.shape
        torch.Size([1, 3, 3, 3])
    """
    if number in (1, 2):
        spectra = gpt_spectra() if number == 1 else resnet_spectra()
        return quadratic_from_spectra(spectra, num_trials=num_trials, seed=seed)
    if number in (3, 4):
        return make_quadratics(CASE_3 if number == 3 else CASE_4, num_trials=num_trials, seed=seed)
    raise ValueError(f"case: number must be 1, 2, 3 or 4, got {number}")
