"""A model is after a run what it was before, to the bit, whatever it does to itself in forward."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import blockhess
from blockhess.problem.losses import make_loss
from blockhess.problem.model_state import fixed_state
from blockhess.problem.snapshot import Snapshot
from tests.helpers.model_zoo import ZOO
from tests.helpers.tiny_models import labeled, mlp


class Wrapper(nn.Module):
    """An MLP from 3 numbers to 3 classes, for models that do something more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Remembers(Wrapper):
    """Counts, lists, and caches, one of them with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.cache, self.product = 0, None, None
        self.shapes: list[Any] = []
        self.history: dict[str, list[int]] = {"calls": []}
        self.last, self.kinds = deque([0, 1], maxlen=2), {"none"}
        self.generator = torch.Generator().manual_seed(3)
        self.register_buffer("mean", torch.full((3,), torch.nan))
        self.register_buffer("wide", torch.zeros(1).expand(3))
        self.register_buffer("adjacency", torch.eye(3).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(x.shape)
        self.history["calls"].append(self.calls)
        self.last.append(self.calls)
        self.kinds.add(str(x.dtype))
        torch.rand(2, generator=self.generator)
        if self.cache is None:
            self.cache = torch.ones(3)
        if self.product is None:
            self.product = self.inner[2].weight @ self.inner[2].weight.mT
        self.mean.copy_(x.detach()[0])
        self.extra = x
        return self.inner(x * self.cache) @ self.product


class Vandal(Wrapper):
    """Changes its parameters, their flags, gradients and hooks, and adds attributes to them."""

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.inner[0], self.inner[2]
        last.bias.requires_grad_(False).tag = "seen"
        last.weight.register_hook(lambda g: g)
        last.weight.register_post_accumulate_grad_hook(lambda p: None)
        first.bias.data = first.bias.data.double()
        with torch.no_grad():
            first.weight.mul_(1.5)
            last.weight.grad = torch.ones_like(last.weight)
        first.register_forward_hook(lambda *_: None)
        first.weight = nn.Parameter(first.weight.detach().clone())
        self.register_buffer("late", x.detach())
        return F.linear(torch.tanh(F.linear(x, first.weight)), last.weight)


class Normalized(nn.Module):
    """Rows of embeddings, sparse or limited in norm, in a layer that is registered twice."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3, **options), nn.Linear(3, 3)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.head(x + self.embedding(torch.arange(len(x)) % 4))))


