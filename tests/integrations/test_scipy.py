"""Block Hessians as scipy operators against dense ones, and spectra of scipy operators against their eigenvalues."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator, eigsh
from torch import nn

import blockhess
from blockhess.integrations.scipy import block_operators, operator_spectra
from blockhess.problem.blocks import ParameterSlice
from tests.helpers.dense_hessian import dense_hessian
from tests.helpers.tiny_models import labeled, mlp

LOSS = nn.CrossEntropyLoss()


def symmetric(n: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((n, n))
    return values + values.T


@pytest.mark.usefixtures("float64_models")
def test_block_operators_are_the_dense_hessians() -> None:
    model, (x, y) = mlp(), labeled(9)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    with block_operators(model, batches, LOSS) as operators:
        assert list(operators) == [name for name, _ in model.named_parameters()]
        for name, operator in operators.items():
            dense = dense_hessian(model, lambda run: LOSS(run(x), y), [name]).numpy()
            n = len(dense)
            assert operator.shape == (n, n) and operator.dtype == np.float64
            assert operator @ np.eye(n) == pytest.approx(dense, abs=1e-13)
            assert operator.T @ np.eye(n) == pytest.approx(dense, abs=1e-13)
            assert operator.matvec(np.eye(n)[0]) == pytest.approx(dense[0], abs=1e-13)
            assert np.abs(dense).max() > 1e-3
        largest = eigsh(operators["0.weight"], k=1, which="LA", return_eigenvectors=False)
        dense = dense_hessian(model, lambda run: LOSS(run(x), y), ["0.weight"]).numpy()
        assert largest == pytest.approx(np.linalg.eigvalsh(dense)[-1:])
    with pytest.raises(RuntimeError, match=r"'0\.bias' must be used within the with statement"):
        operators["0.bias"] @ np.ones(4)


def test_block_operators_keep_the_models_state() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = torch.get_rng_state()
    batch = torch.ones(8, 3), torch.zeros(8, dtype=torch.long)
    with block_operators(
        model, batch, LOSS, batchnorm="batch", blocks={"head": ParameterSlice("3.weight", 0, 1)}
    ) as operators:
        assert operators["head"].shape == (4, 4) and operators["head"].dtype == np.float32
        operators["head"] @ np.ones(4)
        assert not model[2].training
    assert model[2].training and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="engine must be one of autograd, traced, ggn, difference, got 'exact'"):
        block_operators(model, batch, LOSS, engine="exact").__enter__()


@pytest.mark.usefixtures("float64_models")
def test_operators_have_the_spectra_of_their_model() -> None:
    """There and back: the same probes, so the same nodes."""
    model, batch = mlp(), labeled(9)
    expected = blockhess.spectrum(model, batch, LOSS, num_probes=3, num_steps=4, engine="autograd")
    with block_operators(model, batch, LOSS) as operators:
        spectra = operator_spectra(operators, num_probes=3, num_steps=4)
    assert spectra.names == expected.names
    estimated = [name for name in spectra if name not in expected.provenance["plan"]["exact"]]
    assert estimated
    for name in estimated:
        assert torch.allclose(spectra[name].nodes, expected[name].nodes, atol=1e-10)
        assert torch.allclose(spectra[name].weights, expected[name].weights, atol=1e-8)


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_matrix, aslinearoperator])
def test_spectra_of_operators_of_any_form(form: Any) -> None:
    dense = {"large": symmetric(12), "small": symmetric(5, seed=1), "one": np.array([[3.0]])}
    spectra = operator_spectra({name: form(matrix) for name, matrix in dense.items()}, num_probes=4)
    assert spectra.dims == (12, 5, 1) and spectra.quadrature.dtype == "float64"
    for name, matrix in dense.items():
        eigenvalues = np.linalg.eigvalsh(matrix)
        assert spectra[name].nodes[0, : len(matrix)].numpy() == pytest.approx(eigenvalues, abs=1e-10)
        assert abs(spectra[name].trace - matrix.trace()) <= 5 * spectra[name].trace_stderr + 1e-9
    assert 0 < float(spectra.js0()) <= 1


def test_finished_recurrences_cost_nothing() -> None:
    calls: dict[int, int] = {3: 0, 40: 0}

    def counted(n: int) -> LinearOperator:
        matrix = symmetric(n)

        def matmat(x: np.ndarray) -> np.ndarray:
            calls[n] += x.shape[1]
            return matrix @ x

        return LinearOperator((n, n), matvec=lambda x: matrix @ x, matmat=matmat, dtype=float)

    spectra = operator_spectra({"a": counted(3), "b": counted(40)}, num_probes=2)
    assert calls[40] >= 80 and calls[3] <= 2 * 3 + 2
    assert spectra.provenance["hvps"] == sum(calls.values())


def test_names_that_are_no_unicode() -> None:
    assert operator_spectra({"a\udcff": np.eye(3)}, num_probes=1).names == ("a\udcff",)


def test_one_operator_and_float32() -> None:
    spectra = operator_spectra(symmetric(6).astype(np.float32), num_probes=2)
    assert spectra.names == ("operator",) and spectra.quadrature.dtype == "float32"


@pytest.mark.parametrize(
    ("operators", "error", "message"),
    [
        ({}, ValueError, "operators must hold at least one, got none"),
        ({"a": np.ones((2, 3))}, ValueError, r"'a' must be square, got shape \(2, 3\)"),
        ({"a": np.triu(np.ones((5, 5)))}, ValueError, "'a' must be symmetric"),
        ({"a": 1j * np.eye(3)}, ValueError, "'a' must be real, got complex128"),
        ({"a": "matrix"}, TypeError, "'a' must be a linear operator"),
    ],
)
def test_what_is_no_symmetric_operator_is_refused(operators: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"operator_spectra: {message}"):
        operator_spectra(operators)


@pytest.mark.usefixtures("float64_models")
def test_operators_of_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    model, batch = mlp(), labeled(9)
    name, parameter = next(iter(model.named_parameters()))
    operator = curvlinops.HessianLinearOperator(model, LOSS, [parameter], [batch])
    spectra = operator_spectra({name: operator}, num_probes=2)
    with block_operators(model, batch, LOSS) as operators:
        expected = operator_spectra({name: operators[name]}, num_probes=2)
    assert torch.allclose(spectra[name].nodes, expected[name].nodes, atol=1e-8)
