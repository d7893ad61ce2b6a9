"""Every public entry under random arguments: a sound result, or an error that names what is wrong.

BLOCKHESS_EXAMPLES=1000 tries that many of each instead of a few.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import blockhess
from blockhess.analysis.axes import Axis
from blockhess.problem.blocks import partition
from blockhess.spectra import Spectra
from blockhess_ext import NonFiniteError, Quadrature, batched_slq, ops
from blockhess_ext.layout import Layout
from tests.helpers.spectra_cases import make_spectra, random_spectra
from tests.helpers.tiny_models import labeled, mlp

EXAMPLES = int(os.environ.get("BLOCKHESS_EXAMPLES", "0"))


def examples(count: int) -> settings:
    return settings(
        max_examples=EXAMPLES or count,
        deadline=None,
        derandomize=not EXAMPLES,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


# What no argument means.
NONSENSE: tuple[Any, ...] = (
    None, True, False, 0, -1, 2**62, 2**63, 10**30, 0.0, -0.5, 1.5, 1e300, 1e-300, math.nan, math.inf, -math.inf, 1j,
    "", "x", "none", b"x", [], [0], [1, -1], ["x"], [None], (), {}, {"x": 1}, set(), object(), len, torch.float16,
    torch.tensor([]), torch.tensor([1.0, math.nan]), torch.tensor([2.0, 1.0]), torch.ones(2, 2), torch.tensor(1j),
    torch.tensor(3),
)  # fmt: skip
nonsense = st.sampled_from(NONSENSE)


def answer(call: Callable[[], Any], names: Sequence[str], *others: type[Exception]) -> Any:
    """What the call returns, or None where it refused its arguments and named one of them."""
    try:
        return call()
    except (NonFiniteError, blockhess.NonFiniteError):
        raise
    except (ValueError, TypeError, *others) as error:
        text = str(error)
        assert "unexpected keyword" not in text, text  # the test's own mistake
        assert any(re.search(rf"\b{name}\b", text) for name in names), f"{type(error).__name__}: {text}"
        return None


def check_quadrature(q: Quadrature) -> None:
    m = q.nodes.shape[-1]
    assert m == min(q.num_steps, max(q.dims))
    assert q.nodes.shape == q.weights.shape == q.alpha.shape == q.beta.shape == (q.num_probes, len(q.dims), m)
    for tensor in (q.nodes, q.weights, q.alpha, q.beta):
        assert tensor.dtype == torch.float64 and bool(tensor.isfinite().all())
    assert bool((q.steps <= torch.tensor(q.dims).clamp(max=m)).all()) and bool((q.nodes.diff(dim=-1) >= 0).all())
    assert bool((q.weights >= 0).all())
    torch.testing.assert_close(q.weights.sum(-1), (q.steps > 0).double(), rtol=0, atol=1e-6)


def operator(kind: str, dims: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    diagonal = torch.cat([torch.linspace(-1, 2, dim, dtype=torch.float64) for dim in dims])
    scale = {"tiny": 1e-30, "huge": 1e30, "zero": 0.0}.get(kind, 1.0)

    def hvp(v: torch.Tensor) -> torch.Tensor:
        w = v * (scale * diagonal).to(v.dtype)
        if kind == "nan" and len(dims) > 1:
            w[:, 0] = math.nan
        return w

    return hvp


SLQ_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "num_probes": st.integers(1, 4),
    "first_probe": st.sampled_from([0, 5, 2**40]),
    "num_steps": st.sampled_from([1, 2, 5, 30, 10**9]),
    "tol": st.sampled_from([None, 0.5, 1e-3, 1e300, 1e-300]),
    "sigma": st.sampled_from([None, 0.1, 1.0]),
    "block_ids": st.none(),
    "distribution": st.sampled_from(["gaussian", "rademacher"]),
    "reorthogonalize": st.sampled_from(["auto", "none", "full", "partial"]),
    "seed": st.sampled_from([0, 1, 2**63 - 1, None]),
    "dtype": st.sampled_from([None, torch.float32, torch.float64]),
    "device": st.sampled_from([None, "cpu"]),
    "on_nonfinite": st.sampled_from(["raise", "mark"]),
    "cuda_graph": st.just(False),
    "probes": st.none(),
    "state": st.none(),
    "on_step": st.none(),
    "on_state": st.none(),
}


def options(strategies: dict[str, st.SearchStrategy[Any]], wrong: int) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the options, of which as many as `wrong` are nonsense."""
    sound = st.fixed_dictionaries({}, optional=strategies)
    broken = st.dictionaries(st.sampled_from(sorted(strategies)), nonsense, min_size=wrong, max_size=wrong)
    return st.builds(lambda a, b: a | b, sound, broken)


