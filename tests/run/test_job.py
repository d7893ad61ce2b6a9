"""Run directories: what is resumed, what is refused, what a signal, a full disk or lack of memory leaves; merging."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockhess
from blockhess.cli.main import main
from blockhess.results.unit import Unit
from blockhess.run.status import partial, status
from blockhess.run.storage import checkpoint, directory, signals, store
from blockhess.run.storage.checkpoint import Checkpoints
from blockhess_ext import State
from tests.crash.scenarios import same_bits
from tests.helpers.faulty_disk import FaultyDisk, disk_full
from tests.helpers.tiny_models import labeled, mlp
from tests.test_estimate import SecondDerivativeIsInfinite

OPTIONS = {
    "engine": "autograd",
    "num_probes": 3,
    "num_steps": 7,
    "memory_budget": 1200,
    "reorthogonalize": "none",
}  # three passes


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    torch.manual_seed(0)
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))
    return mlp(), labeled(7), nn.CrossEntropyLoss()


class Stop(Exception):
    """Ends a run, as a crash would."""


def after(patch: pytest.MonkeyPatch, count: int, what: Callable[[], None]) -> None:
    """Lets something happen once the state was saved so many times."""

    def after_step(self: Checkpoints, *arguments: Any) -> None:
        original(self, *arguments)
        if self.count == count:
            what()

    original = Checkpoints.after_step
    patch.setattr(Checkpoints, "after_step", after_step)


def stopped(given: tuple[Any, ...], path: Path, count: int, **options: Any) -> None:
    def stop() -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        after(patch, count, stop)
        blockhess.spectrum(*given, run_dir=path, **OPTIONS | options)


@pytest.mark.parametrize("count", [1, 7, 9, 20])
def test_a_run_goes_on_where_it_was_and_does_nothing_twice(given, count, tmp_path):
    expected = blockhess.spectrum(*given, **OPTIONS)
    assert len(expected.provenance["plan"]["passes"]) == 3
    stopped(given, tmp_path / "run", count)
    before = status(tmp_path / "run")
    assert before.hvps > 0 and not before.finished and before.holder is None
    done, calls = before.hvps, []
    with pytest.MonkeyPatch.context() as patch:
        original = store.write
        patch.setattr("blockhess.hvp.autograd.AutogradEngine.multiply", counting(calls))
        patch.setattr(store, "write", original)
        resumed = blockhess.spectrum(*given, run_dir=tmp_path / "run", **OPTIONS)
    assert same_bits(resumed, expected)
    checks = 3 * len(expected)  # of accuracy: the products, and their repeat in float64
    assert len(calls) - checks <= expected.provenance["hvps"] - done < len(calls)
    assert same_bits(blockhess.load(tmp_path / "run/spectra.npz"), expected)
    assert not list((tmp_path / "run").glob("state*"))
    assert status(tmp_path / "run").finished
    calls.clear()
    assert same_bits(blockhess.spectrum(*given, run_dir=tmp_path / "run", **OPTIONS), expected) and not calls


def counting(calls: list[int]) -> Callable[..., Any]:
    from blockhess.hvp.autograd import AutogradEngine

    original = AutogradEngine.multiply

    def multiply(self: Any, columns: Any, share: float) -> Iterator[int]:
        for made in original(self, columns, share):
            calls.append(made)
            yield made

    return multiply


def test_what_differs_is_told(given, tmp_path):
    model, data, loss_fn = given
    stopped(given, tmp_path, 3)
    changed = {
        "seed": {"seed": 1},
        "num_probes": {"num_probes": 4},
        "memory_budget": {"memory_budget": 1300},
        "dtype": {"dtype": torch.float64},
        "loss": {"loss_fn": nn.functional.cross_entropy},
        "value of the loss": {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)},
        "data": {"data": labeled(7)},
        "parameters": {"model": mlp()},
        "blocks": {"blocks": "full"},
        "keep_vectors": {"keep_vectors": True},
    }
    for name, change in changed.items():
        arguments = {"model": model, "data": data, "loss_fn": loss_fn, "run_dir": tmp_path, **OPTIONS, **change}
        with pytest.raises(ValueError, match=rf"run_dir must hold a run of the same job(.|\n)*\n{name} "):
            blockhess.spectrum(**arguments)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"\nthreads +5 +\d"):
        patch.setattr(torch, "get_num_threads", lambda: 5)
        blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=r"\ntorch +9.9 +"):
        patch.setattr(torch, "__version__", "9.9")
        blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS)
    blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS)  # and nothing of it is spoilt


@pytest.fixture
def _hangups():
    """The handler of SIGHUP where the tests are not started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_hangups")
