"""Exact Hessians against autograd's own, and block-pair norms: exact, estimated, merged."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blockhess.models import GPT, GPTConfig, next_token_loss
from blockhess.problem.blocks import BlockInfo, ParameterSlice
from blockhess_paper.structure.figure2 import box_of, layer_of, transformer_hessian
from blockhess_paper.structure.hessian import exact_hessian
from blockhess_paper.structure.pair_norms import PairNorms, estimate_pair_norms, exact_pair_norms
from tests.helpers.dense_hessian import assert_close, dense_hessian


@pytest.fixture
def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(7, 3, dtype=torch.float64), torch.randint(4, (7,))


def test_exact_hessian_of_an_mlp(mlp, batch):
    hessian, blocks = exact_hessian(mlp, batch, nn.CrossEntropyLoss())
    names = [name for name, _ in mlp.named_parameters()]
    expected = dense_hessian(mlp, lambda model: nn.functional.cross_entropy(model(batch[0]), batch[1]), names)
    assert [block.name for block in blocks] == names
    assert_close(hessian, expected)


def test_exact_hessian_of_a_gpt_and_its_attention():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=5, context=3, num_layers=1, num_heads=2, width=4, mlp_width=3)).double()
    tokens = torch.randint(5, (2, 3))
    names = [name for name, _ in model.named_parameters() if name.startswith("layers.")]
    hessian, _ = exact_hessian(model, (tokens, tokens), next_token_loss, blocks={name: name for name in names})
    loss = lambda f: nn.functional.cross_entropy(f(tokens).flatten(0, 1), tokens.flatten())  # noqa: E731
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_close(hessian, dense_hessian(model, loss, names))


def test_blocks_of_slices_permute_the_hessian(mlp, batch):
    whole, _ = exact_hessian(mlp, batch, nn.CrossEntropyLoss(), blocks={"first": ["0.weight", "0.bias"]})
    units = {f"unit {i}": [ParameterSlice("0.weight", i, i + 1), ParameterSlice("0.bias", i, i + 1)] for i in range(5)}
    by_unit, blocks = exact_hessian(mlp, batch, nn.CrossEntropyLoss(), blocks=units)
    order = [index for i in range(5) for index in (3 * i, 3 * i + 1, 3 * i + 2, 15 + i)]
    assert [block.dim for block in blocks] == [4] * 5
    assert_close(by_unit, whole[order][:, order])


def test_linear_losses_have_zero_hessians():
    model = nn.Linear(2, 1).double()
    hessian, _ = exact_hessian(model, torch.ones(3, 2, dtype=torch.float64), lambda m, x: m(x).mean())
    assert hessian.shape == (3, 3) and not hessian.any()


def test_more_than_one_batch_is_refused(mlp, batch):
    with pytest.raises(ValueError, match="one batch, got 2"):
        exact_hessian(mlp, [batch, batch], nn.CrossEntropyLoss())


def infos(*dims: int) -> tuple[BlockInfo, ...]:
    return tuple(BlockInfo(f"{'ab'[i // 2]}.{i}", (dim,), dim, (f"{i}",)) for i, dim in enumerate(dims))


def test_pair_norms_by_hand():
    hessian = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 4.0], [3.0, 4.0, 5.0]])
    norms = exact_pair_norms(hessian, infos(2, 1))
    assert norms.squares.tolist() == [[9.0, 25.0], [25.0, 25.0]]
    assert norms.outside() == pytest.approx(50 / 84)
    assert norms.entries_outside() == pytest.approx(4 / 9)
    with pytest.raises(ValueError, match="4 rows"):
        exact_pair_norms(hessian, infos(2, 2))


def test_merged_blocks_add_up():
    squares = torch.arange(9.0, dtype=torch.float64).view(3, 3)
    norms = PairNorms(infos(1, 2, 3), squares + squares.T, torch.ones(3, 3, dtype=torch.float64))
    merged = norms.merged(lambda name: name.split(".")[0])
    assert [block.name for block in merged.blocks] == ["a", "b"] and [block.dim for block in merged.blocks] == [3, 3]
    assert merged.squares.tolist() == [[16.0, 20.0], [20.0, 16.0]]
    assert merged.stderr.flatten().tolist() == pytest.approx([2.0, 2**0.5, 2**0.5, 1.0], rel=1e-15)
    assert norms.merged(lambda name: "all").outside() == 0.0


def test_estimate_agrees_with_the_exact_norms(mlp, batch):
    exact = exact_pair_norms(*exact_hessian(mlp, batch, nn.CrossEntropyLoss()))
    found = estimate_pair_norms(mlp, batch, nn.CrossEntropyLoss(), num_probes=200, seed=3)
    assert bool(((found.squares - exact.squares).abs() <= 5 * found.stderr + 1e-12).all())
    assert bool((found.stderr > 0).any()) and torch.equal(found.squares, found.squares.T)
    other = estimate_pair_norms(mlp, batch, nn.CrossEntropyLoss(), num_probes=2, seed=4)
    assert not torch.equal(other.squares, found.squares)


def test_estimate_of_independent_blocks_is_exactly_zero_between_them():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    model = nn.ParameterDict({"a": a, "b": b})
    found = estimate_pair_norms(model, torch.ones(1), lambda m, x: (m["a"] ** 3).sum() + m["b"].prod())
    assert found.squares[0, 1] == 0 and found.outside() == 0
    assert found.squares.diagonal().tolist() == [108.0, 2.0]


def test_one_probe_has_infinite_errors(mlp, batch):
    assert bool(estimate_pair_norms(mlp, batch, nn.CrossEntropyLoss(), num_probes=1).stderr.isinf().all())
    with pytest.raises(ValueError, match="num_probes"):
        estimate_pair_norms(mlp, batch, nn.CrossEntropyLoss(), num_probes=0)


def test_the_papers_small_transformer():
    hessian, norms = transformer_hessian(2, seed=0)
    assert hessian.shape == (2 * 96, 2 * 96)  # 4 x 4 query, key, value, projection, fc, projection
    assert norms.merged(box_of).outside() < 1e-3 < norms.outside()
    assert [block.dim for block in norms.merged(layer_of).blocks] == [96, 96]
    assert [block.name for block in norms.merged(box_of).blocks][:3] == ["layer 0 QK", "layer 0 VO", "layer 0 MLP"]


def test_gpt_without_layer_norm():
    model = GPT(GPTConfig(vocab_size=5, context=2, num_layers=1, num_heads=2, width=4, mlp_width=4, layer_norm=False))
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    with pytest.raises(ValueError, match="mlp_width"):
        GPTConfig(mlp_width=0)
