"""A layout whose tables reach beyond the vectors is refused, before a kernel follows them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blockhess_ext.layout import Layout


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("offsets", lambda t: t * 10**6),
        ("tiles", lambda t: t + 10**9),
        ("tiles", lambda t: -t),
        ("tile_offsets", lambda t: t + 10**9),
        ("tile_offsets", lambda t: t[:-1]),
        ("basis_offsets", lambda t: t + 10**9),
        ("basis_offsets", lambda t: t - 10**9),
    ],
)
def test_corrupted_tables_are_refused(name, change):
    layout = Layout.of([3000, 4000]).with_basis([True, False])
    assert replace(layout, **{name: getattr(layout, name).clone()}).dims == layout.dims
    with pytest.raises(ValueError, match=f"^Layout: {name} must fit dims, got "):
        replace(layout, **{name: change(getattr(layout, name))})


def test_sound_layouts_pass():
    for dims in ([1], [1, 1, 1], [10**6, 1, 5]):
        assert torch.equal(Layout.of(dims).with_basis([False] * len(dims)).basis_offsets, torch.full((len(dims),), -1))
