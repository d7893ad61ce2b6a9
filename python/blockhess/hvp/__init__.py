"""Hessian-vector products of parameter blocks: one file per engine, one interface (operator.py)."""

from blockhess.hvp.autograd import AutogradEngine
from blockhess.hvp.difference import DifferenceEngine
from blockhess.hvp.ggn import GaussNewtonEngine
from blockhess.hvp.operator import BlockOperator, Engine
from blockhess.hvp.traced.engine import TracedEngine
from blockhess.hvp.traced.operations import NotTraceable

ENGINES = {"autograd": AutogradEngine, "traced": TracedEngine, "ggn": GaussNewtonEngine, "difference": DifferenceEngine}
CHOICES = ("auto", *ENGINES, "exact")

__all__ = [
    "AutogradEngine", "BlockOperator", "CHOICES", "DifferenceEngine", "ENGINES", "Engine", "GaussNewtonEngine",
    "NotTraceable", "TracedEngine",
]  # fmt: skip
