"""Likely causes of wrong derivatives, found in the model and in the graph of the loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from blockhess.problem.problem import Problem


def likely_cause(problem: Problem, number: int) -> str:
    """Return what may give a block a wrong derivative, and what to do."""
    causes = suspects(problem, [number])
    if causes:
        return f"the cause may be {' or '.join(causes)}; remove it, or write it in plain PyTorch"
    return (
        "the cause may be a hook on a tensor, or a detach(), .data or no_grad() between this block and the loss, as in "
        "straight-through estimators, fake quantization, and targets from the same parameters (SimSiam); leave it out, "
        "or compute such targets before and pass them with the data"
    )


def suspects(problem: Problem, numbers: Iterable[int]) -> list[str]:
    """Return what has derivatives of its own between some blocks and the loss: hooks and functions."""
    blocks = [problem.blocks[number] for number in numbers]
    causes = [f"the hook on {p.name!r}" for block in blocks for p in block.pieces if p.tensor._backward_hooks]
    for name, module in problem.model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            causes.append(f"the backward hook on {name or 'the model'!r} ({type(module).__name__})")
    leaves = {problem.parameters[name] for block in blocks for name in block.parameters}
    loss = problem.evaluate(problem.batches[0])
    for node in _between(loss, leaves):
        if isinstance(node, BackwardCFunction) and node.name() != "BackwardHookFunctionBackward":
            name = getattr(type(node), "_forward_cls", type(node)).__qualname__
            operator = _custom_operator(name)
            causes.append(f"the custom operator {operator}" if operator else f"the torch.autograd.Function {name}")
        elif "FakeQuantize" in node.name():
            causes.append("fake quantization, which has a straight-through gradient")
    return list(dict.fromkeys(causes))


def _custom_operator(name: str) -> str | None:
    """Return the operator of torch.library whose derivative the Function of this name computes."""
    words = name.removeprefix("GeneratedBackwardFor_").removesuffix("_default").split("_")
    if not name.startswith("GeneratedBackwardFor_"):
        return None
    pairs = [("_".join(words[:i]), "_".join(words[i:])) for i in range(1, len(words))]
    found = [f"{space}::{op}" for space, op in pairs if hasattr(getattr(torch.ops, space), op)]
    return next(iter(found), "_".join(words))


def _between(loss: Tensor, leaves: Iterable[Tensor]) -> list[Node]:
    """Return the nodes of the graph of a loss from which a leaf is reached."""
    wanted = {id(leaf) for leaf in leaves}
    order: list[Node] = []
    waiting = [(loss.grad_fn, False)]
    reaches: dict[Node, bool] = {}
    while waiting:  # depth first; a node is decided after those that it leads to
        node, decided = waiting.pop()
        if node is None:
            continue
        if decided:
            variable = getattr(node, "variable", None)
            following = any(reaches.get(next_node, False) for next_node, _ in node.next_functions if next_node)
            reaches[node] = following or id(variable) in wanted
            order += [node] * reaches[node]
        elif node not in reaches:
            reaches[node] = False
            waiting.append((node, True))
            waiting += [(next_node, False) for next_node, _ in node.next_functions]
    return order