@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_state(given, which, tmp_path):
    expected = blockhess.spectrum(*given, **OPTIONS)
    handler = signal.getsignal(which)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as raised:
        after(patch, 9, lambda: os.kill(os.getpid(), which))
        patch.setattr(checkpoint, "LEAST_SECONDS", 0.0)
        blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS)
    assert isinstance(raised.value, signals.Interrupted) and raised.value.signal == which
    assert signal.getsignal(which) is handler
    assert status(tmp_path).step >= 2 and status(tmp_path).parts == 1
    assert same_bits(blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS), expected)


def test_an_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        with signals.caught():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_before_the_state_is_due_saves_it_all_the_same(given, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 1e9)
    model = given[0]
    calls = []

    def loss(net: nn.Module, batch: Any) -> tuple[Tensor, float]:
        return given[2](net(batch[0]), batch[1]), 7.0

    original = Checkpoints.after_step

    def after_step(self: Checkpoints, state: State, hvps: int) -> None:
        calls.append(state.step)
        if len(calls) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, state, hvps)

    monkeypatch.setattr(Checkpoints, "after_step", after_step)
    with pytest.raises(signals.Interrupted):
        blockhess.spectrum(model, given[1], loss, run_dir=tmp_path, **OPTIONS)
    assert status(tmp_path).step == 4 and len(calls) == 10


def test_the_second_signal_does_not_wait():
    catcher = signals.Catcher()
    with pytest.raises(signals.Interrupted), catcher.working():
        catcher(signal.SIGINT, None)
        assert catcher.pending == signal.SIGINT
        catcher(signal.SIGINT, None)
    with pytest.raises(signals.Interrupted):
        signals.Catcher()(signal.SIGTERM, None)


@pytest.mark.usefixtures("_hangups")
@pytest.mark.parametrize(("which", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_command_ends_with_the_code_of_the_signal_and_can_be_resumed(which, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))
    run = tmp_path / "run"
    arguments = ["run", "tests.run.test_job:job", "--out", str(run)]
    with monkeypatch.context() as patch:
        after(patch, 1, lambda: os.kill(os.getpid(), which))
        assert main(arguments) == code
    told = capsys.readouterr().err
    assert f"interrupted by {which.name}" in told and "--resume" in told and "Traceback" not in told
    assert main(arguments) == 2 and main([*arguments, "--resume"]) == 0
    assert same_bits(blockhess.load(run / "spectra.npz"), blockhess.spectrum(**job()))


def job() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"model": mlp(), "data": labeled(7), "loss_fn": nn.CrossEntropyLoss(), "progress": False, **OPTIONS}


def test_a_full_disk_keeps_the_last_good_state(given, tmp_path):
    expected = blockhess.spectrum(*given, **OPTIONS)
    stopped(given, tmp_path, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "disk", FaultyDisk(at=12, fault=disk_full))
        with pytest.raises(OSError, match=r"run_dir must be writable, got .*No space left.*state saved last is intact"):
            blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS)
    assert status(tmp_path).hvps > 0
    assert same_bits(blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS), expected)


def test_lanes_that_are_not_finite_stay_so(given, tmp_path):
    given = SecondDerivativeIsInfinite(), *given[1:]
    expected = blockhess.spectrum(*given, on_nonfinite="mark", **OPTIONS)
    assert expected.quadrature.nonfinite.any()
    options = OPTIONS | {"on_nonfinite": "mark"}
    stopped(given, tmp_path, 1, on_nonfinite="mark")
    again = blockhess.spectrum(*given, run_dir=tmp_path, **options)
    assert torch.equal(again.quadrature.nonfinite, expected.quadrature.nonfinite)
    with pytest.raises(blockhess.NonFiniteError):
        blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS)


def test_a_directory_that_cannot_be_used_is_refused_before_any_work(given, tmp_path):
    def never(*_: object) -> None:
        raise AssertionError("the loss was computed")

    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").touch()
    run = tmp_path / "run"
    for path, text in [(tmp_path / "file", "cannot make"), (tmp_path / "other", "holds thesis.tex")]:
        with pytest.raises(ValueError, match=text):
            blockhess.spectrum(*given[:2], never, run_dir=path)
    with directory.opened(run), pytest.raises(ValueError, match=r"must not be in use, got .* held by process"):
        blockhess.spectrum(*given[:2], never, run_dir=run)


