"""Partitions of a model's parameters, and the names that users give them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blockhess.problem.blocks import ParameterSlice, heads, partition, unwrap


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))


def names(model: nn.Module, blocks: object = "parameter") -> list[str]:
    return [block.info.name for block in partition(model, blocks).blocks]


def test_one_block_per_parameter_in_the_models_order() -> None:
    infos = [block.info for block in partition(mlp()).blocks]
    assert [(i.name, i.shape, i.dim) for i in infos] == [
        ("0.weight", (3, 2), 6),
        ("0.bias", (3,), 3),
        ("2.weight", (2, 3), 6),
        ("2.bias", (2,), 2),
    ]
    assert [i.parameters for i in infos] == [(i.name,) for i in infos]
    assert not any(i.note for i in infos)


def test_full() -> None:
    (block,) = partition(mlp(), "full").blocks
    assert (block.info.name, block.info.shape, block.info.dim) == ("full", (17,), 17)
    assert block.info.parameters == ("0.weight", "0.bias", "2.weight", "2.bias")


def test_regex_groups_take_the_first_match_and_leave_out_the_rest() -> None:
    blocks = partition(mlp(), [(r"2\.bias", "last"), (r"(\d)\.(weight|bias)", r"layer \1")]).blocks
    assert [(b.info.name, b.info.parameters) for b in blocks] == [
        ("layer 0", ("0.weight", "0.bias")),
        ("layer 2", ("2.weight",)),
        ("last", ("2.bias",)),
    ]
    assert names(mlp(), [("weight", "weights")]) == ["weights"]


def test_dict_of_names_and_parts() -> None:
    spec = {
        "a": "2.bias",
        "b": ["0.bias", ParameterSlice("0.weight", 1, 3)],
        "column": ParameterSlice("0.weight", 0, 1, dim=1),
    }
    infos = [block.info for block in partition(mlp(), spec).blocks]
    assert [(i.name, i.shape, i.dim) for i in infos] == [("a", (2,), 2), ("b", (7,), 7), ("column", (3, 1), 3)]
    assert infos[1].parameters == ("0.bias", "0.weight")


def test_pieces_are_the_views_they_say() -> None:
    weight = torch.arange(6.0).view(3, 2)
    blocks = partition(
        mlp(), {"rows": ParameterSlice("0.weight", 1, 3), "column": ParameterSlice("0.weight", 1, 2, dim=1)}
    ).blocks
    assert blocks[0].pieces[0].of(weight).tolist() == [[2, 3], [4, 5]]
    assert blocks[1].pieces[0].of(weight).tolist() == [[1], [3], [5]]


def test_names_of_parts() -> None:
    assert str(ParameterSlice("attn.qkv", 0, 64)) == "attn.qkv[0:64]"
    assert str(ParameterSlice("conv", 1, 2, dim=2)) == "conv[:,:,1:2]"


def test_heads_cover_the_fused_qkv() -> None:
    model = nn.Sequential(nn.Linear(4, 12, bias=False))
    rows = heads(model, "0.weight", 2, roles=("q", "k", "v"))
    assert rows["0.weight[k1]"] == ParameterSlice("0.weight", 6, 8)
    columns = heads(model, "0.weight", 2, dim=-1)
    assert columns == {
        "0.weight[head0]": ParameterSlice("0.weight", 0, 2, 1),
        "0.weight[head1]": ParameterSlice("0.weight", 2, 4, 1),
    }
    infos = [block.info for block in partition(model, rows | {"all": "0.weight"}).blocks]
    assert [i.dim for i in infos] == [8] * 6 + [48]

    with pytest.raises(ValueError, match=r"shape \(12, 4\) must divide into 5 equal parts"):
        heads(model, "0.weight", 5)
    with pytest.raises(ValueError, match="dim 2"):
        heads(model, "0.weight", 2, dim=2)
    with pytest.raises(ValueError, match="no parameter 'weight'"):
        heads(model, "weight", 2)


def test_tied_parameters_are_one_block() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embedding"].weight
    cut = partition(model)
    assert cut.tied == {"embedding.weight": ("head.weight",)}
    assert [(b.info.name, b.info.note) for b in cut.blocks] == [("embedding.weight", "tied with head.weight")]
    # Either name finds it.
    assert partition(model, {"out": "head.weight"}).blocks[0].info.parameters == ("embedding.weight",)
    assert partition(model, [("head", "out")]).blocks[0].info.parameters == ("embedding.weight",)


def test_frozen_parameters_are_left_out_and_reported() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    cut = partition(model)
    assert [b.info.name for b in cut.blocks] == ["2.weight", "2.bias"]
    assert cut.frozen == ("0.weight", "0.bias")
    with pytest.raises(ValueError, match=r"blocks\['a'\]: parameter '0.bias' is frozen"):
        partition(model, {"a": "0.bias"})
    with pytest.raises(ValueError, match=r"regex '\^0' matches no trainable"):
        partition(model, [("^0", "a")])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="must have a parameter with requires_grad=True, got none of 4"):
        partition(model)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(nn.DataParallel(model), backend="eager")),
    ],
)
def test_wrappers_do_not_show(wrap: object) -> None:
    model = mlp()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert names(wrapped) == names(model)
    # The names that the wrapper shows are understood too.
    shown = [name for name, _ in wrapped.named_parameters()]
    assert shown != names(model)
    if "_orig_mod.module" not in shown[0]:
        assert partition(wrapped, {"a": shown[0]}).blocks[0].info.parameters == ("0.weight",)


def test_compiled_submodules_do_not_show() -> None:
    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")
    assert next(model.named_parameters())[0] == "0._orig_mod.weight"
    assert names(model) == names(mlp())


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ({"a": "0.wieght"}, "no parameter '0.wieght'; the nearest are '0.weight'"),
        ({"a": ["0.bias", "xyz"]}, "no parameter 'xyz'$"),
        ({"a": ParameterSlice("1.weight", 0, 1)}, "no parameter '1.weight'"),
        ({"a": ParameterSlice("0.weight", 0, 4)}, r"stop=4, dim=0\) must lie within shape \(3, 2\)"),
        ({"a": ParameterSlice("0.weight", 2, 2)}, "must lie within"),
        ({"a": ParameterSlice("0.weight", 0, 1, dim=2)}, "must lie within"),
        ({"a": []}, r"blocks\['a'\] must be a parameter name, a ParameterSlice or a non-empty list of those, got \[\]"),
        ({"a": 3}, r"blocks\['a'\] must be .* got 3"),
        ({"a": ["0.bias", "0.bias"]}, "same entries twice, got 0.bias and 0.bias"),
        ({"a": ["0.weight", ParameterSlice("0.weight", 0, 1)]}, r"twice, got 0.weight and 0.weight\[0:1\]"),
        (
            {"a": [ParameterSlice("0.weight", 0, 2), ParameterSlice("0.weight", 1, 3)]},
            r"twice, got 0.weight\[0:2\] and 0.weight\[1:3\]",
        ),
        ({"a": [ParameterSlice("0.weight", 0, 1), ParameterSlice("0.weight", 0, 1, dim=1)]}, "twice"),
        ({}, "at least one block, got {}"),
        ([], r"at least one block, got \[\]"),
        ("layers", "must be 'parameter', 'full', .* got 'layers'"),
        (["0.weight"], r"\(regex, group\) pairs of strings, got '0.weight'"),
        ([("3", "a")], "regex '3' matches no trainable parameter"),
        ([("0", "a"), ("0.bias", "b")], "regex '0.bias' matches no trainable parameter that an earlier"),
        ([("(", "a")], "must be a regex"),
        ([("0", r"\1")], "must be a regex, invalid group reference"),
        (7, "blocks must be a string, a dict or a list of pairs, got int"),
    ],
)
def test_bad_blocks(blocks: object, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        partition(mlp(), blocks)


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.arange(3), "a real floating-point number, got torch.int64; it cannot be trained"),
        (torch.ones(3, dtype=torch.complex64), "a real floating-point number, got torch.complex64; give its real"),
        (torch.eye(3).to_sparse(), "dense, got torch.sparse_coo"),
        (torch.inference_mode()(lambda: nn.Parameter(torch.ones(3)))(), "made outside torch.inference_mode"),
    ],
)
def test_bad_tensors(tensor: torch.Tensor, text: str) -> None:
    model = mlp()
    model.extra = (
        tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=tensor.dtype != torch.int64)
    )
    for blocks in ("parameter", "full", {"a": "extra"}):
        if tensor.dtype == torch.int64 and isinstance(blocks, str):
            continue
        with pytest.raises(ValueError, match=f"parameter 'extra' must be {text}"):
            partition(model, blocks)
    assert names(model, {"a": "0.weight"}) == ["a"]  # not asked for: not in the way


def test_integer_parameters_are_frozen() -> None:
    model = mlp()
    model.base = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    assert partition(model).frozen == ("base",)
    assert "base" not in names(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="must have a parameter with requires_grad=True, got none of 5"):
        partition(model)


def test_frozen_half_precision_is_not_in_the_way() -> None:
    model = mlp()
    model[0].bfloat16().requires_grad_(False)
    assert names(model) == ["2.weight", "2.bias"]


def test_uninitialised_and_empty_parameters() -> None:
    for lazy in (nn.LazyLinear(3), nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False))):
        with pytest.raises(ValueError, match=r"model must have run once before, got '.*' uninitialized"):
            partition(lazy)
    model = mlp()
    model.extra = nn.Parameter(torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"block 'extra' must have at least one entry, got shape \(0, 3\)"):
        partition(model)


def test_a_block_name_is_a_string() -> None:
    with pytest.raises(TypeError, match="spectrum: blocks must have strings for names, got 3"):
        partition(nn.Linear(2, 2), {3: "weight"})  # type: ignore[dict-item]
