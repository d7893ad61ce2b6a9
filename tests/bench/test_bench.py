"""`python -m bench`: wrong rivals are refused, absent ones shown, arithmetic is right; no time is judged."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time

import pytest
import torch

from bench import __main__ as command
from bench.end_to_end import end_to_end, same_accuracy, slices
from bench.harness import report, result_file, timing
from bench.harness.machine import Machine, TooSmall
from bench.harness.rows import Row, Target, judged
from bench.harness.timing import CPU, Entry, Rival, Times, WrongResult, alternate, contest, told
from bench.ops import layouts, rows, scaling
from bench.ops.step import Projection, Step
from bench.ops.torch_rivals import STEPS, density_by_point, density_in_chunks
from blockhess import estimate
from blockhess.problem.model_state import fixed_state

TINY = Machine(CPU, "tiny", {"copy": 1e9, "triad": 2e9, "read": 4e9, "gemm": 8e9})


# --- the stopwatch --------------------------------------------------------------------------------------------


def rival(result: float, **options: float) -> Rival:
    return Rival(lambda: lambda: result, lambda found: abs(found - 1.0), 1e-3, **options)


def test_wrong_absent_and_broken_rivals_are_told_and_not_timed():
    def absent():
        raise ImportError("No module named 'peer'")

    def broken():
        raise RuntimeError("this cannot be\nsecond line")

    entries = contest(
        {
            "ours": rival(1.0),
            "close": rival(1.0005),
            "wrong": rival(1.01),
            "nan": rival(float("nan")),
            "absent": Rival(absent, float, 1),
            "broken": Rival(lambda: broken, float, 1),
        },
        rounds=4,
    )
    assert [len(entry.seconds) for entry in entries.values()] == [4, 4, 0, 0, 0, 0]
    assert entries["wrong"].failure == "wrong by 0.01, at most 0.001 is right" and entries["wrong"].wrong
    assert entries["nan"].wrong and not entries["ours"].failure
    assert entries["absent"].failure == "absent (No module named 'peer')" and entries["absent"].absent
    assert entries["broken"].failure == "RuntimeError: this cannot be"
    with pytest.raises(WrongResult, match=r"wrong: wrong by 0.01, .* nothing was timed"):
        Row.of({"wrong": entries["wrong"], "ours": entries["ours"]})


def test_a_rival_that_is_not_ready_in_time_is_absent():
    def slow():
        time.sleep(30)

    entries = contest({"ours": rival(1.0), "slow": Rival(lambda: slow, lambda _: 0.0, 1, limit=0.05)}, rounds=1)
    assert entries["slow"].failure == "absent (TimeoutError: not ready within 0 s)"
    assert told(torch._dynamo.exc.Unsupported("no such thing")).startswith("absent (Unsupported: no such thing")


def test_rivals_take_turns_and_another_begins_each_round():
    seen: list[str] = []
    clocks = {name: lambda name=name: seen.append(name) or 0.0 for name in "abc"}
    for _ in alternate(clocks, 3):
        pass
    assert "".join(seen) == "abcbcacab"
    seen.clear()
    for _ in alternate(clocks, 10, seconds=0.0):
        pass
    assert "".join(seen) == "abc"


def test_a_row_has_the_median_of_the_ratios_of_its_rounds():
    entries = {
        "blockhess": Entry(error=1e-7, seconds=[1.0, 2.0, 4.0]),
        "slow": Entry(error=0.0, seconds=[3.0, 10.0, 8.0]),
        "peer": Entry("absent (no)"),
    }
    row = Row.of(entries)
    assert row.measured == {"times faster than slow": 3.0} and row.error == 1e-7
    assert row.times["blockhess"]["median_ms"] == 2000 and row.times["peer"] == {
        "failure": "absent (no)",
        "error": None,
    }


def test_a_scaled_rival_counts_as_the_whole():
    entries = contest({"ours": Rival(lambda: lambda: time.sleep(0.01), lambda _: 0.0, 1, scale=100.0)}, rounds=2)
    assert min(entries["ours"].seconds) >= 1.0


def test_the_processors_clock_does_not_count_waiting():
    timing.use_clock("cpu")
    try:
        waited = timing.timed(lambda: time.sleep(0.3))
        worked = timing.timed(lambda: sum(range(10**6)))
    finally:
        timing.use_clock("wall")
    assert waited < 0.2 and worked > 0 and timing.timed(lambda: time.sleep(0.3)) >= 0.3


# --- shares, targets, tables ----------------------------------------------------------------------------------


def test_shares_are_of_the_limit_named():
    # 6e9 bytes in 4 s are 1.5e9 a second.
    assert TINY.share(6e9, 4.0) == 1.5
    assert TINY.share(6e9, 4.0, "triad") == 0.75


def test_limits_are_measured_and_consistent():
    limits = Machine.measured(CPU, "tiny").limits
    assert set(limits) == {"copy", "triad", "read", "gemm"} and min(limits.values()) > 0


def test_traffic_is_counted_by_segments():
    from blockhess_ext.layout import Layout

    assert rows.moved_elements(Layout.of([5, 7])) == 4
    half = Layout.of([10**5, 10**6 * 2])
    assert rows.moved_elements(half) == pytest.approx((4 * 1 + 8 * 20) / 21)
    assert rows.basis_reads(Layout.of([100, 300_000])) == pytest.approx((100 + 3 * 300_000) / 300_100)


def test_targets_are_judged_and_absence_is_told():
    target = Target(">= 2 x peer", "times faster than peer", 2.0, True)
    row = {"measured": {"times faster than peer": 1.9}, "times": {}}
    assert judged(target, row) == ("1.9", "missed")
    assert judged(target, {"measured": {"times faster than peer": 2.0}}) == ("2", "met")
    absent = {"measured": {}, "times": {"peer": {"failure": "absent (no module)"}}}
    assert judged(target, absent) == ("-", "not measured: absent (no module)")
    assert judged(target, {"skipped": "takes 9 GiB"}) == ("-", "skipped: takes 9 GiB")
    assert judged(target, {"failure": "no"}) == ("-", "failed")
    assert judged(Target("", "share of x", 0.8, True), {"measured": {"share of x": 0.812}})[0] == "81.2 %"
    bounded = {"measured": {"times faster than peer": 1.9, "times faster than peer, at triad bandwidth": 1.95}}
    assert judged(target, bounded) == ("1.9 (at triad bandwidth 1.95)", "missed")


def result_of(rows: dict, size: str = "full") -> dict:
    environment = {"cpu": "a CPU", "threads": 1, "clock": "wall", "torch": "2"}
    limits = {"copy": 1e9, "gemm": 1e9}
    return {
        "schema": result_file.SCHEMA,
        "size": size,
        "environment": environment,
        "peers": {},
        "limits": limits,
        "rows": rows,
    }


def row_of(**milliseconds: float) -> dict:
    entries = {name: Entry(error=0.0, seconds=[ms / 1e3]) for name, ms in milliseconds.items()}
    return {**vars(Row.of(entries)), "load": [1.0, 2.0], "seconds": 1.0}


def test_the_table_shows_times_and_everyone_who_is_not_there():
    name = next(iter(rows.ROWS))
    row = row_of(blockhess=1.0, **{"PyTorch by block": 4.0})
    row["times"]["torch._foreach"] = Entry("absent (no)").summary()
    other = next(name for name in report.ROWS if name != name[0] and "huge" in name)
    skipped = {"skipped": "takes 9 GiB of memory, 1 GiB are free", "load": [1.0, 1.0]}
    text = report.report(result_of({name: row, other: skipped}))
    assert "| >= 3.5 x PyTorch by block | 4 | met |" in text
    assert "|  | torch._foreach | not timed: absent (no) | | | | - |" in text
    assert f"| {other} | skipped: takes 9 GiB of memory, 1 GiB are free |" in text
    assert "|  | PyTorch by block | 4 (4 - 4) | 4.00 |" in text
    assert "met" not in report.report(result_of({name: row}, "quick")).replace("not judged", "")


def test_the_report_says_whether_other_programs_ran():
    row = row_of(blockhess=1.0)
    assert report.load(result_of({"a": row})).startswith("load of the machine 1.0 ... 2.0: other programs took part")
    row["load"] = [0.9, 1.2]
    assert report.load(result_of({"a": row})) == "load of the machine 0.9 ... 1.2"
    assert report.report(result_of({"a": row})).endswith("\n\nLoad of the machine 0.9 ... 1.2.")


# --- files ----------------------------------------------------------------------------------------------------


def test_comparing_shows_ratios_and_what_is_missing():
    old = result_of({"a": row_of(blockhess=2.0, peer=3.0), "gone": row_of(blockhess=1.0)})
    new = result_of({"a": row_of(blockhess=5.0, peer=3.0), "new": row_of(blockhess=1.0)})
    new["rows"]["a"]["times"]["peer"] = Entry("absent (no)").summary()
    new["environment"] = {**new["environment"], "threads": 2}
    lines = result_file.comparison(old, new).splitlines()
    assert "| a | blockhess | 2 | 5 | 2.50 | slower |" in lines
    assert "| a | peer | | | | old: timed; new: absent (no) |" in lines
    assert "| gone | blockhess | | | | old: timed; new: not there |" in lines
    assert lines[-1] == "Not the same threads: 1, now 2."
    assert "slower" not in result_file.comparison(old, old)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", r"must be the JSON of a run, got Expecting"),
        ("[]", r"must have the schema 'blockhess-bench/1', got None"),
        ('{"schema": "blockhess-bench/0"}', r"must have the schema 'blockhess-bench/1', got 'blockhess-bench/0'"),
        (None, r"must be the JSON of a run, got .*No such file"),
    ],
)
def test_an_unreadable_or_foreign_file_is_one_clear_error(content, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        result_file.read(path)
    monkeypatch.setattr(sys, "argv", ["bench", "--compare", str(path)])
    assert command.main() == 2
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1


# --- the command ----------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command in this process, threads and environment put back."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    threads = torch.get_num_threads()

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        return command.main()

    yield call
    torch.set_num_threads(threads)


def test_a_quick_row_is_measured_written_shown_and_compared(run, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert run("--quick", "--only", "m = 300", "--json", str(path)) == 0
    shown = capsys.readouterr().out
    data = result_file.read(path)
    assert list(data["rows"]) == ["`tridiag_quadrature`, 260 problems, m = 300"]
    assert set(data["limits"]) == {"copy", "triad", "read", "gemm"}
    assert {"cpu", "commit", "torch", "python"} <= set(data["environment"]) and "curvlinops" in data["peers"]
    assert len(next(iter(data["rows"].values()))["load"]) == 2
    assert run("--show", str(path), "--compare", str(path)) == 0
    again = capsys.readouterr().out
    assert again.startswith(shown.rstrip()) and "| 1.00 |" in again


def test_a_wrong_rival_is_refused_and_told_and_no_failure(run, monkeypatch, capsys, tmp_path):
    right = rows.quadrature_by_eigh
    calls = []

    def wrong(alpha, beta):
        calls.append(1)
        nodes, weights = right(alpha, beta)
        return nodes + (0.1 if len(calls) > 1 else 0.0), weights  # the first call is the reference

    monkeypatch.setattr(rows, "quadrature_by_eigh", wrong)
    assert run("--quick", "--only", "m = 300", "--json", str(tmp_path / "x.json")) == 0
    output = capsys.readouterr()
    assert "| torch.linalg.eigh | not timed: wrong by" in output.out
    assert "m = 300: not timed: torch.linalg.eigh, wrong by 0.0" in output.err.splitlines()[-1]
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"].values()
    assert "median_ms" in row["times"]["LAPACK sterf"] and "median_ms" not in row["times"]["torch.linalg.eigh"]


def test_our_own_wrong_result_fails_the_row(run, monkeypatch, capsys):
    right = rows.ops.gaussian_density
    monkeypatch.setattr(rows, "compile_seconds", lambda machine: 0.01)
    monkeypatch.setattr(rows.ops, "gaussian_density", lambda *arguments: right(*arguments) * (1 + 1e-9))
    assert run("--quick", "--only", "gaussian_density") == 1
    output = capsys.readouterr()
    assert "blockhess: wrong by 1e-09" in output.out
    assert output.err.splitlines()[-1].startswith("bench: `gaussian_density`") and "failed: WrongResult" in output.err


def test_a_machine_too_small_is_a_reason(run, monkeypatch, capsys):
    def huge(machine: Machine) -> Row:
        machine.require(2.0**60)
        return Row(0.0)

    monkeypatch.setitem(command.ROWS, "too large", (huge, []))
    assert run("--quick", "--only", "too large") == 0
    assert "| too large | skipped: takes 1.07e+09 GiB of memory, " in capsys.readouterr().out
    with pytest.raises(TooSmall):
        TINY.require(2.0**60)


def test_what_cannot_be_is_told_before_anything_is_measured(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "run", None)  # would be called
    path = tmp_path / "kept.json"
    result_file.write(result_of({"a row": row_of(blockhess=1.0)}), path)
    for arguments, message in (
        (
            ["--only", "no such row"],
            "bench: --only must be part of a row's name, got 'no such row'; rows: `lan",
        ),
        (
            ["--show", str(path), "--only", "another"],
            "bench: --only must be part of a row's name, got 'another'; rows: a row",
        ),
        (["--quick", "--compare", str(path)], "bench: runs must have one size to be compared, got 'full' and 'quick'"),
        (["--json", str(tmp_path / "no" / "x")], "bench: --json must be a file that can be written, got [Errno 2]"),
    ):
        assert run(*arguments) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith(message) and len(output.err.splitlines()) == 1
    for arguments in (
        ["--threads", "0"],
        ["--threads", "2", "--clock", "cpu"],
        ["--show", str(path), "--json", str(path)],
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert stopped.value.code == 2


def test_only_the_rows_asked_for_are_shown_and_compared(run, capsys, tmp_path):
    path = tmp_path / "kept.json"
    result_file.write(result_of({"one row": row_of(blockhess=1.0), "another": row_of(blockhess=2.0)}), path)
    assert run("--show", str(path), "--compare", str(path), "--only", "one") == 0
    shown = capsys.readouterr().out
    assert "| one row | blockhess | 1 | 1 | 1.00 |  |" in shown and "another" not in shown


def test_threads_are_everybodys(run, monkeypatch, tmp_path):
    monkeypatch.setitem(command.ROWS, "threads in use", (lambda machine: Row(0.0, {"n": torch.get_num_threads()}), []))
    assert run("--quick", "--only", "threads in use", "--threads", "2", "--json", str(tmp_path / "x.json")) == 0
    data = result_file.read(tmp_path / "x.json")
    assert data["environment"]["threads"] == 2 and data["rows"]["threads in use"]["measured"] == {"n": 2}


# --- workloads ------------------------------------------------------------------------------------------------


def test_layouts_have_the_known_numbers_of_parameters():
    known = {"GPT-2 124M": 124_439_808, "ResNet18": 11_689_512, "VGG16": 138_357_544, "ViT-base": 86_567_656}
    known |= {"BERT": 109_482_240, "one huge block": 10**8}
    for name, parameters in known.items():
        assert sum(layouts.LAYOUTS[name]()) == parameters
    from blockhess.models import GPT, GPTConfig

    sizes = [p.numel() for p in GPT(GPTConfig()).parameters()]
    assert sorted(layouts.LAYOUTS["GPT2-nano"]()) == sorted(sizes)
    small = layouts.LAYOUTS["150 small blocks"]()
    assert (len(small), small[0], small[-1]) == (150, 64, 65_536)


@pytest.mark.parametrize("name", STEPS)
def test_every_strength_of_pytorch_makes_the_step(name):
    step = Step.of(TINY, [3, 17, 16, 40], 3)
    make, join = STEPS[name]
    advance = make(step.w, step.v, step.v_prev.clone(), step.recurrences.beta[0].clone(), step.layout)
    step.run()
    for _ in range(2):
        torch.testing.assert_close(join(advance(), step.layout, 3), step.v_prev, rtol=1e-4, atol=1e-5)


def test_the_expected_step_does_not_change_the_real_one():
    step = Step.of(TINY, [3, 17], 2)
    before = step.v_prev.clone()
    expected = step.expected()
    assert torch.equal(step.v_prev, before) and step.error_from(expected) > 0.1
    step.run()
    assert step.error_from(expected) < 1e-5
    projection = Projection.of(TINY, [30, 50], 5, 2)
    expected = projection.expected()
    assert projection.error_from(expected) > 1e-3
    projection.run()
    assert projection.error_from(expected) < 1e-5


def test_the_papers_density_loop_is_the_broadcast_formula():
    torch.manual_seed(0)
    nodes, weights = torch.rand(2, 12).double(), torch.rand(2, 12).double()
    arguments = nodes, weights, torch.linspace(0, 1, 7).double(), torch.tensor([0.1, 0.2]).double()
    torch.testing.assert_close(density_by_point(*arguments, 3), density_in_chunks(*arguments))


def test_scaling_curves_are_measured_and_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scaling, "measure", lambda *_, **__: Times([1e-3]))  # after the check of every step
    threads = torch.get_num_threads()
    found = scaling.scaling(TINY).curves
    assert torch.get_num_threads() == threads and next(zip(*found["threads, 1e7 elements"])) == (1, 2)
    assert found["elements"][0] == [10, 1e9 * 1e-3 / 10]
    scaling.plot({"1 thread": found}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


# --- end to end -----------------------------------------------------------------------------------------------


class Counting:
    """A clock that advances by what it is told."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def small_case():
    return end_to_end._small_gpt().case