@examples(60)
@given(
    dims=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    kind=st.sampled_from(["plain", "tiny", "huge", "zero", "nan"]),
    chosen=options(SLQ_OPTIONS, 0),
)
def test_batched_slq(dims: list[int], kind: str, chosen: dict[str, Any]) -> None:
    try:
        q = answer(lambda: batched_slq(operator(kind, dims), dims, **chosen), ["tol"])  # sigma without tol
    except NonFiniteError as error:
        q = error.partial
        assert kind == "nan" and chosen.get("on_nonfinite") != "mark"
    if q is not None:
        check_quadrature(q)
        assert bool(q.nonfinite.any()) == (kind == "nan" and len(dims) > 1)


@examples(150)
@given(chosen=options(SLQ_OPTIONS, 1), dims=st.one_of(st.just([3, 1]), nonsense))
def test_batched_slq_refuses_nonsense(chosen: dict[str, Any], dims: Any) -> None:
    q = answer(lambda: batched_slq(operator("plain", [3, 1]), dims, **chosen), ["dims", *chosen])
    if q is not None:
        check_quadrature(q)


@examples(40)
@given(result=nonsense)
def test_batched_slq_refuses_nonsense_of_the_operator(result: Any) -> None:
    fits = isinstance(result, torch.Tensor) and result.shape == (2, 2)
    unchecked = answer(lambda: batched_slq(lambda v: result, [2], num_probes=2, check=False), ["hvp"])
    checked = answer(lambda: batched_slq(lambda v: result, [2], num_probes=2), ["hvp"])
    assert (unchecked is not None) == fits
    assert checked is None or fits  # a constant is not symmetric
    assert answer(lambda: batched_slq(result, [2]), ["hvp"]) is None or callable(result)


spectra_cases = st.sampled_from(
    [
        random_spectra(),
        random_spectra(n_probes=1, n_blocks=2, m=1),
        make_spectra([[[0.0, 0.0], [0.0, 0.0]]], [[[0.5, 0.5], [1.0, 0.0]]]),
        make_spectra([[[1e30, 2e30], [-1e-30, 1e-30]]], [[[0.5, 0.5], [0.25, 0.75]]]),
        make_spectra([[[1.0, 2.0], [0.0, 0.0]]], [[[0.5, 0.5], [0.0, 0.0]]], steps=[[2, 0]], nonfinite=[[False, True]]),
    ]
)
COMPARISON: dict[str, st.SearchStrategy[Any]] = {
    "kind": st.sampled_from(["distance", "divergence"]),
    "base": st.sampled_from([2.0, math.e, 10]),
    "sigma": st.sampled_from([None, 0.1, 10.0]),
    "axis": st.sampled_from(["linear", "asinh"])
    | st.builds(Axis, st.sampled_from(["linear", "asinh"]), st.sampled_from(["none", "radius", "trace", 1, 2]))
    | st.builds(Axis, st.just("asinh"), st.sampled_from(["none", "trace"]), st.just(1.0)),
    "blocks": st.sampled_from([None, ["block0", "block1"]]),
}
AXIS = {name: COMPARISON[name] for name in ("axis", "blocks")}
points = st.sampled_from([None, 0.0, [0.0, 1.0], torch.linspace(-3, 3, 7)])
confidence = {"confidence": st.sampled_from([0.5, 0.95])}
METHODS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "js_matrix": COMPARISON,
    "js0": COMPARISON | {"confidence": st.sampled_from([None, 0.9])},
    "js_matrix_error": COMPARISON,
    "distance_matrix": AXIS | {"metric": st.sampled_from(["wasserstein", "kolmogorov"])},
    "density": AXIS | {"sigma": st.sampled_from([None, 0.1]), "grid": st.sampled_from([None, [0.0, 1.0]])},
    "cdf": {"x": points},
    "quantiles": {"q": st.sampled_from([0.5, [0.0, 1.0]])},
    "histogram": {"bins": st.sampled_from([1, 50, [0.0, 1.0]])},
    "kth_eigenvalue": {"k": st.integers(1, 20)} | confidence,
    "zero_mass": {"tolerance": st.sampled_from([None, 0.0, 1.0])},
    "outliers": {"name": st.sampled_from(["block0", "block1"]), "tolerance": st.sampled_from([1e-6, 1.0])},
    "default_sigma": AXIS,
    "trace_interval": confidence,
    "cdf_band": AXIS | {"x": st.sampled_from([None, [0.0, 1.0]])} | confidence,
    "density_band": AXIS | {"sigma": st.sampled_from([None, 0.1])} | confidence,
    "resolved_sigma": AXIS,
    "wasserstein_error": AXIS,
    "rows": {"blocks": AXIS["blocks"]},
    "table": {"blocks": AXIS["blocks"]},
    "error_table": AXIS | confidence,
}
REQUIRED = {
    "quantiles": {"q": 0.5},
    "kth_eigenvalue": {"k": 1},
    "outliers": {"name": "block0"},
}