@pytest.mark.parametrize(
    "where", ["blockhess.run.job.blockhess_ext.batched_slq", "blockhess.run.job.exact_quadratures"]
)
def test_memory_that_runs_out_makes_units_smaller(given, where, tmp_path, monkeypatch):
    """Above 70 elements of vectors, or of blocks written out, whatever the plan thought."""
    options = {"num_steps": 7, "num_probes": 5, "engine": "exact" if "exact" in where else "autograd"}
    expected = blockhess.spectrum(*given, **options)
    module = blockhess.run.job if "exact" in where else blockhess.run.job.blockhess_ext
    original, sizes = getattr(module, where.rsplit(".")[-1]), []

    def full(operator: Any, *arguments: Any, **others: Any) -> Any:
        size = sum(d * d for d in operator.dims) if "exact" in where else others["num_probes"] * sum(operator.dims)
        sizes.append(size)
        if size > (150 if "exact" in where else 70):
            raise torch.OutOfMemoryError("planted")
        return original(operator, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        shrunk = blockhess.spectrum(*given, **options)
        tried = len(sizes)
        with pytest.raises(Stop):
            after(patch, 3, lambda: (_ for _ in ()).throw(Stop()))
            blockhess.spectrum(*given, run_dir=tmp_path, **options)
    # Resumed where memory is enough: by the same pieces.
    resumed = blockhess.spectrum(*given, run_dir=tmp_path, **options)
    for made in (shrunk, resumed):
        for name in ("nodes", "weights", "steps"):
            assert torch.equal(getattr(made.quadrature, name), getattr(expected.quadrature, name))
        assert "memory ran out" in made.provenance["shrunk"][0] and not expected.provenance["shrunk"]
        assert made.provenance["hvps"] == expected.provenance["hvps"]
    assert tried >= 3

    def always(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(where, always)
    with pytest.raises(torch.OutOfMemoryError):
        blockhess.spectrum(*given, **options)


def test_saving_takes_its_share_of_the_time(monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(checkpoint.time, "perf_counter", lambda: clock[0])

    def save(state: State, hvps: int) -> None:
        saved.append(hvps)
        clock[0] += 0.5

    checkpoints = Checkpoints(save)
    state = State(1, ("none",), {"v": torch.zeros(1, 10**6)})
    for step in range(2000):
        clock[0] += 0.1
        checkpoints.after_step(state, step)
    working = 2000 * 0.1
    assert 3 <= len(saved) == checkpoints.count and checkpoints.seconds == pytest.approx(0.5 * len(saved))
    assert checkpoints.seconds / working < 1.3 * checkpoint.SHARE  # the first one could not be known
    assert saved[1] - saved[0] == pytest.approx(0.5 / checkpoint.SHARE / 0.1, abs=1)


def test_a_copy_from_a_device_is_written_once_it_has_arrived(monkeypatch):
    class Event:
        done = False

        def query(self) -> bool:
            return self.done

    event, saved = Event(), []
    monkeypatch.setattr(checkpoint, "copied", lambda state: (state.copy(), event))
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))
    checkpoints = Checkpoints(lambda state, hvps: saved.append((float(state.tensors["v"][0]), hvps)))
    state = State(1, ("none",), {"v": torch.zeros(1)})
    for hvps in range(3):
        checkpoints.after_step(state, hvps)
        state.tensors["v"] += 1
    assert not saved
    event.done = True
    checkpoints.after_step(state, 3)
    assert saved == [(0.0, 0)]  # as it was when the copy began


def test_status_and_spectra_so_far(given, tmp_path, capsys):
    stopped(given, tmp_path / "run", 9)
    so_far = partial(tmp_path / "run")
    whole = blockhess.spectrum(*given, **OPTIONS)
    assert so_far.names == whole.names and so_far.quadrature.steps.tolist()[0] == whole.quadrature.steps.tolist()[0]
    assert torch.equal(so_far.quadrature.nodes[0], whole.quadrature.nodes[0])
    assert so_far.quadrature.steps.shape[0] == 2 and int(so_far.quadrature.steps[1].max()) == 2
    assert main(["status", str(tmp_path / "run"), "--save", str(tmp_path / "so_far.npz")]) == 0
    told = capsys.readouterr().out
    assert "not running" in told and "step 2" in told and "products a second" in told
    assert same_bits_of_nodes(blockhess.load(tmp_path / "so_far.npz"), so_far)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "This run is not finished: " in (tmp_path / "run.html").read_text()
    assert main(["status", str(tmp_path)]) == 2
    with directory.opened(tmp_path / "run"):
        assert f"running (process {os.getpid()}" in str(status(tmp_path / "run"))


def same_bits_of_nodes(a: blockhess.Spectra, b: blockhess.Spectra) -> bool:
    return torch.equal(a.quadrature.nodes, b.quadrature.nodes) and torch.equal(
        a.quadrature.weights, b.quadrature.weights
    )


def test_a_part_that_was_damaged_is_computed_again(given, tmp_path):
    expected = blockhess.spectrum(*given, **OPTIONS)
    stopped(given, tmp_path, 20)
    part = tmp_path / "parts/00000.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert same_bits(blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS), expected)
    assert any("its work is repeated" in str(warning.message) for warning in told)


@pytest.mark.parametrize("options", [{}, {"reorthogonalize": "partial", "dtype": torch.float64}, {"tol": 0.01}])
def test_more_steps_are_those_of_a_longer_run(given, options, tmp_path):
    options = {"engine": "autograd", "num_probes": 4, "num_steps": 6, "reorthogonalize": "full", **options}
    longer = blockhess.spectrum(*given, **options | {"num_steps": 11, "num_probes": 5 if "tol" not in options else 4})
    short = blockhess.spectrum(*given, keep_vectors=True, run_dir=tmp_path, **options)
    dtype = options.get("dtype")
    for first in (short, str(tmp_path)):
        more = blockhess.extend(
            first, *given, num_steps=11, num_probes=None if "tol" in options else 5, dtype=dtype
        )  # fmt: skip
        for name in ("nodes", "weights", "alpha", "beta", "steps"):
            assert torch.equal(getattr(more.quadrature, name), getattr(longer.quadrature, name))
        assert more.provenance["hvps"] == longer.provenance["hvps"] and more.quadrature.num_steps == 11
    again = blockhess.extend(
        blockhess.extend(short, *given, num_steps=8, dtype=dtype), *given, num_steps=11, dtype=dtype
    )
    assert torch.equal(again.quadrature.nodes, longer.quadrature.nodes[:4])


def test_more_probes_leave_the_vectors_for_more_steps(given, tmp_path):
    first = blockhess.spectrum(*given, keep_vectors=True, **OPTIONS)
    expected = blockhess.spectrum(*given, **OPTIONS | {"num_probes": 5, "num_steps": 11})
    budget = {"memory_budget": OPTIONS["memory_budget"]}  # the same batches, for the same bits
    wider = blockhess.extend(first, *given, num_probes=5, run_dir=tmp_path, **budget)
    for middle in (wider, tmp_path, blockhess.extend(wider, *given, num_probes=5, **budget)):
        more = blockhess.extend(middle, *given, num_steps=11, **budget)
        for name in ("nodes", "weights", "alpha", "beta", "steps"):
            assert torch.equal(getattr(more.quadrature, name), getattr(expected.quadrature, name))
        assert more.provenance["hvps"] == expected.provenance["hvps"]


def test_an_extension_can_be_resumed_too(given, tmp_path):
    first = blockhess.spectrum(*given, keep_vectors=True, **OPTIONS)
    expected = blockhess.extend(first, *given, num_steps=11, num_probes=5)

    def extended() -> blockhess.Spectra:
        return blockhess.extend(first, *given, num_steps=11, num_probes=5, run_dir=tmp_path)

    def stop() -> None:
        raise Stop

    for count in (6, 14):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
            after(patch, count, stop)
            extended()
    assert same_bits(extended(), expected)
    other = blockhess.spectrum(*given, keep_vectors=True, **OPTIONS | {"num_probes": 2})
    with pytest.raises(ValueError, match=r"run_dir must hold a run of the same job(.|\n)*\nextends "):
        blockhess.extend(other, *given, num_steps=11, num_probes=5, run_dir=tmp_path)


def test_more_steps_need_the_vectors(given):
    spectra = blockhess.spectrum(*given, **OPTIONS)
    with pytest.raises(ValueError, match=r"extend: num_steps needs the vectors .*keep_vectors=True.*block '0.weight'"):
        blockhess.extend(spectra, *given, num_steps=9)
    with pytest.raises(ValueError, match="extend: num_probes or num_steps must be given"):
        blockhess.extend(spectra, *given)
    kept = blockhess.plan(*given, **OPTIONS, keep_vectors=True)
    assert "\nkept " in str(kept) and kept.kept_bytes == 3 * 2 * 31 * 4
    assert "\nkept " not in str(blockhess.plan(*given, **OPTIONS))


def test_runs_of_other_probes_are_one_run(given, tmp_path):
    options = {"num_steps": 5, "reorthogonalize": "full", "engine": "autograd"}
    whole = blockhess.spectrum(*given, num_probes=6, **options)
    parts = [blockhess.spectrum(*given, num_probes=n, first_probe=p, **options) for p, n in ((3, 3), (0, 2), (2, 1))]
    merged = blockhess.merge(parts)
    for name in ("nodes", "weights", "alpha", "beta", "steps"):
        assert torch.equal(getattr(merged.quadrature, name), getattr(whole.quadrature, name))
    assert merged.provenance["hvps"] == whole.provenance["hvps"] and len(merged.provenance["merged"]) == 3
    files = [part.save(tmp_path / f"{i}.npz") for i, part in enumerate(parts)]
    assert main(["merge", *map(str, files), "--out", str(tmp_path / "all.npz")]) == 0
    assert main(["merge", *map(str, files)]) == main(["merge", *map(str, files), "--out", str(files[0])]) == 2
    assert same_bits(blockhess.load(files[0]), parts[0])
    assert same_bits(blockhess.load(tmp_path / "all.npz"), merged)
    longer = blockhess.extend(merged, *given, num_probes=8)
    assert torch.equal(longer.quadrature.nodes, blockhess.spectrum(*given, num_probes=8, **options).quadrature.nodes)


def test_probes_that_a_tolerance_chose_in_several_runs_leave_gaps(given):
    options = {"num_steps": 5, "tol": 0.5, "engine": "autograd", "num_probes": 4}
    merged = blockhess.merge([blockhess.spectrum(*given, first_probe=p, **options) for p in (0, 4)])
    assert merged.quadrature.num_probes < 8
    with pytest.raises(ValueError, match="extend: spectra must not be merged from runs with a tolerance"):
        blockhess.extend(merged, *given, num_probes=20)


@pytest.mark.parametrize("engine", ["autograd", "exact"])
def test_runs_of_other_blocks_are_one_run(given, engine):
    options = {"num_steps": 5, "num_probes": 2, "reorthogonalize": "full", "engine": engine}
    whole = blockhess.spectrum(*given, **options)
    names = list(whole)
    some = [blockhess.spectrum(*given, blocks={n: [n] for n in part}, **options) for part in (names[:1], names[1:])]
    merged = blockhess.merge(some)
    assert merged.names == whole.names and merged.blocks == whole.blocks
    for name in ("nodes", "weights", "steps"):
        assert torch.equal(getattr(merged.quadrature, name), getattr(whole.quadrature, name))
    assert merged.provenance["plan"]["exact"] == whole.provenance["plan"]["exact"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 1}, "differ in seed (0 and 1)"),
        ({"num_steps": 6}, "differ in num_steps (5 and 6)"),
        ({"dtype": torch.float64}, "differ in dtype ('float32' and 'float64')"),
        ({"model": "other"}, "differ in fingerprints of parameters and data"),
        ({"data": "other"}, "a loader that shuffles or augments yields other batches"),
        ({"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)}, "differ in value of the loss"),
        ({"engine": "ggn"}, "differ in matrix ('autograd' and 'ggn')"),
        ({"first_probe": 1}, "must have different probes, run 1 has those up to 1 and run 2 those from 1"),
        ({"first_probe": 3}, "probes must follow each other, run 1 ends at 1 and run 2 begins at 3"),
        ({"reorthogonalize": "full"}, "must treat block '0.weight' alike"),
        ({"blocks": {"0.weight": ["0.weight"]}, "first_probe": 0}, "share '0.weight'"),
        ({"blocks": {"all": ["0.weight"]}}, "must have the same first_probe, run 1 has 0 and run 2 2"),
    ],
)
def test_what_does_not_belong_together_is_refused(given, change, text):
    options = {"num_steps": 5, "num_probes": 2, "reorthogonalize": "none", "engine": "autograd"}
    other = {"model": mlp(), "data": labeled(7)}
    named = dict(zip(("model", "data", "loss_fn"), given)) | options
    first = blockhess.spectrum(**named)
    changed = {name: other[name] if value == "other" else value for name, value in change.items()}
    second = blockhess.spectrum(**named | {"first_probe": 2} | changed)
    with pytest.raises(ValueError) as refused:
        blockhess.merge([first, second])
    assert text in str(refused.value)


def test_units_are_cut_in_two():
    unit = Unit(2, 3, (0, 4))
    first, second = unit.halves()
    assert [*first.probes, *second.probes] == [2, 3, 4] and first.blocks == second.blocks == (0, 4)
    assert Unit(2, 1, (0, 4, 5)).halves() == (Unit(2, 1, (0,)), Unit(2, 1, (4, 5))) and Unit(2, 1, (0,)).halves() == ()
    assert unit.holds(first) and unit.holds(Unit(4, 1, (4,))) and not unit.holds(unit) and not first.holds(second)
    assert not unit.holds(Unit(2, 0, (0,))) and Unit(0, 0, (1, 2)).holds(Unit(0, 0, (2,)))