def test_our_job_is_stopped_and_extrapolated_block_by_block(monkeypatch):
    """A first product takes 100 s (compiling), a later one 2 s for one block and 3 s for another; 7 s come before."""
    case, clock = small_case(), Counting()
    measured = dataclasses.replace(case, blocks=case.blocks[3:5])

    def spectrum(*_, blocks, num_probes, num_steps, **__):
        assert list(blocks) == list(measured.blocks) and num_probes * num_steps == 1000
        with estimate.progress_bar(1, "", False) as product:
            clock.time += 7
            for step in range(1000):
                for seconds in (2, 3):
                    clock.time += 100 if step == 0 else seconds
                    product()

    monkeypatch.setattr(slices, "now", clock)
    monkeypatch.setattr(slices.blockhess, "spectrum", spectrum)
    counts = dict.fromkeys(case.blocks, 10) | {case.blocks[3]: 20}
    found = slices.of_ours(measured, counts, steps=3)
    assert clock.time == 7 + 200 + 3 * 5
    # 11 blocks stand behind these 2; 120 products behind these 30.
    assert found.setup == pytest.approx((7 + 200 - 5) * 11 / 2)
    assert found.work == pytest.approx((20 * 2 + 10 * 3) * 120 / 30)


def test_a_rival_is_extrapolated_block_by_block(monkeypatch):
    case, clock = small_case(), Counting()
    measured = dataclasses.replace(case, blocks=case.blocks[3:5])

    class Slow:
        """1 s to make, 0.5 s a block, a product 2 s of one block and 3 s of the other; 4 s once a step."""

        def __init__(self, case):
            clock.time += 1

        def of_block(self, name):
            clock.time += 0.5

            def product(v):
                clock.time += 2 if name == case.blocks[3] else 3
                return torch.linspace(0, 1, len(v)) * v

            return product

        def step(self):
            clock.time += 4

    monkeypatch.setattr(slices, "now", clock)
    monkeypatch.setattr(slices, "timed", lambda call: (before := clock.time, call(), clock.time - before)[2])
    monkeypatch.setitem(slices.RIVALS, "slow", Slow)
    counts = dict.fromkeys(case.blocks, 10) | {case.blocks[3]: 20}
    probe = {name: case.vector(name) for name in measured.blocks}
    found = slices.of_rival("slow", measured, counts, [probe], 3)
    assert found.setup == pytest.approx(1 + 2 * 0.5 * 11 / 2)
    assert found.work == pytest.approx((20 * 2 + 10 * 3) * 120 / 30 + 1000 * 4)
    assert found.whole == found.setup + found.work and len(found.quadratures[case.blocks[3]][0][0]) == 3


