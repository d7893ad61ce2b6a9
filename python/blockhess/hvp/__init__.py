"""Hessian-vector products of parameter blocks: one file per engine, one interface (operator.py)."""

from blockhess.hvp.autograd import AutogradEngine
from blockhess.hvp.ggn import GaussNewtonEngine
from blockhess.hvp.operator import BlockOperator, Engine
from blockhess.hvp.traced.engine import TracedEngine
from blockhess.hvp.traced.operations import NotTraceable

ENGINES = {"autograd": AutogradEngine, "traced": TracedEngine, "ggn": GaussNewtonEngine}
CHOICES = ("auto", *ENGINES, "exact")

__all__ = [
    "AutogradEngine", "BlockOperator", "CHOICES", "ENGINES", "Engine", "GaussNewtonEngine", "NotTraceable",
    "TracedEngine",
]  # fmt: skip
