"""Random arguments of linear_combination: any strides, sizes of 1 and 0, rows of out covered in part or not at all."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from blockhess_ext import reference


def strided(rng: random.Random, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Return random numbers; the dimensions lie in memory in any order, some with gaps."""
    order = rng.sample(range(len(shape)), len(shape)) if rng.random() < 0.4 else list(range(len(shape)))
    steps = [rng.choice((1, 1, 1, 1, 1, 2, 3)) for _ in shape]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    memory = torch.randn([shape[d] * steps[d] for d in order], generator=generator, dtype=torch.float64).to(dtype)
    view = memory.permute([order.index(d) for d in range(len(shape))])
    return view[tuple(slice(None, None, step) for step in steps)]


@dataclass
class Combination:
    """The arguments of linear_combination, or with `sum` of linear_combination_sum."""

    sum: bool
    out: Tensor
    bases: list[Tensor]
    coefficients: list[Tensor | None]
    scalars: list[float]
    first_rows: list[int]

    def after(self, backend: ModuleType) -> Tensor:
        """Return out, after it was filled with NaN and overwritten."""
        self.out.fill_(torch.nan)
        function = backend.linear_combination_sum if self.sum else backend.linear_combination
        function(self.out, self.bases, self.coefficients, self.scalars, self.first_rows)
        return self.out.clone()

    def rounding(self) -> Tensor:
        """Return a bound of the rounding error of each element: eps (terms + summands) sum |term|."""
        magnitudes = replace(
            self,
            out=self.out.double(),
            bases=[x.abs().double() for x in self.bases],
            coefficients=[None if x is None else x.abs().double() for x in self.coefficients],
            scalars=[abs(x) for x in self.scalars],
        )
        n = max(x.shape[-1] for x in [*self.bases, *self.coefficients] if x is not None) if self.sum else 1
        return magnitudes.after(reference) * (2 + len(self.bases) + n) * torch.finfo(self.out.dtype).eps


def random_combination(seed: int, dtype: torch.dtype, least_dims: int = 0) -> Combination:
    """Return a case that depends on the seed only."""
    rng = random.Random(seed)
    summed, n_rows = rng.random() < 0.3, rng.choice((0, 1, 2, 3, 5))
    dims = max(rng.choice((0, 1, 2, 2, 2, 3, 4, 7)), 1 if summed else least_dims)
    sizes = (1, 2, 3, 5) if dims > 3 else (0, 1, 2, 3, 17, 64, 100, 300) if dims < 3 else (1, 2, 5, 16, 67)
    shape = [rng.choice(sizes) for _ in range(dims)]

    def broadcast() -> list[int]:
        return [1 if rng.random() < 0.25 else size for size in shape]

    bases, coefficients, first_rows = [], [], []
    for _ in range(rng.choice((1, 2, 3, 3, 4, 16))):
        whole = rng.random() < 0.5
        bases.append(strided(rng, [n_rows if whole else rng.choice((0, 1, 2, 4)), *broadcast()], dtype))
        coefficients.append(strided(rng, broadcast(), dtype) if rng.random() < 0.7 else None)
        first_rows.append(0 if whole else rng.choice((-1, 0, 1, 2, n_rows)))
        if rng.random() < 0.2 and bases[-1].shape[1:] != torch.Size(shape):
            bases[-1] = bases[-1].expand(-1, *shape)
    out = strided(rng, [n_rows, *shape[:-1], 1] if summed else [n_rows, *shape], dtype)
    return Combination(summed, out, bases, coefficients, [rng.gauss(0, 1) for _ in bases], first_rows)