def test_rivals_find_the_js_matrix_and_a_wrong_one_does_not(monkeypatch):
    case = small_case()
    with fixed_state(case.model):
        found = end_to_end.compared(case, "autograd")
    error, failure = found["the paper's procedure"]
    assert error < end_to_end.LARGEST_JS_ERROR and not failure
    right = slices.RIVALS["the paper's procedure"]

    class Off(right):
        def of_block(self, name):
            product = super().of_block(name)
            return lambda v: (4.0 if "tok" in name else 1.0) * product(v)

    monkeypatch.setitem(slices.RIVALS, "the paper's procedure", Off)
    monkeypatch.setattr(end_to_end, "PEERS", ("the paper's procedure",))
    row = end_to_end.job_row(TINY, lambda _: end_to_end._small_gpt())
    refused = row.times["the paper's procedure"]
    assert refused["failure"].startswith("wrong by ") and refused["error"] > 5 * end_to_end.LARGEST_JS_ERROR
    assert "times faster than the paper's procedure, cold" not in row.measured


def test_a_job_tells_what_is_no_product(monkeypatch):
    monkeypatch.setattr(end_to_end, "PEERS", ("the paper's procedure",))
    row = end_to_end.job_row(TINY, end_to_end.gpt_nano)
    first, last = row.times["blockhess"]["first_ms"] / 1e3, row.measured
    others = last["set-up, cold, s"] + last["Lanczos and quadratures, s"] + last["JS matrix, s"]
    assert last["share of all but products, cold"] == pytest.approx(others / first)
    assert last["times faster than the paper's procedure, cold"] == pytest.approx(
        row.times["the paper's procedure"]["first_ms"] / 1e3 / first
    )
    # 8 of 11 blocks have fewer entries than 1,000 and are written out by ours alone.
    assert last["products"] < last["products of rivals"] <= 11 * 1000
    _, targets = end_to_end.ROWS["end to end, 10 x 100, GPT2-nano (10.7M), 1,024 tokens"]
    assert all(target.quantity in row.measured for target in targets)


