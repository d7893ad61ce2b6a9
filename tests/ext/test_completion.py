"""The host's late knowledge of what has finished, and the words where a device is missing or full."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from blockhess_ext import batched_slq, completion
from blockhess_ext.completion import DeviceCompletion
from blockhess_ext.device import has_cuda
from blockhess_ext.recurrences import FINISHED, Recurrences


class Event:
    """A device's event, done when told."""

    done = False

    def query(self) -> bool:
        return self.done


class Late(DeviceCompletion):
    """The watch of a device, whose copies arrive when the test says so."""

    def _allocate(self) -> torch.Tensor:
        return torch.zeros_like(self._status)

    def _copy(self) -> Event:
        self.copies = getattr(self, "copies", 0) + 1
        self._pinned_status.copy_(self._status)
        self.event = Event()
        return self.event


def test_a_copy_is_read_only_once_its_event_is_done():
    recurrences = Recurrences.start(1, torch.tensor([9, 9]))
    watch = Late(recurrences)
    recurrences.status[0, 1] = FINISHED
    for _ in range(3 * Late.EVERY):
        assert not watch.poll().any()
    assert watch.copies == 1  # none is started while one is under way
    watch.event.done = True
    assert watch.poll().tolist() == [[False, True]]


def test_a_mask_that_was_given_out_does_not_change():
    recurrences = Recurrences.start(1, torch.tensor([9, 9]))
    watch = Late(recurrences)
    for _ in range(Late.EVERY):
        before = watch.poll()
    watch.event.done = True
    recurrences.status.fill_(FINISHED)
    known = watch.poll()
    for _ in range(2 * Late.EVERY):
        watch.event.done = True
        last = watch.poll()
    assert not before.any() and not known.any() and last.all()


def test_results_do_not_depend_on_when_the_host_knows(monkeypatch):
    scales = torch.linspace(1, 2, 40)

    def run() -> list[torch.Tensor]:
        q = batched_slq(lambda v: v * scales, [3, 1, 30, 6], num_probes=2, num_steps=20)
        return [q.nodes, q.weights, q.alpha, q.beta, q.steps]

    at_once = run()
    monkeypatch.setattr(completion, "track", Late)
    for a, b in zip(at_once, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(has_cuda(), reason="this build has CUDA")
def test_a_build_without_cuda_says_how_to_rebuild():
    with pytest.raises(
        ValueError, match=r"device must be cpu in a build without CUDA, got cuda:1; .* BLOCKHESS_CUDA=1"
    ):
        batched_slq(lambda v: v, [3], device="cuda:1")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("blockhess_ext::lanczos_step", "CUDA")


@pytest.mark.skipif(not has_cuda() or torch.cuda.is_available(), reason="needs a build with CUDA and no GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match="device must be one of the 0 CUDA devices that torch sees, got cuda"):
        batched_slq(lambda v: v, [3], device="cuda")


def test_memory_that_runs_out_is_explained_and_freed():
    vectors = []

    def hvp(v: torch.Tensor) -> torch.Tensor:
        vectors.append(weakref.ref(v))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match=r"3 sets of vectors, 12 MiB.*num_probes") as error:
        batched_slq(hvp, [2**20], num_probes=1, num_steps=2)
    del error
    gc.collect()
    assert vectors[0]() is None


@pytest.mark.parametrize("given", [False, True])
def test_memory_that_lacks_for_the_first_vectors_is_explained_too(given, monkeypatch):
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("blockhess_ext.ops.random_probes", full)
    monkeypatch.setattr("blockhess_ext.arguments.unit_probes", full)
    probes = torch.ones(2, 2**18) if given else None
    with pytest.raises(torch.OutOfMemoryError, match=r"3 sets of vectors, 6 MiB, the Krylov basis, 0 MiB"):
        batched_slq(lambda v: v, [2**18], num_probes=2, probes=probes, reorthogonalize="none")