def tensors_of(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors_of(part)] if isinstance(result, tuple) else []


def check_values(spectra: Spectra, method: str, result: Any) -> None:
    """Nothing is NaN where all blocks are known; densities, shares and divergences are in their ranges."""
    known = bool((spectra.quadrature.steps > 0).any(0).all())
    single = spectra.quadrature.num_probes == 1
    for tensor in tensors_of(result):
        if known and not single and method != "kth_eigenvalue":
            assert not bool(tensor.isnan().any()), f"{method}: {tensor}"
    if method == "js_matrix":
        assert bool((result >= 0).all()) and torch.equal(result, result.T) and bool((result.diagonal() == 0).all())
    if method == "js0":
        assert result.value >= 0 and str(result).isprintable()
    if method == "density":
        assert bool((result[1] >= 0).all()) and bool(result[1].isfinite().all())
    if method == "cdf":
        share = result[1][(spectra.quadrature.steps > 0).any(0)]
        assert bool(((share >= 0) & (share <= 1)).all())


def call(spectra: Spectra, method: str, chosen: dict[str, Any]) -> None:
    given = REQUIRED.get(method, {}) | chosen
    # "at least two blocks", and what a block cannot be divided by, are about blocks.
    names = [*given, "blocks", "eigenvalues"]
    result = answer(lambda: getattr(spectra, method)(**given), names)
    if result is not None:
        check_values(spectra, method, result)


@pytest.mark.parametrize("method", METHODS)
def test_spectra(method: str) -> None:
    @examples(8)
    @given(spectra=spectra_cases, chosen=options(METHODS[method], 0))
    def check(spectra: Spectra, chosen: dict[str, Any]) -> None:
        call(spectra, method, chosen)

    check()


@pytest.mark.parametrize("method", [method for method in METHODS if METHODS[method]])
def test_spectra_refuse_nonsense(method: str) -> None:
    @examples(25)
    @given(spectra=spectra_cases, chosen=options(METHODS[method], 1))
    def check(spectra: Spectra, chosen: dict[str, Any]) -> None:
        call(spectra, method, chosen)

    check()


SPECTRUM: dict[str, st.SearchStrategy[Any]] = {
    "first_probe": st.sampled_from([0, 3]),
    "keep_vectors": st.booleans(),
    "blocks": st.sampled_from(["parameter", "full", {"all": ["0.weight", "2.bias"]}, [(r"(\d)\.", r"\1")]]),
    "num_probes": st.integers(1, 2),
    "num_steps": st.integers(1, 4),
    "tol": st.sampled_from([None, 0.5]),
    "tol_sigma": st.none(),
    "seed": st.sampled_from([0, 2**63 - 1]),
    "distribution": SLQ_OPTIONS["distribution"],
    "reorthogonalize": SLQ_OPTIONS["reorthogonalize"],
    "batchnorm": st.sampled_from(["eval", "batch", "frozen_batch_stats"]),
    "engine": st.sampled_from(["auto", "autograd", "ggn"]),
    "dtype": st.sampled_from([None, torch.float64]),
    "matmul_precision": st.sampled_from(["highest", "medium"]),
    "memory_budget": st.sampled_from([None, 2**30, "1 GiB"]),
    "on_nonfinite": SLQ_OPTIONS["on_nonfinite"],
    "progress": st.just(False),
}