def test_fewer_probes_and_steps_are_those_of_a_shorter_run():
    case = small_case()
    with fixed_state(case.model):
        long, short = (
            slices.ours(case, num_probes=p, num_steps=m, first_probe=first, engine="autograd")
            for p, m, first in ((4, 9, 0), (2, 5, 1))
        )
    cut = same_accuracy.part(long, slice(1, 3), 5)
    torch.testing.assert_close(cut.quadrature.steps, short.quadrature.steps)
    torch.testing.assert_close(cut.trace()[0], short.trace()[0])
    torch.testing.assert_close(cut.js_matrix(sigma=0.1), short.js_matrix(sigma=0.1))


def test_the_fewest_products_that_do_are_found():
    case = small_case()
    with fixed_state(case.model):
        long = slices.ours(case, num_probes=3, num_steps=24, engine="autograd")
    seen = []

    def error(spectra):
        seen.append((spectra.quadrature.nodes.shape[0], spectra.quadrature.num_steps))
        return 1 / (seen[-1][0] * seen[-1][1])

    assert same_accuracy.cheapest(long, error, 1 / 13) == (2, 8)  # of 1 ... 2 x 3, 4, 8, 12, 18, 24
    assert (2, 12) not in seen and seen.count((1, 3)) == 3  # each of the probes alone
    assert same_accuracy.cheapest(long, lambda _: 1.0, 0.5) == (3, 24)


def test_rivals_are_timed_to_the_same_accuracy(monkeypatch):
    monkeypatch.setattr(same_accuracy, "PEERS", ("the paper's procedure",))
    monkeypatch.setattr(end_to_end, "PEERS", ("the paper's procedure",))
    monkeypatch.setattr(same_accuracy, "TOLERANCES", (0.2,))
    monkeypatch.setattr(same_accuracy, "cheapest", lambda *_: (1, 12))
    row = same_accuracy.row(TINY)
    whole, fewer = (
        row.measured[f"times faster than the paper's procedure{words}"] for words in ("", same_accuracy.HINDSIGHT)
    )
    assert whole / 4 < fewer < whole  # a quarter of the products, and all of the set-up
    assert row.measured["tol"] == 0.2 and "1 x 12 would have done" in row.notes[0]
