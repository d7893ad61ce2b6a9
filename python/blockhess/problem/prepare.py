"""Build a `Problem` from the arguments of `spectrum`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from blockhess.problem import fingerprint, model_state, shards
from blockhess.problem.batches import as_batches, batch_size, split_batch
from blockhess.problem.blocks import BlockSpec, Partition, partition, unwrap
from blockhess.problem.losses import make_loss
from blockhess.problem.memory import budget_bytes
from blockhess.problem.problem import Computation, Problem
from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup
from blockhess_ext.arguments import choice

# Relative difference up to which two values of the loss are taken as equal.
LOSS_TOLERANCE = 1e-4

# Largest memory of a batch, in sizes of its gradient's graph: in checks, or twice that of constants and tangents of a
# linear program, which may take half of the budget.
GRAPHS = 7


@contextmanager
def prepared_problem(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None,
    blocks: BlockSpec,
    batchnorm: str,
    dtype: torch.dtype | None,
    memory_budget: int | str | None,
    matmul_precision: str,
    ranks: ProcessGroup = SINGLE_PROCESS,
    engine: str = "auto",
) -> Iterator[tuple[Problem, Partition, dict[str, str]]]:
    """Yield the problem, its blocks and the fingerprints of model and data, with the model in a fixed state.

    Batches are split until the graph of one fits the memory budget. Each of several ranks that share the data holds
    its own batches; the fingerprint is that of all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"spectrum: model must be a torch.nn.Module, got {type(model).__name__}")
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)):
        raise ValueError(f"spectrum: dtype must be None or a floating-point torch.dtype, got {dtype!r}")
    choice("matmul_precision", matmul_precision, ("highest", "high", "medium"), "spectrum")
    model = unwrap(model)
    shards.check(model, dtype, engine)
    sharded = shards.is_sharded(model)
    if sharded:
        layout = {name: str((tuple(p.shape), p.dtype, p.requires_grad)) for name, p in model.named_parameters()}
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        same = {"parameters": fingerprint.of_names(layout), "number of them": len(layout)}
        ranks.agree(same | {"modules": fingerprint.of_names(kinds)})
    cut = partition(model, blocks)
    loss = make_loss(loss_fn)
    second_order = engine != "difference" and not sharded
    with (
        model_state.fixed_state(Computation(model, loss), batchnorm, second_order),
        model_state.float32_precision(matmul_precision),
    ):
        policy = model_state.batchnorm_policy(model, batchnorm)
        # Inside fixed_state, which restores the random number generator that a shuffling DataLoader advances.
        batches = as_batches(data, pairs=loss.pairs)
        batches, data_digest = ranks.share_batches(batches, fingerprint.of_data(batches))
        fingerprints = {"model": fingerprint.of_model(model), "data": data_digest}
        frozen_by = ranks if policy == "frozen_batch_stats" else None
        try:
            several = ranks.data_size > 1 and not sharded
            make = partial(Problem, model, loss, batches, cut.blocks, dtype, several, frozen_by)
            problem = _of_best_order(make) if engine == "auto" and not sharded else make(second_order)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            raise torch.OutOfMemoryError(
                f"spectrum: data must hold batches whose graph fits the device's memory, got batches of "
                f"{batch_size(batches[0])}; pass smaller ones, in a list: the result does not depend on their size"
            ) from None
        if sharded:
            problem.lacking = "the parameters are sharded" if engine == "auto" else ""
            ranks.agree({"parameters with gradients": fingerprint.of_names(problem.used_in_batches)})
        budget = budget_bytes(memory_budget, problem.device)
        # Beside the copy of the model there is one in float64, twice as large, in checks.
        room = max(budget / 2, budget - 3 * problem.copy_bytes)
        parts = math.ceil(problem.graph_bytes * GRAPHS / room)
        # Closures may do anything with a batch, and batch statistics depend on all of its samples.
        if parts > 1 and loss.calls_model and policy != "batch":
            problem = _split(problem, parts, cut, dtype)
        problem.join(ranks)
        yield problem, cut, fingerprints


def _of_best_order(make: Callable[[bool], Problem]) -> Problem:
    """Return the problem with second derivatives, or without where they do not exist."""
    try:
        return make(True)
    except NotImplementedError as error:
        lacking = error.with_traceback(None)  # which references the first problem
    try:
        problem = make(False)
    except Exception:
        raise lacking from None
    problem.lacking = str(lacking).removeprefix("spectrum: ")
    return problem


def _split(problem: Problem, parts: int, cut: Partition, dtype: torch.dtype | None) -> Problem:
    """Split the batches of a problem, unless the loss is not a mean over samples, such as a contrastive loss."""
    batches = [part for batch in problem.batches for part in split_batch(batch, parts)]
    try:
        smaller = Problem(problem.model, problem.loss, batches, cut.blocks, dtype, second_order=problem.second_order)
        smaller.lacking = problem.lacking
    except (RuntimeError, ValueError):  # targets that cannot be split like the inputs
        return problem
    same = math.isclose(smaller.loss_value, problem.loss_value, rel_tol=LOSS_TOLERANCE)
    return smaller if same else problem