def small_spectrum(**chosen: Any) -> Spectra:
    torch.manual_seed(0)
    arguments = {"model": mlp(), "data": labeled(4), "loss_fn": torch.nn.CrossEntropyLoss(), "num_probes": 1,
                 "num_steps": 2, "progress": False} | chosen  # fmt: skip
    return blockhess.spectrum(**arguments)


@examples(10)
@given(chosen=options(SPECTRUM, 0))
def test_spectrum(chosen: dict[str, Any]) -> None:
    check_values_of_spectrum(small_spectrum(**chosen))


def check_values_of_spectrum(spectra: Spectra) -> None:
    q = spectra.quadrature
    valid = q.steps > 0
    assert bool(q.nodes.isfinite().all()) and bool((q.weights >= 0).all())
    torch.testing.assert_close(q.weights.sum(-1), valid.double(), rtol=0, atol=1e-6)


@examples(80)
@given(chosen=options(SPECTRUM, 1))
def test_spectrum_refuses_nonsense(chosen: dict[str, Any]) -> None:
    spectra = answer(lambda: small_spectrum(**chosen), list(chosen))
    if spectra is not None:
        check_values_of_spectrum(spectra)


@pytest.mark.parametrize("value", [value for value in NONSENSE if value is not None and not isinstance(value, str)])
def test_spectrum_refuses_a_run_dir_that_is_no_path(value: Any) -> None:
    assert answer(lambda: small_spectrum(run_dir=value), ["run_dir"]) is None


@examples(40)
@given(what=st.sampled_from(["model", "data", "loss_fn"]), value=nonsense)
def test_spectrum_refuses_nonsense_for_what_it_is_about(what: str, value: Any) -> None:
    # The loss of what is no batch for it may fail in any way of its own.
    names = ["model", "data", "loss_fn", "loss"]
    others = (RuntimeError, IndexError, AttributeError) if what == "loss_fn" else ()
    assert answer(lambda: small_spectrum(**{what: value}), names, *others) is None


@examples(40)
@given(
    name=st.sampled_from(["num_probes", "blocks", "dtype", "memory_budget", "on_nonfinite", "spectra", "model"]),
    value=nonsense,
)
def test_extend_refuses_nonsense(name: str, value: Any) -> None:
    torch.manual_seed(0)
    arguments = {"model": mlp(), "data": labeled(4), "loss_fn": torch.nn.CrossEntropyLoss()}
    arguments |= {"spectra": extended(), "num_probes": 2, "progress": False, name: value}
    spectra = answer(lambda: blockhess.extend(**arguments), [name])
    if spectra is not None:
        check_values_of_spectrum(spectra)


def extended(cache: list[Spectra] = []) -> Spectra:  # noqa: B006
    if not cache:
        cache.append(small_spectrum(engine="autograd", num_steps=2))
    return cache[0]


parts = st.builds(
    blockhess.ParameterSlice,
    st.sampled_from(["0.weight", "0.weight", "2.bias", "x"]),
    st.integers(-1, 4),
    st.integers(-1, 5),
    st.sampled_from([0, 0, 1, -1, 2]),
)
selections = st.one_of(st.sampled_from(["0.weight", "2.bias", "x"]), parts, st.lists(parts, max_size=3))


@examples(100)
@given(blocks=st.dictionaries(st.sampled_from(["a", "b"]), st.one_of(selections, nonsense), min_size=1))
def test_blocks(blocks: dict[str, Any]) -> None:
    model = mlp()
    cut = answer(lambda: partition(model, blocks), ["blocks", r"blocks\['[ab]'\]"])
    if cut is not None:
        assert [block.info.name for block in cut.blocks] == list(blocks)
        for block in cut.blocks:
            rows = torch.randn(2, block.info.dim)
            spread = block.spread(rows, dict(model.named_parameters()))
            back = torch.zeros_like(rows)
            block.accumulate(spread, back)
            assert torch.equal(back, rows)
            block.accumulate(spread, back, -0.5)
            assert torch.equal(back, 0.5 * rows) and sum(int((t != 0).sum()) for t in spread.values()) == rows.numel()


