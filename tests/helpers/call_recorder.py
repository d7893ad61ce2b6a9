"""An emulation of CUDA graphs on the CPU: records the torch ops that are called, and calls them again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recording(TorchDispatchMode):
    """As in a capture, nothing is computed: outputs keep their values, and results are NaN until a replay."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op._schema.is_mutable:
            result = (kwargs or {}).get("out", args[0]) if op._schema.returns else None
        else:
            result = op(*args, **(kwargs or {}))
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for x in tree_leaves(result):
                if isinstance(x, Tensor) and x.is_floating_point() and x.untyped_storage().data_ptr() not in given:
                    x.fill_(torch.nan)
        self.calls.append((op, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Call the same ops with the same operands, including host scalars, and write to the same results."""
        for op, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(op(*args, **kwargs))):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class CallRecorder:
    """A `blockhess_ext.cuda_graph.Recorder` on the CPU that counts its calls."""

    def __init__(self) -> None:
        self.warm_ups = self.records = self.replays = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        self.warm_ups += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.records += 1
        with Recording() as recording:
            work()

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay
