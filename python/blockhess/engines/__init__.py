"""What computes Hessian-vector products of parameter blocks: one file per engine, one protocol (operator.py)."""

from blockhess.engines.autograd import AutogradEngine
from blockhess.engines.ggn import GaussNewtonEngine
from blockhess.engines.operations import NotTraceable
from blockhess.engines.operator import BlockOperator, Engine
from blockhess.engines.traced import TracedEngine

ENGINES = {"autograd": AutogradEngine, "traced": TracedEngine, "ggn": GaussNewtonEngine}

__all__ = ["AutogradEngine", "BlockOperator", "ENGINES", "Engine", "GaussNewtonEngine", "NotTraceable", "TracedEngine"]