@examples(100)
@given(
    name=st.one_of(st.sampled_from(["0.weight", "2.weight"]), nonsense),
    num_heads=st.one_of(st.integers(-1, 5), nonsense),
    dim=st.one_of(st.integers(-3, 3), nonsense),
    roles=st.one_of(st.sampled_from([("head",), ("q", "k"), ()]), nonsense),
)
def test_heads(name: Any, num_heads: Any, dim: Any, roles: Any) -> None:
    model = mlp()
    found = answer(lambda: blockhess.heads(model, name, num_heads, dim=dim, roles=roles), ["heads", "parameter"])
    if found:
        cut = partition(model, found)
        assert sum(block.info.dim for block in cut.blocks) == dict(model.named_parameters())[name].numel()


def tensors(*shapes: tuple[int, ...]) -> st.SearchStrategy[torch.Tensor]:
    return st.builds(
        lambda shape, dtype, fill: torch.full(shape, fill, dtype=torch.float64).to(dtype),
        st.sampled_from(shapes),
        st.sampled_from([torch.float64, torch.float64, torch.float32, torch.int64, torch.bool]),
        st.sampled_from([0.0, 1.0, -1.0, 3.0, 1e300, math.nan, math.inf]),
    )


tables = tensors((2, 3), (2, 3), (2, 3), (1, 3), (3, 2), (0, 3), (2, 0), (6,), (2, 3, 1), ())
vectors = tensors((2,), (2,), (3,), (0,), (2, 1), ())


@examples(150)
@given(alpha=tables, beta=tables, steps=vectors)
def test_tridiag_quadrature(alpha: torch.Tensor, beta: torch.Tensor, steps: torch.Tensor) -> None:
    result = answer(lambda: ops.tridiag_quadrature(alpha, beta, steps), ["alpha", "beta", "steps"], RuntimeError)
    if result is not None:
        nodes, weights = result
        assert bool(nodes.isfinite().all()) and bool((weights >= 0).all()) and nodes.shape == alpha.shape
        assert bool(((weights.sum(1) - (steps > 0).double()).abs() < 1e-12).all())


@examples(150)
@given(nodes=tables, weights=tables, grid=vectors, sigma=vectors)
def test_gaussian_density(nodes: torch.Tensor, weights: torch.Tensor, grid: torch.Tensor, sigma: torch.Tensor) -> None:
    names = ["nodes", "weights", "grid", "sigma"]
    result = answer(lambda: ops.gaussian_density(nodes, weights, grid, sigma), names, RuntimeError)
    if result is not None:
        assert result.shape == (len(nodes), len(grid))


@examples(100)
@given(
    dims=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    count=st.integers(-1, 3),
    seed=st.sampled_from([0, 2**63 - 1, -1, 2**63]),
    first=st.sampled_from([0, 2**40, -1]),
    ids=vectors,
    distribution=st.sampled_from(["gaussian", "rademacher", "x", None]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64]),
)
def test_random_probes(
    dims: list[int], count: int, seed: int, first: int, ids: Any, distribution: Any, dtype: Any
) -> None:
    layout = Layout.of(dims)
    names = ["probes", "num_probes", "seed", "first_probe", "block_ids", "distribution", "dtype"]
    result = answer(
        lambda: ops.random_probes(
            layout, count, seed=seed, block_ids=ids, first_probe=first, distribution=distribution, dtype=dtype
        ),
        names,
        RuntimeError,
    )
    if result is not None:
        norms = torch.stack([result[:, layout.columns(l)].double().norm(dim=1) for l in range(len(dims))])
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


def test_the_check_sees_errors_that_name_nothing() -> None:
    # Control.
    for error in (ValueError("something is wrong"), KeyError("sigma"), RuntimeError("sigma")):

        def fail(error: Exception = error) -> None:
            raise error

        with pytest.raises((AssertionError, KeyError, RuntimeError)):
            answer(fail, ["sigma"])
    with pytest.raises(AssertionError):
        check_quadrature(
            batched_slq(lambda v: v, [2]).to("cpu").__class__(**{**vars(batched_slq(lambda v: v, [2])), "num_steps": 1})
        )
