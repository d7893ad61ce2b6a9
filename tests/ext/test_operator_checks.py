"""Operators that are not symmetric, not block-diagonal or change their argument are refused; sound ones never are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from blockhess_ext import State, batched_slq, operator_checks
from blockhess_ext.layout import PIECE, Layout
from blockhess_ext.operator_checks import SymmetryCheck
from tests.helpers.call_recorder import CallRecorder

Hvp = Callable[[Tensor], Tensor]
ASYMMETRIC = (
    r"^batched_slq: hvp must be symmetric and the same in every call, got <H v, u> = \S+ where <v, H u> = \S+ in"
)
LEAK = r"^batched_slq: hvp must keep blocks apart, got \|H v\| = \S+ in block \d+ for a vector that is zero there; dims"


def dense(A: Tensor) -> Hvp:
    return lambda v: v @ A.T.to(v.dtype)


def normal(n: int, rng: torch.Generator) -> Tensor:
    return torch.randn(n, n, generator=rng, dtype=torch.float64) / n**0.5


def bits(q) -> list[Tensor]:
    return [q.nodes, q.weights, q.alpha, q.beta, q.steps, q.nonfinite]


def asymmetric(n: int, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    A = normal(n, rng)
    S, K = A + A.T, A - A.T
    scales = torch.randn(n, generator=rng, dtype=torch.float64).exp()
    u = torch.randn(n, generator=rng, dtype=torch.float64)
    yield "random", A
    yield "strictly upper triangular", A.triu(1)
    yield "antisymmetric", K
    yield "a third of it antisymmetric", S + K / 3
    yield "permutation", torch.eye(n, dtype=torch.float64).roll(1, 0)
    yield "preconditioned", scales[:, None] * (A @ A.T)
    yield "preconditioned, with an outlier", scales[:, None] * (A @ A.T + 100 * torch.outer(u, u) / n)
    yield "rank one", torch.outer(u, u.roll(1))


@pytest.mark.parametrize("reorthogonalize", ["none", "full", "partial"])
@pytest.mark.parametrize("n", [3, 40, 500])
def test_asymmetric_operators_are_refused(n, reorthogonalize, dtype, rng):
    for name, A in asymmetric(n, rng):
        for scale in (1e-10, 1.0, 1e10):
            options = {"num_steps": 20, "dtype": dtype, "reorthogonalize": reorthogonalize}
            with pytest.raises(ValueError, match=ASYMMETRIC):
                batched_slq(dense(scale * A), [n], **options)
                pytest.fail(f"{name}, {scale}")
            batched_slq(dense(scale * A), [n], check=False, **options)


def test_an_outlier_does_not_hide_asymmetry(rng):
    """<H v_1, v_0> and beta_0 are 1 / sqrt(n) of the outlier, which |T| contains after the second step."""
    n = 40_000
    u, scales = torch.randn(n, generator=rng), torch.randn(n, generator=rng).exp()

    def hvp(v: Tensor) -> Tensor:
        return scales * (v + (v @ u)[:, None] * u)

    with pytest.raises(ValueError, match=ASYMMETRIC):
        batched_slq(hvp, [n], num_probes=3)
    batched_slq(lambda v: hvp(v * scales.sqrt()) / scales.sqrt(), [n], num_probes=3)
    with pytest.raises(ValueError, match=ASYMMETRIC):
        batched_slq(hvp, [n], probes=hvp(torch.ones(1, n)))


def test_what_is_returned_for_finished_recurrences_is_ignored(rng):
    class Skipping:
        finished = torch.zeros(10, 2, dtype=torch.bool)

        def mark_finished(self, finished: Tensor) -> None:
            self.finished = finished

        def __call__(self, v: Tensor) -> Tensor:
            return torch.where(self.finished.repeat_interleave(torch.tensor([1, 40]), dim=1), 7.0, dense(H)(v))

    A = normal(40, rng)
    H = torch.block_diag(torch.ones(1, 1), A + A.T)
    batched_slq(Skipping(), [1, 40], num_steps=20)


def test_two_elements_are_enough():
    with pytest.raises(ValueError, match=ASYMMETRIC):
        batched_slq(dense(torch.tensor([[1.0, 2.0], [1.5, -1.0]])), [2], num_probes=1)


def test_one_asymmetric_block_is_enough(rng):
    blocks = [normal(n, rng) for n in (30, 1, 50, 20)]
    dims = [len(block) for block in blocks]
    symmetric = [A + A.T for A in blocks]
    for asymmetric, where in ((0, 0), (2, 2), (3, 3)):
        chosen = [blocks[l] if l == asymmetric else symmetric[l] for l in range(4)]
        with pytest.raises(ValueError, match=ASYMMETRIC + f" block {where} of probe "):
            batched_slq(dense(torch.block_diag(*chosen)), dims, num_steps=10)
    batched_slq(dense(torch.block_diag(*symmetric)), dims, num_steps=10)


def test_an_operator_that_differs_from_call_to_call_is_refused(rng):
    """By another matrix in every call, or from the third call on: <H v_3, v_2> is compared too."""
    A = normal(200, rng)
    S = A + A.T
    with pytest.raises(ValueError, match=ASYMMETRIC):
        batched_slq(lambda v: dense(S * torch.randn(200, generator=rng, dtype=torch.float64).diag())(v), [200])
    calls: list[int] = []

    def changing(v: Tensor) -> Tensor:
        calls.append(0)
        return dense(S if len(calls) <= 3 else 2 * S)(v)

    with pytest.raises(ValueError, match=ASYMMETRIC):
        batched_slq(changing, [200])
    assert len(calls) == 4  # refused at once


def bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def spectra(n: int, rng: torch.Generator) -> Iterator[Tensor]:
    noise, some = torch.randn(n, generator=rng), torch.zeros(n)
    yield noise  # indefinite
    yield noise.abs()
    yield torch.ones(n)  # identity
    yield 1 + 1e-3 * noise
    yield 1 + 1e-5 * noise
    yield torch.zeros(n)
    yield some.index_fill(0, torch.tensor([0]), 1.0)  # rank one
    yield some.index_copy(0, torch.arange(min(n, 3)), torch.tensor([1.0, -2.0, 3.0])[:n])
    yield noise.abs().index_fill(0, torch.tensor([0]), 1e3)  # outlier
    yield torch.logspace(-8, 2, n)
    yield 1 - 2.0 * (torch.arange(n) % 2)


def rounded(rotation: Tensor, eigenvalues: Tensor, scale: float, dtype: torch.dtype) -> Iterator[Hvp]:
    """Yield the product and its roundings to float32, and to bfloat16 of argument, matrix and result, or of three."""
    A = rotation * eigenvalues @ rotation.T
    A = ((A + A.T) / 2).to(dtype)
    R, low = bfloat16(rotation.to(dtype)), bfloat16(A)
    yield lambda v: scale * (v @ A)
    yield lambda v: (scale * (v.float() @ A.float())).to(dtype)
    yield lambda v: bfloat16(scale * (bfloat16(v) @ low))
    yield lambda v: scale * bfloat16(bfloat16(bfloat16(bfloat16(v) @ R) * eigenvalues.to(dtype)) @ R.T)


@pytest.mark.parametrize("reorthogonalize", ["none", "full", "partial"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 20, 150])
def test_rounding_is_not_asymmetry(n, reorthogonalize, dtype, rng):
    Q, _ = torch.linalg.qr(normal(n, rng))
    for eigenvalues in spectra(n, rng):
        for rotation in (Q, torch.eye(n, dtype=torch.float64)):
            for scale in (1e-10, 1.0, 1e10):
                for hvp in rounded(rotation, eigenvalues, scale, dtype):
                    batched_slq(hvp, [n], num_steps=6, dtype=dtype, reorthogonalize=reorthogonalize)


def test_a_block_that_is_zero_but_for_rounding_is_not_judged(rng):
    """Rounding is no symmetric operator. It passes next to an ordinary block, or with check=False."""
    noise, A = 1e-6 * normal(40, rng), normal(30, rng)
    batched_slq(dense(torch.block_diag(noise, A + A.T)), [40, 30], num_steps=60)
    with pytest.raises(
        ValueError, match=r"check=False skips this check, as for a block that is zero but for rounding$"
    ):
        batched_slq(dense(noise), [40])
    batched_slq(dense(noise), [40], check=False)


@pytest.mark.parametrize("modes", ["none", "full", "partial"])
def test_checks_change_no_bit_also_after_a_resumption(modes, rng):
    A = normal(70, rng)
    H = torch.block_diag(A + A.T, torch.zeros(3, 3, dtype=torch.float64), torch.tensor([[2.0]]))
    options = {"dims": [70, 3, 1], "num_probes": 3, "reorthogonalize": modes}
    expected = bits(batched_slq(dense(H), num_steps=60, check=False, **options))
    for check in (None, True):
        states: list[State] = []
        whole = batched_slq(
            dense(H), num_steps=60, check=check, on_state=lambda s, to=states: to.append(s.copy()), **options
        )
        assert all(map(torch.equal, bits(whole), expected))
        for state in states[:5]:
            resumed = batched_slq(dense(H), num_steps=60, check=check, state=state, **options)
            assert all(map(torch.equal, bits(resumed), expected))
    # The fourth step is still to come after three, and both are over after four.
    wrong = H.clone()
    wrong[:70, :70] = 2 * A
    with pytest.raises(ValueError, match=ASYMMETRIC):
        batched_slq(dense(wrong), num_steps=60, state=states[2], **options)
    batched_slq(dense(wrong), num_steps=10, state=states[3], **options)


class Late(SymmetryCheck):
    """A check whose verdict reaches the host after a number of questions, as on a GPU."""

    questions = 0

    def _to_host(self, bad: Tensor) -> tuple[Tensor, object]:
        late = torch.zeros_like(bad)

        class Arrival:
            def query(arrival) -> bool:
                self.questions += 1
                return self.questions > 7

            def synchronize(arrival) -> None:
                late.copy_(bad)

        return late, Arrival()


@pytest.mark.parametrize("num_steps", [5, 30])
def test_a_verdict_that_arrives_late_is_raised_when_it_is_there_or_at_the_end(num_steps, rng, monkeypatch):
    monkeypatch.setattr("blockhess_ext.slq.SymmetryCheck", Late)
    steps: list[int] = []
    with pytest.raises(ValueError, match=ASYMMETRIC):
        batched_slq(dense(normal(40, rng)), [40], num_steps=num_steps, on_step=lambda step, _: steps.append(step))
    assert steps[-1] == (5 if num_steps == 5 else 8)


@pytest.mark.parametrize("capturable", [False, True])
def test_replayed_steps_are_checked(capturable, rng, monkeypatch):
    recorder = CallRecorder()
    monkeypatch.setattr("blockhess_ext.slq.recorder_of", lambda device: recorder)
    A = normal(60, rng)

    class Operator:
        def __init__(self, A: Tensor, later: Tensor) -> None:
            self.A, self.later, self.calls, self.count = A.float(), later.float(), 0, torch.zeros((), dtype=torch.int64)
            self.capturable = capturable

        def __call__(self, v: Tensor) -> Tensor:
            self.calls += 1
            self.count += 1
            return v @ torch.where(self.count <= 3, self.A, self.later).T

    S = A + A.T
    options = {"num_steps": 20, "reorthogonalize": "none", "cuda_graph": True}
    for first, later in ((A, A), (S, 3 * S)):
        with pytest.raises(ValueError, match=ASYMMETRIC):
            batched_slq(Operator(first, later), [60], **options)
    sound = Operator(S, S)
    expected = batched_slq(dense(S), [60], **{**options, "cuda_graph": False})
    assert all(map(torch.equal, bits(batched_slq(sound, [60], **options)), bits(expected)))
    assert sound.calls == (5 if capturable else 20)  # two to warm up, two recorded, and the fourth step


def leaky(dims: list[int], i: int, j: int, rng: torch.Generator, size: float = 1.0) -> Tensor:
    """Return a symmetric matrix whose blocks i and j are coupled."""
    H = torch.block_diag(*[A + A.T for A in (normal(n, rng) for n in dims)])
    a, b = Layout.of(dims).columns(i), Layout.of(dims).columns(j)
    C = size * torch.randn(dims[i], dims[j], generator=rng, dtype=torch.float64)
    H[a, b], H[b, a] = C, C.T
    return H


@pytest.mark.parametrize("num_probes", [3, 10])
def test_blocks_that_depend_on_each_other_are_refused(num_probes, dtype, rng):
    """Any two of eight blocks are told apart by three rows."""
    dims = [60, 5, 30, 1, 20, 8, 2, 10]
    for i in range(8):
        for j in range(i):
            H = leaky(dims, i, j, rng)
            with pytest.raises(ValueError, match=LEAK):
                batched_slq(dense(H), dims, num_probes=num_probes, dtype=dtype)
    for rounding in (0.0, 1e-3):
        batched_slq(dense(leaky(dims, 0, 2, rng, size=rounding)), dims, num_probes=num_probes, dtype=dtype)
    zero = leaky(dims, 0, 2, rng, size=1e-6)
    zero[:60, :60] = 0.0
    batched_slq(dense(zero), dims, num_probes=num_probes, dtype=dtype)


def test_a_single_probe_tells_two_blocks_apart_and_wrong_sizes_are_found(rng):
    H = leaky([30, 70], 0, 1, rng, size=0.1)
    with pytest.raises(ValueError, match=LEAK):
        batched_slq(dense(H), [30, 70], num_probes=1)
    A, B = (A + A.T for A in (normal(30, rng), normal(70, rng)))
    with pytest.raises(ValueError, match=LEAK):
        batched_slq(dense(torch.block_diag(A, B)), [70, 30])


class Counting:
    """A block-diagonal operator that counts its calls and keeps their arguments."""

    def __init__(self, n: int) -> None:
        self.scales, self.inputs = torch.linspace(1, 2, n), []

    def __call__(self, v: Tensor) -> Tensor:
        self.inputs.append(v.clone())
        return v * self.scales


def test_one_more_product_where_it_is_due():
    def calls(hvp: Hvp, dims: list[int], num_steps: int, check: bool | None = None) -> int:
        before = len(hvp.inputs)
        batched_slq(hvp, dims, num_probes=4, num_steps=num_steps, check=check)
        return len(hvp.inputs) - before

    hvp = Counting(200)
    assert calls(hvp, [100, 100], 49) == 49
    assert calls(hvp, [200], 50) == 50  # one block
    assert calls(hvp, [100, 100], 50) == 51
    for row, zero in enumerate([slice(0, 100), slice(100, 200)] * 2):
        segments = hvp.inputs[99][row]
        assert (segments[zero] == 0).all() and segments.count_nonzero() == 100
    assert calls(hvp, [100, 100], 50) == 50  # checked before
    assert calls(hvp, [50, 150], 50) == 51  # with these sizes it was not
    assert calls(hvp, [100, 100], 50, check=True) == 51
    assert calls(hvp, [100, 100], 20, check=True) == 21
    assert calls(Counting(200), [100, 100], 50) == 51  # another operator
    assert calls(Counting(200), [100, 100], 50, check=False) == 50
    forgotten = len(operator_checks._checked)
    del hvp
    assert len(operator_checks._checked) < forgotten


def test_an_operator_without_weak_references_is_checked_in_every_call():
    class Slots:
        __slots__ = ("calls",)

        def __call__(self, v: Tensor) -> Tensor:
            self.calls += 1
            return 2 * v

    hvp = Slots()
    for _ in range(2):
        hvp.calls = 0
        batched_slq(hvp, [60, 2], num_probes=1, num_steps=60)
        assert hvp.calls == 2  # every vector is an eigenvector


def test_a_non_finite_product_of_the_check_is_left_to_the_steps():
    scales = torch.ones(60).index_fill(0, torch.tensor([3]), torch.nan)
    q = batched_slq(lambda v: v * scales, [30, 30], check=True, on_nonfinite="mark")
    assert q.nonfinite[:, 0].all() and not q.nonfinite[:, 1].any()


def numpy_in_place(v: Tensor, scales: np.ndarray) -> Tensor:
    x = v.numpy()
    x *= scales
    return torch.from_numpy(x)


def test_a_change_in_place_by_numpy_is_found():
    scales = np.linspace(1, 2, 100, dtype=np.float32)
    for dims in ([100], [60, 40]):
        with pytest.raises(
            ValueError, match=r"^batched_slq: hvp must not change its argument in place, got a changed v$"
        ):
            batched_slq(partial(numpy_in_place, scales=scales), dims)


def test_a_change_of_data_in_a_later_call_is_found():
    calls = []

    def hvp(v: Tensor) -> Tensor:
        w = v * torch.arange(1.0, 51)
        calls.append(v)
        v.data *= 1 if len(calls) < 6 else 2
        return w

    with pytest.raises(ValueError, match=r"got a changed v$"):
        batched_slq(hvp, [50], num_steps=6)  # in the last one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", [[1], [5, 1, 700], [PIECE, 3, 2 * PIECE + 1], [1] * 300])
def test_inner_products_of_segments(dims, dtype, rng):
    layout = Layout.of(dims)
    a, b = (torch.randn(3, layout.n, generator=rng, dtype=torch.float64).to(dtype) for _ in range(2))
    expected = torch.stack([(x.double() * y.double()).sum(1) for x, y in zip(a.split(dims, 1), b.split(dims, 1))], 1)
    torch.testing.assert_close(layout.dots(a, b), expected, rtol=0, atol=1e-14 * layout.n**0.5)


class Stop(Exception):
    pass


@pytest.mark.parametrize("late", [False, True])
def test_errors_of_hvp_are_explained(late: bool) -> None:
    steps = iter(range(3 if late else 0))

    def multiply(raised: Exception) -> Hvp:
        def hvp(v: Tensor) -> Tensor:
            if next(steps, None) is None:
                raise raised
            return v * torch.arange(1.0, 13.0)

        return hvp

    for raised, kind in ((RuntimeError("one\ntwo"), RuntimeError), (KeyError(3), ValueError), (TypeError(), TypeError)):
        with pytest.raises(
            kind, match=r"^batched_slq: hvp must multiply a tensor of shape \(n_probes, n\) = \(2, 12\) "
        ) as e:
            batched_slq(multiply(raised), [12], num_probes=2, num_steps=8)
        text = {"RuntimeError": "one", "KeyError": "3"}.get(type(raised).__name__, "no message")
        assert str(e.value).endswith(f"got {type(raised).__name__}: {text}; try hvp(torch.zeros(2, 12)) alone")
        assert e.value.__cause__ is raised
    ours = ValueError("spectrum: block")
    for raised in (Stop(), KeyboardInterrupt(), MemoryError(), OSError(), ours):
        with pytest.raises(type(raised)) as e:
            batched_slq(multiply(raised), [12], num_probes=2, num_steps=8)
        assert e.value is raised
    with pytest.raises(torch.OutOfMemoryError, match=r"^batched_slq: device memory must hold"):
        batched_slq(multiply(RuntimeError("DefaultCPUAllocator: can't allocate memory: ")), [12], num_steps=8)


def test_flat_blocks_are_judged_alone(rng: torch.Generator) -> None:
    A = torch.block_diag(1e6 * torch.eye(50, dtype=torch.float64), normal(50, rng))
    batched_slq(dense(A), [50, 50], num_steps=20, check=True)
    with pytest.raises(ValueError, match=ASYMMETRIC):
        batched_slq(dense(A[50:, 50:]), [50], num_steps=20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_whose_products_lack_digits_are_refused(dtype):
    d = torch.linspace(1, 2, 1000, dtype=torch.float64)

    def largest(scale, **options):
        values = (scale * torch.cat([d, 1e-6 * d])).to(dtype)
        q = batched_slq(lambda v: v * values, [1000, 1000], num_probes=1, num_steps=8, dtype=dtype, **options)
        return q.nodes.amax().item() / scale

    expected = largest(1.0)
    eps = torch.finfo(dtype).eps
    assert largest(1e-36) == pytest.approx(expected, rel=16 * eps)  # where only the second block is so small
    if dtype is torch.float64:
        assert largest(1e-42) == pytest.approx(expected, rel=16 * eps)
        return
    assert largest(1e-42, check=False) != pytest.approx(expected, rel=1e-4)
    with pytest.raises(
        ValueError, match=r"hvp must return products of size 3.7e-37 at least in torch.float32, got 1.5e-42"
    ):
        largest(1e-42)
    with pytest.raises(ValueError, match=r"must return products of size 1.2e-38 at least"):
        batched_slq(lambda v: 1e-42 * v, [1, 1], num_probes=1)  # ends before the second step
    zero = batched_slq(lambda v: 0 * v, [3, 4], num_probes=1, num_steps=3, dtype=dtype)
    assert not zero.nodes.any()
