"""An op whose tables do not fit its vectors is refused before a kernel follows them, also without a Layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blockhess_ext import ops
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import Recurrences

DIMS, COLUMNS = (3000, 40000), 43000


def call(op, layout, columns=COLUMNS, n_basis=DIMS[0]):
    vectors = torch.ones(2, columns)
    recurrences = Recurrences.start(2, torch.tensor(DIMS), rows=4)
    partial = torch.zeros(2, layout.n_tiles, dtype=torch.float64)
    if op == "lanczos_step":
        ops.lanczos_step(vectors, vectors.clone(), vectors.clone(), recurrences, layout, partial)
    elif op == "reorthogonalize":
        ops.reorthogonalize(vectors, torch.zeros(4, 2, n_basis), recurrences, layout, partial.new_zeros(2, 3, 5))
    else:
        torch.ops.blockhess_ext.random_probes(
            vectors, 0, 0, 0, torch.arange(2), layout.offsets, layout.tiles, layout.tile_offsets, partial
        )


OPS = ("lanczos_step", "reorthogonalize", "random_probes")
LAYOUT = Layout.of(DIMS).with_basis([True, False])


@pytest.mark.parametrize("op", OPS)
def test_sound_tables_pass(op):
    call(op, LAYOUT)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("name", "entry", "value"),
    [
        ("offsets", 0, 1),
        ("offsets", 1, 10**9),
        ("offsets", 2, 42999),
        ("tiles", 0, 1),
        ("tiles", 1, -1),
        ("tiles", 2, 2999),
        ("tiles", 8, 2**62),
        ("tile_offsets", 0, 1),
        ("tile_offsets", 1, 2),
        ("tile_offsets", 1, -(2**62)),
        ("tile_offsets", 2, 4),
    ],
)
def test_corrupted_tables_are_refused(op, name, entry, value):
    table = getattr(LAYOUT, name).clone()
    table.view(-1)[entry] = value
    with pytest.raises(RuntimeError, match=f"{op}: offsets, tiles and tile_offsets must divide the 43000 columns"):
        call(op, replace(LAYOUT, **{name: table}))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("columns", [0, 42999, 43001])
def test_vectors_of_other_lengths_are_refused(op, columns):
    with pytest.raises(RuntimeError, match=f"{op}: offsets.* columns of a vector"):
        call(op, LAYOUT, columns)


@pytest.mark.parametrize(("basis_offset", "n_basis"), [(1, 3000), (2**62, 3000), (0, 2999), (0, 0)])
def test_blocks_outside_the_basis_are_refused(basis_offset, n_basis):
    layout = replace(LAYOUT, basis_offsets=torch.tensor([basis_offset, -1]))
    with pytest.raises(RuntimeError, match=rf"reorthogonalize: basis_offsets must fit the {n_basis} columns of basis"):
        call("reorthogonalize", layout, n_basis=n_basis)
