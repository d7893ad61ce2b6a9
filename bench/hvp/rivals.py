"""Implementations of H_l v with one interface: this package's engines, the paper's procedure, and other packages.

Every rival gets the same model, criterion, batch and block, through its public interface. The other packages have no
notion of blocks, so one operator of one parameter is made for each. They are imported when they are used: one that is
not installed raises ImportError there (`pip install .[bench]` installs the tested versions).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bench.hvp import paper_procedure
from blockhess.hvp import AutogradEngine, Engine, TracedEngine, operator
from blockhess.problem.blocks import partition
from blockhess.problem.losses import make_loss
from blockhess.problem.problem import Problem


@dataclass(frozen=True)
class Case:
    """A model whose loss is a criterion of outputs and targets, and the blocks that are measured."""

    name: str
    model: nn.Module  # in the state in which its Hessian is computed
    criterion: nn.Module
    batch: tuple[Tensor, Tensor]  # inputs and targets
    blocks: tuple[str, ...]  # names of parameters, each a block

    @cached_property
    def problem(self) -> Problem:
        """The problem with all parameters as blocks, for the package's engines."""
        return Problem(self.model, make_loss(self.criterion), [self.batch], partition(self.model).blocks)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the model, by name."""
        return dict(self.model.named_parameters())

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss that all rivals differentiate."""
        inputs, targets = batch
        return self.criterion(model(inputs), targets)  # type: ignore[no-any-return]

    def vector(self, name: str) -> Tensor:
        """Return a random unit vector (dim,) of a block."""
        generator = torch.Generator().manual_seed(list(self.parameters).index(name))
        v = torch.randn(self.parameters[name].numel(), generator=generator)
        return v / v.norm()


Product = Callable[[Tensor], Tensor]  # v (dim,) -> H_l v, any shape


class Rival:
    """An implementation of H_l v for one case."""

    def of_block(self, name: str) -> Product:
        """Return the function that computes H_l v, after all work that the steps of a block can share."""
        raise NotImplementedError

    def step(self) -> None:
        """Do the work that every Lanczos step needs once for all blocks; none by default."""


class _Ours(Rival):
    def __init__(self, case: Case, engine: Engine) -> None:
        self._case = case
        self._numbers = {info.name: number for number, info in enumerate(case.problem.infos)}
        self.engine = engine
        engine.prepare(0)

    def of_block(self, name: str) -> Product:
        number = self._numbers[name]
        return lambda v: operator.product(self.engine, number, v[None])


class Autograd(_Ours):
    """engine="autograd", with its graph retained."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, AutogradEngine(case.problem))


class Traced(_Ours):
    """engine="traced", with the program of all blocks and its constants."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, TracedEngine(case.problem))

    def of_block(self, name: str) -> Product:
        product = super().of_block(name)
        product(torch.zeros(self._case.parameters[name].numel()))  # the first product records the calls of later ones
        return product


class Paper(Rival):
    """The paper's procedure: a first backward pass per step, a second one through the whole graph per block."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.step()

    def step(self) -> None:
        self._gradients: dict[str, Tensor] = {}  # frees the previous graph
        case = self._case
        self._gradients, _ = paper_procedure.first_backward(
            case.model, case.batch, lambda model, batch: (case.loss(model, batch), 1.0)
        )

    def of_block(self, name: str) -> Product:
        model, shape = self._case.model, self._case.parameters[name].shape

        def product(v: Tensor) -> Tensor:
            vector = v.double().view(shape)
            column = paper_procedure.second_backward(model, name, self._gradients[name], vector)
            return torch.zeros_like(vector) if column is None else column

        return product


class _Package(Rival):
    module: str

    def __init__(self, case: Case) -> None:
        self._case, self._library = case, importlib.import_module(self.module)


class Eigenthings(_Package):
    """hessian-eigenthings: forward, backward and second backward pass at every product."""

    module = "hessian_eigenthings"

    def of_block(self, name: str) -> Product:
        case, only = self._case, self._library.match_names(name)
        operator = self._library.HessianOperator(case.model, [case.batch], case.loss, param_filter=only)
        return lambda v: operator.matvec(v.float())


class Curvlinops(_Package):
    """curvlinops: forward over reverse differentiation at every product."""

    module = "curvlinops"

    def of_block(self, name: str) -> Product:
        case = self._case
        operator = self._library.HessianLinearOperator(
            case.model, case.criterion, [case.parameters[name]], [case.batch], check_deterministic=False
        )
        return lambda v: operator @ v.float()


class PyHessian(_Package):
    """PyHessian: retains the graph of a first backward pass; all parameters but one block are frozen for it."""

    module = "pyhessian"

    def of_block(self, name: str) -> Product:
        case = self._case
        with _only_trainable(case, name):
            operator = self._library.hessian(case.model, case.criterion, data=case.batch, cuda=False)
        case.model.zero_grad()  # PyHessian leaves gradients in .grad
        shape, product = case.parameters[name].shape, self._library.utils.hessian_vector_product
        return lambda v: product(operator.gradsH, operator.params, [v.float().view(shape)])[0]


@contextmanager
def _only_trainable(case: Case, name: str) -> Iterator[None]:
    others = [p for other, p in case.parameters.items() if other != name]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


RIVALS: dict[str, Callable[[Case], Rival]] = {
    "traced": Traced,
    "autograd": Autograd,
    "the paper's procedure": Paper,
    "hessian-eigenthings": Eigenthings,
    "curvlinops": Curvlinops,
    "PyHessian": PyHessian,
}