class Merges(Wrapper):
    """Merges low-rank weights into its base in eval(), as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(1, 3)), nn.Parameter(torch.randn(3, 1))
        self.merged = False

    def train(self, mode: bool = True) -> Merges:
        self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.merged
        return self.inner(x @ (self.base.to(x.dtype) + self.b @ self.a))


class Unusual(Wrapper):
    """Slots, weak references, a module and a cycle that are not registered."""

    __slots__ = ("slot",)

    def __init__(self) -> None:
        super().__init__()
        self.slot = 1
        self.ref, self.table = weakref.ref(self), weakref.WeakKeyDictionary()
        self.hidden = [nn.BatchNorm1d(3), self]

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.hidden[0](x.float()).to(x.dtype))


def changed(change: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = mlp()
        change(model[0])
        return model

    return make


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Square(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * w


MODELS: dict[str, Callable[[], nn.Module]] = {
    "caches": Remembers,
    "vandal": Vandal,
    "max_norm": lambda: Normalized(max_norm=0.5),
    "sparse": lambda: Normalized(sparse=True),
    "merges": Merges,
    "unusual": Unusual,
    "scripted": lambda: torch.jit.script(nn.Sequential(Counter(), mlp(), nn.Dropout())),
    "scripted part": lambda: nn.Sequential(torch.jit.script(Counter()), mlp(), torch.jit.script(nn.Dropout())),
    "bfloat16": lambda: mlp().bfloat16(),
    "pruned": changed(lambda m: prune.l1_unstructured(m, "weight", 0.3)),
    "old weight norm": changed(nn.utils.weight_norm),
    "weight norm": changed(nn.utils.parametrizations.weight_norm),
    "old spectral norm": changed(nn.utils.spectral_norm),
    "spectral norm": changed(nn.utils.parametrizations.spectral_norm),
    "parametrized": changed(lambda m: parametrize.register_parametrization(m, "weight", Square())),
}
REFUSED = {"vandal"}


def of_tensor(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    dense = tensor.detach().to_dense().contiguous()
    place = (tensor.dtype, tuple(tensor.shape), None if tensor.is_sparse else (tensor.stride(), tensor.data_ptr()))
    hooks = [list(hooks) for hooks in (tensor._backward_hooks, tensor._post_accumulate_grad_hooks) if hooks]
    grad = of_tensor(tensor.grad) if tensor.is_leaf else None
    bits = dense.view(-1).view(torch.uint8).tolist()
    return id(tensor), bits, place, tensor.requires_grad, tensor.is_leaf, grad, hooks, list(vars(tensor))


def of_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, dict):
        return id(value), [(key, of_value(v)) for key, v in value.items()]
    if isinstance(value, (list, tuple, set, deque)):
        return id(value), list(map(of_value, value))
    if isinstance(value, nn.Module):
        return id(value), value.training, [of_tensor(b) for b in value.buffers(recurse=False)]
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    return value if isinstance(value, (bool, int, str)) else id(value)


def state(model: nn.Module) -> list[Any]:
    """All that a user could see of a model and of the process, written without the code that is tested."""
    found: list[Any] = [(name, of_value(vars(m)), m.training) for name, m in model.named_modules()]
    found += [(name, of_tensor(t)) for name, t in (*model.named_parameters(), *model.named_buffers())]
    return found + settings()


def settings() -> list[Any]:
    cuda, backends = torch.backends.cuda, torch.backends
    return [
        torch.get_default_dtype(),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        (backends.mha.get_fastpath_enabled(), backends.cudnn.enabled, torch.get_float32_matmul_precision()),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        (torch.get_num_threads(), signal.getsignal(signal.SIGINT)),
        (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),  # noqa: NPY002
    ]


class Disturbed:
    """A loss that draws from every generator, accumulates gradients, and fails at one of its calls."""

    def __init__(self, loss_fn: Any, failure: type[BaseException] | None, at: int) -> None:
        self._loss, self._failure, self._left = make_loss(loss_fn), failure, at

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        loss, weight = self._loss(model, batch)
        self._left -= 1
        if self._failure and not self._left:
            loss.backward()
            torch.set_default_dtype(torch.float16)
            raise self._failure
        return loss, weight


def run(model: nn.Module, data: Any, loss: Any, refused: bool = False, **options: Any) -> None:
    """Compute a spectrum; the model has gradients and is partly in eval mode before."""
    torch.manual_seed(1)
    list(model.children())[-1].eval()
    for p in list(model.parameters())[::2]:
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    before = state(model)
    expected: Any = pytest.raises(BaseException) if refused else nullcontext()
    with expected:
        blockhess.spectrum(model, data, loss, num_probes=1, num_steps=2, progress=False, **options)
    after = state(model)
    assert len(after) == len(before)
    for one, other in zip(before, after):
        assert one == other


FAILURES = {"success": (None, 0), "error": (ValueError, 2), "Ctrl-C": (KeyboardInterrupt, 3)}


@pytest.mark.parametrize("outcome", FAILURES)
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_unchanged(name: str, outcome: str) -> None:
    case, (failure, at) = ZOO[name], FAILURES[outcome]
    if case.transformers:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, data, loss_fn = case.make()
    run(model, data, Disturbed(loss_fn, failure, at), failure is not None, batchnorm=case.batchnorm)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("outcome", FAILURES)
@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_change_themselves_are_unchanged(name: str, dtype: torch.dtype | None, outcome: str) -> None:
    failure, at = FAILURES[outcome]
    torch.manual_seed(0)
    loss = Disturbed(nn.CrossEntropyLoss(), failure, at)
    run(MODELS[name](), labeled(5), loss, failure is not None or name in REFUSED, dtype=dtype)


def test_memory_is_written_only_where_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    before = Snapshot([model])
    with torch.no_grad():
        model[2].bias.add_(1)
    copy, written = Tensor.copy_, []
    monkeypatch.setattr(Tensor, "copy_", lambda t, other: (written.append(t.data_ptr()), copy(t, other))[1])
    before.restore()
    assert written == [model[2].bias.data_ptr()]


def test_weights_beyond_max_norm_are_rescaled_elsewhere() -> None:
    model = Normalized(max_norm=0.5)
    memory = model.embedding.weight.detach()
    first, norms = memory.clone(), []

    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert torch.equal(memory, first)
        norms.append(float(m.embedding.weight.detach()[:4].norm(dim=1).max()))
        return F.cross_entropy(m(batch[0]), batch[1])

    blockhess.spectrum(model, labeled(5), loss_fn, num_probes=1, num_steps=2, progress=False)
    assert norms[0] > 0.5001 and max(norms[1:]) < 0.5001  # differences move the weights by about 1e-6
    assert torch.equal(model.embedding.weight, first)


def test_an_interrupt_does_not_stop_the_restoration(monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = Remembers(), 0
    before = Snapshot([model])
    model.calls, model.shapes = 5, [1]
    equal, interrupts = torch.equal, [KeyboardInterrupt]

    def interrupted(*tensors: Tensor) -> bool:
        if interrupts:
            raise interrupts.pop()
        return equal(*tensors)

    monkeypatch.setattr(torch, "equal", interrupted)
    with torch.no_grad():
        model.inner[0].weight.zero_()
    with pytest.raises(KeyboardInterrupt):
        before.restore()
    assert model.calls == expected
    assert model.shapes == []
    assert model.inner[0].weight.abs().sum() > 0


def test_every_evaluation_starts_from_the_same_attributes() -> None:
    """Losses that depend on a count, or on a cache of weights, have the Hessian of one evaluation."""
    torch.manual_seed(0)
    model, data = Remembers(), labeled(5)
    model.cache, model.product = torch.ones(3), None
    plain = mlp()
    plain.load_state_dict(model.inner.state_dict())

    def product_of(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(batch[0]) @ (m[2].weight @ m[2].weight.mT), batch[1])

    options: dict[str, Any] = {"num_probes": 2, "num_steps": 20, "progress": False, "dtype": torch.float64}
    right = blockhess.spectrum(plain, data, product_of, **options)
    found = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), **options)
    names = [f"inner.{name}" for name in right]
    for ours, theirs in zip(found.eigenvalue_range(), right.eigenvalue_range()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert list(found) == names


def test_randomness_of_a_models_own_generator_is_found() -> None:
    class Noisy(Remembers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand(x.shape, generator=self.generator))

    with pytest.raises(ValueError, match="must give the same loss for the same batch"):
        blockhess.spectrum(Noisy(), labeled(5), nn.CrossEntropyLoss(), progress=False)


JOBS: list[tuple[Callable[[], nn.Module], dict[str, Any]]] = [
    (mlp, {"dtype": torch.float64}),
    (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), {"batchnorm": "batch"}),
    (lambda: mlp().bfloat16(), {"matmul_precision": "medium"}),
]


def result(model: nn.Module, data: Any, options: dict[str, Any]) -> list[Any]:
    found = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=2, num_steps=5, progress=False, **options)
    return [found.quadrature.nodes.tolist(), found.quadrature.weights.tolist(), found.provenance["hvp_error"]]


@pytest.fixture
def threads() -> Iterator[list[threading.Thread]]:
    started: list[threading.Thread] = []
    yield started
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_threads_do_not_see_each_other(threads: list[threading.Thread]) -> None:
    """Each finds, again and again, the bits that it finds alone."""
    torch.manual_seed(0)
    jobs = [(make(), labeled(6), options) for make, options in JOBS]
    expected = [result(*job) for job in jobs]
    before = settings()
    found: list[list[Any]] = [[] for _ in jobs]

    def work(index: int) -> None:
        for _ in range(4):
            found[index].append(result(*jobs[index]))

    threads += [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == [[one] * 4 for one in expected]
    assert settings() == before


def test_waiting_for_another_thread_can_be_interrupted(threads: list[threading.Thread]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with fixed_state(mlp()):
            inside.set()
            done.wait(30)

    def interrupt() -> None:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threads += [threading.Thread(target=hold), threading.Thread(target=interrupt)]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    try:
        with pytest.raises(KeyboardInterrupt), fixed_state(mlp()):
            pass
        assert not done.is_set()
    finally:
        done.set()
        signal.signal(signal.SIGINT, before)
