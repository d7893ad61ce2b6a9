"""Block Hessians as scipy LinearOperators, and the spectra of any symmetric linear operators."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor, nn

import blockhess
from blockhess.hvp import ENGINES, BlockOperator, Engine
from blockhess.problem.batches import as_batches
from blockhess.problem.blocks import BlockInfo, BlockSpec, block_id, partition, unwrap
from blockhess.problem.losses import make_loss
from blockhess.problem.model_state import fixed_state
from blockhess.problem.problem import Computation, Problem
from blockhess.problem.ranks import SINGLE_PROCESS
from blockhess.spectra import Spectra
from blockhess_ext import batched_slq
from blockhess_ext.arguments import choice

# Largest |<u, A v> - <v, A u>| of random u, v, in units of sqrt(eps) (|u| |A v| + |v| |A u|).
SYMMETRY_TOLERANCE = 10.0


class HessianOperator(LinearOperator):  # type: ignore[misc]
    """The Hessian of the block `name`; made by `block_operators`."""

    def __init__(
        self, problem: Problem, engine: Engine, number: int, is_open: Callable[[], bool], lock: threading.Lock
    ) -> None:
        self.name = problem.infos[number].name
        dim = problem.dims[number]
        super().__init__(torch.empty(0, dtype=problem.dtype, device="cpu").numpy().dtype, (dim, dim))
        self._problem, self._is_open, self._lock = problem, is_open, lock
        self._product = BlockOperator(problem, engine, [number])

    def _matmat(self, x: NDArray[Any]) -> NDArray[Any]:
        if not self._is_open():
            raise RuntimeError(
                f"block_operators: {self.name!r} must be used within the with statement, which fixes the model's state"
            )
        v = torch.from_numpy(np.ascontiguousarray(x.T, self.dtype)).to(self._problem.device)
        with self._lock:  # the operators share one engine
            result: NDArray[Any] = self._product(v).T.cpu().numpy()
        return result

    def _adjoint(self) -> HessianOperator:
        return self


@contextmanager
def block_operators(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    blocks: BlockSpec = "parameter",
    batchnorm: str = "eval",
    engine: str = "autograd",
    dtype: torch.dtype | None = None,
) -> Iterator[dict[str, LinearOperator]]:
    """Yield the Hessian of every block as a symmetric scipy LinearOperator.

    Within the context the model is in the state that `spectrum` evaluates; its own state is restored at the end. Other
    threads may use the operators; those that call `spectrum` or `block_operators` wait for the end of the context.

    Args:
        model, data, loss_fn, blocks, dtype: as for `spectrum`.
        batchnorm: "eval" or "batch", as for `spectrum`.
        engine: "autograd", "traced", "ggn" or "difference", as for `spectrum`.

    Yields:
        Dict from block name to operator (dim, dim), in the order of the blocks. The operators take vectors (dim,) and
        (dim, k) in the dtype of the computation, and raise RuntimeError after the end of the context.

    Raises:
        ValueError, TypeError, NotImplementedError: see `spectrum`.

    Example:
        >>> import scipy.sparse.linalg
        >>> with block_operators(model, batch, torch.nn.CrossEntropyLoss()) as operators:
        ...     largest = scipy.sparse.linalg.eigsh(operators["0.weight"], k=3, return_eigenvectors=False)
    """
    choice("engine", engine, ENGINES, op="block_operators")
    choice("batchnorm", batchnorm, ("eval", "batch"), op="block_operators")
    model = unwrap(model)
    cut, loss = partition(model, blocks), make_loss(loss_fn)
    is_open, lock = True, threading.Lock()
    second_order = engine != "difference"
    with fixed_state(Computation(model, loss), batchnorm, second_order):
        batches = as_batches(data, pairs=loss.pairs)
        problem = Problem(model, loss, batches, cut.blocks, dtype, second_order=second_order)
        problem.join(SINGLE_PROCESS)
        products: Engine = ENGINES[engine](problem)
        try:
            yield {
                info.name: HessianOperator(problem, products, number, lambda: is_open, lock)
                for number, info in enumerate(problem.infos)
            }
        finally:
            is_open = False


def operator_spectra(
    operators: Any,
    *,
    num_probes: int = 10,
    num_steps: int = 100,
    seed: int | None = 0,
    distribution: str = "gaussian",
    reorthogonalize: str = "auto",
    on_nonfinite: str = "raise",
) -> Spectra:
    """Estimate the eigenvalue densities of symmetric linear operators; each operator is one block of the result.

    Args:
        operators: one operator, or a mapping from name to operator. An operator is a scipy LinearOperator, anything
            that scipy's aslinearoperator takes (array, sparse matrix), or an operator of curvlinops.
        num_probes, num_steps, seed, distribution, reorthogonalize, on_nonfinite: as for `blockhess_ext.batched_slq`.
            As in `spectrum`, the random vectors of a block depend on its name.

    Returns:
        The spectra, computed in float64 unless every operator is float32.

    Raises:
        TypeError: an operator is not linear.
        ValueError: an operator is not square, real and symmetric, or there is none.
        blockhess_ext.NonFiniteError: a product is not finite.

    Example:
        >>> import scipy.sparse
        >>> spectra = operator_spectra({"kernel": scipy.sparse.diags([1.0, 2.0, 5.0])})
        >>> spectra["kernel"].lambda_max
    """
    named = operators if isinstance(operators, Mapping) else {"operator": operators}
    if not named:
        raise ValueError("operator_spectra: operators must hold at least one, got none")
    linear = {str(name): _checked(str(name), operator) for name, operator in named.items()}
    diagonal = _BlockDiagonal(list(linear.values()))
    options: dict[str, Any] = {"num_probes": num_probes, "num_steps": num_steps, "distribution": distribution}
    quadrature = batched_slq(
        diagonal, diagonal.dims, **options, seed=seed, reorthogonalize=reorthogonalize, dtype=diagonal.dtype,
        block_ids=[block_id(name) for name in linear], on_nonfinite=on_nonfinite, check=False,
    )  # fmt: skip
    blocks = [BlockInfo(name, (dim,), dim, ()) for name, dim in zip(linear, diagonal.dims)]
    provenance = {"model": "linear operators", "seed": quadrature.seed, "dtype": quadrature.dtype, **options}
    provenance |= {"hvps": diagonal.products, "torch": str(torch.__version__), "blockhess": blockhess.__version__}
    return Spectra(blocks, quadrature, provenance)


def _checked(name: str, operator: Any) -> LinearOperator:
    """Return the operator as a LinearOperator; checks that it is square, real and, on two vectors, symmetric."""
    try:
        linear = operator.to_scipy() if hasattr(operator, "to_scipy") else aslinearoperator(operator)
    except (TypeError, ValueError) as error:
        raise TypeError(f"operator_spectra: {name!r} must be a linear operator, got {error}") from None
    n = linear.shape[0]
    if linear.shape != (n, n) or n == 0:
        raise ValueError(f"operator_spectra: {name!r} must be square, got shape {linear.shape}")
    dtype = np.dtype(linear.dtype if linear.dtype is not None else np.float64)
    if dtype.kind == "c":
        raise ValueError(f"operator_spectra: {name!r} must be real, got {dtype}")
    u, v = np.random.default_rng(0).standard_normal((2, n))
    products = [np.ravel(linear.matvec(x.astype(_vector_dtype(dtype)))) for x in (v, u)]
    difference = abs(float(u @ products[0] - v @ products[1]))
    size = sum(float(np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip((u, v), products))
    if difference > SYMMETRY_TOLERANCE * np.finfo(_vector_dtype(dtype)).eps ** 0.5 * size:
        raise ValueError(
            f"operator_spectra: {name!r} must be symmetric, got <u, A v> and <v, A u> that differ by {difference:.3g}"
        )
    return linear


def _vector_dtype(dtype: Any) -> type[np.floating[Any]]:
    return np.float32 if dtype == np.float32 else np.float64


class _BlockDiagonal:
    """Block-diagonal operator for batched_slq, which makes no products for finished recurrences."""

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        self._operators = operators
        self._running: Tensor | None = None
        self.dims = [operator.shape[0] for operator in operators]
        single = all(_vector_dtype(operator.dtype) is np.float32 for operator in operators)
        self.dtype = torch.float32 if single else torch.float64
        self.products = 0

    def mark_finished(self, finished: Tensor) -> None:
        """Skip from now on the recurrences that are true in a bool tensor (n_probes, n_blocks)."""
        self._running = ~finished

    def __call__(self, v: Tensor) -> Tensor:
        result = torch.zeros_like(v)
        columns = zip(self._operators, torch.split(v, self.dims, 1), torch.split(result, self.dims, 1))
        for block, (operator, vectors, products) in enumerate(columns):
            rows = (
                torch.ones(len(v), dtype=torch.bool, device="cpu") if self._running is None else self._running[:, block]
            )
            if bool(rows.any()):
                products[rows] = torch.from_numpy(np.array(operator.matmat(vectors[rows].numpy().T).T)).to(v.dtype)
                self.products += int(rows.sum())
        return result
