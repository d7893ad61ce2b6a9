"""What docs/large_models.md says that large models cost is counted from their shapes."""

from __future__ import annotations

import pytest

from blockhess.problem.memory import size_text
from docs._generate import large_models_page
from docs._generate.large_models_page import SHAPES, Shape, counts


def test_the_counted_part_is_up_to_date() -> None:
    text = large_models_page.PAGE.read_text()
    assert large_models_page.page(text) == text
    assert "counted, not measured" in text


def test_counts_are_those_of_hand_calculation() -> None:
    found = counts(SHAPES["7B"])
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    ends = 2 * 32_000 * 4096 + 4096
    assert found["parameters"] == f"{32 * layer + ends:,}" == "6,738,415,616"  # that of the published model
    # Layers are gathered twice, the root once; the gradients of all are reduced; 7 of 8 parts leave a process.
    gradient = 7 / 8 * 4 * (2 * 32 * layer + ends + 32 * layer + ends)
    assert found["for a gradient of the model"] == size_text(gradient)
    largest = 4 * 32_000 * 4096
    assert found["for a product of the largest block"] == size_text(2 * gradient + 7 / 8 * largest)
    assert found["parameters and gradients gathered at a time"] == size_text(4 * (2 * ends + 4 * layer))
    assert found["products for each batch"] == f"{30 * (32 * 9 + 3):,}"


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"processes": 16}, {"processes", "its shards", "for a gradient of the model"}),
        ({"layers": 33}, {"parameters", "for a gradient of the model", "products for each batch"}),
    ],
)
def test_counts_follow_the_shape(change, changed) -> None:
    small = {"processes": 8, "layers": 32, "width": 256, "mlp_width": 512, "key_width": 256}
    before, after = counts(Shape(**small)), counts(Shape(**small | change))
    assert changed <= {name for name in before if before[name] != after[name]}
