"""SpectraData: nodes and weights of stochastic Lanczos quadrature for every block of a model.

`blockhess.analysis` computes densities, moments and distances from them, for any sigma. All tensors are float64 on the
CPU, with rows in the order of `names`. The statistics of a block without a Lanczos step are NaN; no others are.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from blockhess import _checks
from blockhess._text import plural, printable
from blockhess.problem.blocks import ZERO_NOTE, BlockInfo
from blockhess.results.unit import Unit
from blockhess_ext import Quadrature, State

# A node counts as negative below -64 eps(dtype of the vectors) max |node|, the rounding error of Lanczos.
NEGATIVE_TOLERANCE = 64


class SpectraData:
    """Nodes and weights of every block of a model, immutable.

    Args:
        blocks: one BlockInfo per block, with distinct names.
        quadrature: nodes and weights, with block l for blocks[l]; moved to the CPU.
        provenance: how the result was computed, JSON values only.
        vectors: the state after the last step of every unit of work, if recorded; files do not hold it.

    Raises:
        ValueError: the dims of blocks and quadrature differ, or two blocks share a name.
        TypeError: provenance holds a value that is not JSON.
    """

    def __init__(
        self,
        blocks: Sequence[BlockInfo],
        quadrature: Quadrature,
        provenance: Mapping[str, Any],
        vectors: Sequence[tuple[Unit, State]] = (),
    ) -> None:
        self.blocks, self.vectors = tuple(blocks), tuple(vectors)
        if self.dims != tuple(quadrature.dims):
            raise ValueError(f"Spectra: blocks must have dims {tuple(quadrature.dims)}, got {self.dims}")
        repeated = [name for name, count in Counter(self.names).items() if count > 1]
        if repeated:
            raise ValueError(f"Spectra: blocks must have different names, got {', '.join(repeated)} more than once")
        self.quadrature: Quadrature = dataclasses.replace(
            quadrature, **{name: getattr(quadrature, name).detach().cpu() for name in Quadrature.TENSORS}
        )
        try:
            # A copy, equal to the provenance read from a saved file.
            self.provenance: dict[str, Any] = json.loads(json.dumps(dict(provenance)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"Spectra: provenance must hold JSON values only: {error}") from None

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._row

    def __repr__(self) -> str:
        q, model = self.quadrature, self.provenance.get("model") or "a model"
        at_most = "at most " if self.provenance.get("tol") else ""
        return printable(
            f"Spectra of {model}: {plural(len(self), 'block')}, {plural(sum(self.dims), 'parameter')}; "
            f"{at_most}{plural(q.num_probes, f'{q.distribution} probe')}, "
            f"{at_most}{plural(q.num_steps, 'Lanczos step')} in {q.dtype}, seed {q.seed}"
            f"{'; of an unfinished run, what it has so far' if self.provenance.get('partial') else ''}"
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the blocks, in order."""
        return tuple(block.name for block in self.blocks)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        """Sizes of the blocks, in order."""
        return tuple(block.dim for block in self.blocks)

    @cached_property
    def _row(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def rows(self, blocks: Sequence[str] | None = None) -> list[int]:
        """Return the rows of these blocks in every tensor, or raise ValueError; None means all, in order."""
        names = self.names if blocks is None else _checks.names(blocks)
        for name, count in Counter(names).items():
            if name not in self._row:
                raise ValueError(f"blocks: {self.unknown_name(name)}")
            if count > 1:
                raise ValueError(f"blocks: names must be different, got {name!r} {count} times")
        return [self._row[name] for name in names]

    def unknown_name(self, name: object) -> str:
        """Return the error message for an unknown name."""
        close = difflib.get_close_matches(str(name), self.names, n=3)
        return f"no block is called {name!r}" + (f"; close to it: {', '.join(map(printable, close))}" if close else "")

    @cached_property
    def merged(self) -> tuple[Tensor, Tensor]:
        """Nodes and weights of the mean over probes, (n_blocks, n_probes m) each: see Quadrature.merged."""
        return self.quadrature.merged()

    @cached_property
    def known(self) -> Tensor:
        """Whether any probe of a block has a Lanczos step, (n_blocks,) bool."""
        return (self.quadrature.steps > 0).any(0)

    def hvp_error(self, name: str) -> float:
        """Return the error of Hessian-vector products with a block, in units of the eigenvalues; 0 if unknown.

        It is an attribute of the block, or `provenance["hvp_error"][name]`.
        """
        known = getattr(self.blocks[self._row[name]], "hvp_error", None)
        if known is None:
            known = (self.provenance.get("hvp_error") or {}).get(name)
        return float(known or 0.0)

    @cached_property
    def zero_tolerance(self) -> Tensor:
        """Largest |eigenvalue| that counts as 0, (n_blocks,): hvp_error, or the rounding of the vectors if larger."""
        rounding = NEGATIVE_TOLERANCE * torch.finfo(getattr(torch, self.quadrature.dtype)).eps
        errors = torch.tensor([self.hvp_error(name) for name in self.names], dtype=torch.float64, device="cpu")
        return torch.maximum(rounding * self.merged[0].abs().amax(1), errors)

    @cached_property
    def zero_blocks(self) -> tuple[str, ...]:
        """Names of the blocks whose largest |eigenvalue| is within the error of their Hessian-vector products.

        Blocks whose products were not confirmed (`provenance["unchecked"]`) are not among them.
        """
        noted = {block.name for block in self.blocks if ZERO_NOTE in block.note.split("; ")}
        unproven = self.names if self.provenance.get("hvp_error_unknown") else self.provenance.get("unchecked") or ()
        sizes = self.merged[0].abs().amax(1).tolist()
        return tuple(
            name
            for name, size, known in zip(self.names, sizes, self.known.tolist())
            if known and (name in noted or (size <= self.hvp_error(name) and name not in unproven))
        )

    @cached_property
    def noise_blocks(self) -> tuple[str, ...]:
        """Names of the zero_blocks whose nodes are not all 0: their eigenvalues are the error of the products."""
        return tuple(name for name in self.zero_blocks if bool(self.merged[0][self._row[name]].any()))

    @cached_property
    def excluded(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of the blocks that comparisons exclude by default; normalized axes may exclude more."""
        broken = self.quadrature.nonfinite.any(0).tolist()
        found = []
        for block, bad in zip(self.blocks, broken):
            unused, zero = "unused" in block.note.split("; "), block.name in self.zero_blocks
            if reason := "non-finite" if bad else "unused" if unused else "zero" if zero else "":
                found.append((block.name, reason))
        return tuple(found)
