"""A planned run: computes units of work one after another and combines them into the quadratures of all blocks."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

import blockhess_ext
from blockhess.hvp import BlockOperator, Engine, NotTraceable, TracedEngine
from blockhess.hvp.accuracy import Accuracy, EngineMismatch, gradient_norms, measure
from blockhess.hvp.causes import suspects
from blockhess.hvp.difference import less_error
from blockhess.hvp.differences import RESOLUTION
from blockhess.hvp.exact import exact_quadratures
from blockhess.problem.blocks import ZERO_NOTE, Block, block_id, with_note
from blockhess.problem.memory import budget_bytes, release_unused, size_text
from blockhess.problem.problem import Problem
from blockhess.problem.ranks import SINGLE_PROCESS
from blockhess.results.data import SpectraData
from blockhess.results.unit import Unit
from blockhess.run import adaptive
from blockhess.run.costs import product_costs, step_cost
from blockhess.run.options import Options
from blockhess.run.plan import Plan, exact_blocks, make_plan, most_checked, why_difference
from blockhess.run.recorder import Recorder, UnitResult
from blockhess.run.split_work import items_of, shared
from blockhess_ext import Quadrature, State
from blockhess_ext.operator_checks import least_size
from blockhess_ext.slq import reorthogonalization_modes

# Blocks whose eigenvalues are below this share of the largest ones may be zero but for rounding.
FLAT = 1e-4
# Relative error of products by differences above which there is a warning.
LARGEST_ERROR = 1e-3

Compute: TypeAlias = Callable[[Unit], Iterator[UnitResult]]


class Job:
    """A planned run. The engine is created and checked by `run`.

    Args:
        problem, options: what to compute.
        records: recorder of the work, which also knows the results of an interrupted run.
        plan: of the interrupted run.
        first: a finished run to extend, with the same choices. Its probes are reused; more steps start from its
            vectors.
        more_probes: whether to extend the blocks of `first` to options.num_probes.

    Attributes:
        plan: the plan, updated if tracing fails.
        infos: information on the blocks, with notes.
        records: the recorder; its `vectors` are the states after the last step, of every unit whose state was kept.
        hvps: number of products computed, including those of `first`.
        hvp_error: checked block -> error of H v for a random unit vector v; None if it is unknown.
        error_unknown: why hvp_error is None, or "".
        gradient_norms: block -> norm of its gradient over all data, if finite; 0 in all blocks if they are rounding.
        shrunk: messages about units that were split because memory ran out.
    """

    def __init__(
        self,
        problem: Problem,
        options: Options,
        records: Recorder | None = None,
        plan: Plan | None = None,
        first: SpectraData | None = None,
        more_probes: bool = True,
    ) -> None:
        self._problem, self._options, self._first, self._more_probes = problem, options, first, more_probes
        self.records = Recorder(options.keep_vectors) if records is None else records
        dims, itemsize = problem.dims, problem.dtype.itemsize
        exact = None
        if first is None:
            self._basis = reorthogonalization_modes(
                options.reorthogonalize, dims, options.num_steps, bytes_per_element=options.num_probes * itemsize
            )
        else:
            self._basis = list(first.quadrature.reorthogonalize)
            exact = tuple(name in first.provenance["plan"]["exact"] for name in first.names)
        self.plan, self._engine = (
            (plan, None)
            if plan
            else make_plan(
                problem,
                **{name: getattr(options, name) for name in ("engine", "num_probes", "num_steps", "keep_vectors")},
                basis_dims=[0 if basis in ("none", "exact") else dim for dim, basis in zip(dims, self._basis)],
                budget=budget_bytes(options.memory_budget, problem.device),
                exact=exact,
                least=None if options.tol is None else (adaptive.LEAST_PROBES, 1),
                largest_exact=math.inf
                if options.tol is None or options.keep_vectors
                else adaptive.largest_exact(options.tol, options.tol_sigma),
            )
        )
        self.infos = problem.infos
        self.hvps = 0 if first is None else first.provenance["hvps"]
        self.hvp_error: dict[str, float] | None = None
        self.error_unknown = ""
        self.gradient_norms: dict[str, float] = {}
        self.shrunk: list[str] = []
        self._too_large, self._exact_rows = math.inf, options.num_probes
        self._zero_within: list[float | None] = [None] * len(self.infos)
        self._confirmed: set[int] = set()
        self._undecided: set[int] = set()
        self._left_open: dict[int, float] = {}
        self._is_defined = True
        self._largest_product = 0.0  # with a unit vector, in float64 where that is the same function
        self._ids = [block_id(info.name) for info in problem.infos]

    def provenance(self, result: Quadrature) -> dict[str, Any]:
        """Return the entries of the result's provenance that the job determines."""
        options = {f.name: getattr(self._options, f.name) for f in dataclasses.fields(Options)}
        del options["memory_budget"]  # in the plan, as bytes
        bare = [l for l, mode in enumerate(result.reorthogonalize) if mode == "none"]
        ghosts = result.select_blocks(bare).ghosts().sum(0).tolist()
        exact = [info.name for info, exact in zip(self.infos, self.plan.exact) if exact]
        return options | {
            "dtype": result.dtype,
            "seed": result.seed,
            "engine": self.plan.engine,
            "plan": dataclasses.asdict(self.plan) | {"exact": exact},
            "shrunk": self.shrunk,
            "hvp_error": self.hvp_error,
            "hvp_error_unknown": self.error_unknown,
            "gradient_norms": self.gradient_norms,
            "slices": {block.info.name: found for block in self._problem.blocks if (found := _slices(block))},
            "unchecked": [
                info.name for l, info in enumerate(self.infos) if self._problem.is_used(l) and l not in self._confirmed
            ],
            "ghosts": {self.infos[l].name: count for l, count in zip(bare, ghosts) if count},
            "hvps": self.hvps,
            "hvps_saved": self.plan.hvps - self.hvps,
            "processes": [self._problem.ranks.work_size, self._problem.ranks.data_size],
        }

    def run(self, seed: int | None, on_hvp: Callable[[], object]) -> Quadrature:
        """Return the quadrature of all blocks."""
        options, ranks = self._options, self._problem.ranks
        seed = ranks.gather(blockhess_ext.arguments.probe_seed(seed))[0]
        if self.plan.exceeds_budget:
            peak, budget = size_text(self.plan.peak_bytes), size_text(self.plan.memory_budget)
            warnings.warn(
                f"spectrum: memory_budget must be about {peak} for the smallest run of this job, got {budget}",
                stacklevel=2,
            )
        engine = self.make_engine()
        share = None if ranks is SINGLE_PROCESS else self._sharing(engine)

        def compute(unit: Unit, state: State | None = None) -> Iterator[UnitResult]:
            return self._finish(unit, engine, seed, on_hvp, state)

        def keep(finished: Iterable[UnitResult]) -> None:
            for done in finished:
                self.hvps += done.hvps
                for column, l in enumerate(done.unit.blocks):
                    found[l].append(done.part.select_block(column))

        found: list[list[Quadrature]] = [[] for _ in self._ids]  # for every block, parts with some of its probes
        if self._first is not None:
            for unit, state in sorted(self._first.vectors, key=lambda vectors: vectors[0].first_probe):
                keep(compute(unit, state))  # without further steps, this only keeps the vectors
            if options.num_steps == self._first.quadrature.num_steps:
                found = [[part.to(self._problem.device)] for part in _blocks_of(self._first)]
            else:
                self._check_vectors(self._first, found)

        for units in self._rounds(found):
            if share is not None:
                keep(share(units, compute))
            else:
                for unit in units:
                    keep(compute(unit))
        if isinstance(engine, TracedEngine) and engine.rows < self.plan.rows:
            self.shrunk.append(
                f"memory ran out: {engine.rows} instead of {self.plan.rows} vectors were multiplied together"
            )
        self.shrunk = [text for texts in ranks.gather(self.shrunk) for text in texts]
        whole = Quadrature.concatenate([Quadrature.concatenate(parts, 0) for parts in found], 1)
        radii = whole.nodes.abs().amax((0, 2)).tolist()
        self._check_size(radii)
        self._check_again(engine, radii, (whole.weights * whole.nodes**2).sum(2).mean(0).sqrt().tolist())
        self._note(ZERO_NOTE, [noise is not None and r <= noise for r, noise in zip(radii, self._zero_within)])
        if options.tol is not None:
            few = adaptive.missed(whole, options.tol, options.tol_sigma)
            self._note("tolerance not reached", [f and not e for f, e in zip(few, self.plan.exact)])
        return whole

    def _norms(self, accuracy: Accuracy) -> dict[str, float]:
        norms = gradient_norms(self._problem, accuracy)
        return {info.name: norm for info, norm in zip(self.infos, norms) if math.isfinite(norm)}

    def _sharing(self, engine: Engine) -> Callable[[Sequence[Unit], Compute], list[UnitResult]]:
        """Return a function that divides units among the ranks and returns all results on all of them."""
        problem, records, ranks = self._problem, self.records, self._problem.ranks
        n_exact = sum(self.plan.exact)
        recurrences = n_exact + (len(problem.dims) - n_exact) * self._options.num_probes
        if recurrences < ranks.work_size:
            raise ValueError(
                "spectrum: parallel must share the work among no more ranks than there are recurrences, "
                f"{recurrences}, got {ranks.work_size}; let ranks share batches: parallel='data' or (recurrences, data)"
            )
        cost = self.cost(ranks.gather(product_costs(problem, engine))[0])

        def share(units: Sequence[Unit], compute: Compute) -> list[UnitResult]:
            before = [done for done in records.finished() if any(unit.covers(done.unit) for unit in units)]
            made = {item for done in before for item in items_of(done.unit)}
            # An interrupted unit is resumed by the rank that has its state.
            begun: list[list[Unit]] = [[] for _ in range(ranks.work_size)]
            for rank, unit in enumerate(ranks.gather(records.in_work())[:: ranks.data_size]):
                if unit and any(u.covers(unit) for u in units) and made.isdisjoint(items_of(unit)):
                    begun[rank].append(unit)
                    made.update(items_of(unit))
            mine = [*begun[ranks.work_rank], *shared(units, cost, ranks.work_size, made)[ranks.work_rank]]
            own: list[UnitResult] = []
            for unit in mine:
                own += [UnitResult(d.unit, d.part.to("cpu"), d.hvps) for d in compute(unit)]
                ranks.check()
            for others in ranks.gather(own)[:: ranks.data_size]:
                before += others
            before = [UnitResult(d.unit, d.part.to(problem.device), d.hvps) for d in before]
            return sorted(before, key=lambda done: done.unit.first_probe)

        return share

    def cost(self, products: Sequence[float], steps: Sequence[float] | None = None) -> Callable[[int, int], float]:
        """Return a function of block and probe: the cost of a recurrence, or of an exact computation (probe -1).

        Args:
            products: cost of one product with each block.
            steps: cost of a Lanczos step of each block without its product; by default counted.
        """
        problem = self._problem

        def cost(number: int, probe: int) -> float:
            dim = problem.dims[number]
            if probe < 0:
                return dim * products[number]
            made = min(self._options.num_steps, dim)
            rows = made / 2 if self._basis[number] != "none" else 0
            return made * (products[number] + (steps[number] if steps else step_cost(problem, number, rows)))

        return cost

    @property
    def units(self) -> list[Unit]:
        """All units that the plan allows."""
        first, exact = self._options.first_probe, tuple(l for l, e in enumerate(self.plan.exact) if e)
        estimated = [Unit(first + start, count, blocks) for start, count, blocks in self.plan.passes]
        return estimated + ([Unit(first, 0, exact)] if exact else [])

    def _rounds(self, found: list[list[Quadrature]]) -> Iterator[list[Unit]]:
        """Yield units until every estimated block has as many probes as it needs, then those of exact blocks.

        The results of the units are added to `found` before the next ones are requested. With a tolerance, a block is
        computed exactly if that takes fewer products than the probes it needs beside the first ones, or if it needs as
        many as the limit.
        """
        options = self._options
        adapts = options.tol is not None and self._first is None
        least = min(adaptive.LEAST_PROBES, options.num_probes) if adapts else options.num_probes
        estimated = [l for l, exact in enumerate(self.plan.exact) if not exact] if self._more_probes else []
        needs = dict.fromkeys(estimated, least)
        may_be_exact = self._may_be_exact() if adapts else self.plan.exact
        while True:
            has = {l: sum(part.num_probes for part in found[l]) for l in needs}
            behind = [l for l in needs if has[l] < needs[l]]
            if not behind:
                break
            start = min(has[l] for l in behind)
            together = {l for l in behind if has[l] == start}
            stop = min(needs[l] for l in together)
            units = []
            for first, count, blocks in self.plan.passes:
                probes = range(max(first, start), min(first + count, stop))
                chosen = tuple(l for l in blocks if l in together)
                if probes and chosen:
                    units.append(Unit(options.first_probe + probes.start, len(probes), chosen))
            yield units
            if options.tol is not None and adapts:
                for l in together:
                    block = Quadrature.concatenate(found[l], 0)
                    (needed,) = adaptive.probes_needed(block, options.tol, options.tol_sigma)
                    needs[l] = min(needed, options.num_probes)
                    more = (needed - least) * float(block.steps.double().mean())
                    too_many = needed >= options.num_probes or more > block.dims[0]
                    if may_be_exact[l] and has[l] == 0 and needed > least and too_many:
                        found[l].clear()
                        del needs[l]
                        exact = [e or k == l for k, e in enumerate(self.plan.exact)]
                        self.plan = dataclasses.replace(self.plan, exact=tuple(exact))
        rest = tuple(l for l, e in enumerate(self.plan.exact) if e and not found[l])
        if rest:
            rows = [sum(part.num_probes for part in parts) for parts in found if parts]
            self._exact_rows = max(rows, default=options.num_probes)
            yield [Unit(options.first_probe, 0, rest)]

    def _may_be_exact(self) -> tuple[bool, ...]:
        """Return which blocks may be computed exactly after their first probes: none if vectors are kept."""
        options = self._options
        if options.keep_vectors:
            return self.plan.exact
        counts = options.num_probes, options.num_steps
        return exact_blocks(self._problem, options.engine, *counts, self.plan.memory_budget)

    def _finish(
        self, unit: Unit, engine: Engine, seed: int, on_hvp: Callable[[], object], state: State | None = None
    ) -> Iterator[UnitResult]:
        """Yield the result of the unit, or those of its parts if memory was too small for it."""
        done = self.records.done(unit)
        if done is not None:
            for _ in range(done.hvps):
                on_hvp()
            yield done
            return
        if not (unit.halves() and (self.records.is_cut(unit) or self._size(unit) >= self._too_large)):
            try:
                with self.records.working():
                    done = self._compute(unit, engine, seed, on_hvp, state)
                    self.records.add(done)
            except torch.OutOfMemoryError as error:
                if self._problem.ranks.data_size > 1:  # all ranks that sum their products would have to split
                    raise torch.OutOfMemoryError(
                        f"spectrum: memory_budget must be below {size_text(self.plan.memory_budget)}, as memory ran "
                        f"out and ranks that share batches cannot cut their work one by one: {error}"
                    ) from None
                if not unit.halves() or state is not None:
                    raise
            if done is not None:
                yield done
                return
            # Outside of the exception handler, whose traceback references the vectors.
            if self._problem.device.type == "cuda":
                torch.cuda.empty_cache()
            self._too_large = min(self._too_large, self._size(unit))
        self.shrunk.append(f"memory ran out: {max(unit.num_probes, 1)} probes of {len(unit.blocks)} blocks were cut")
        for piece in unit.halves():
            yield from self._finish(piece, engine, seed, on_hvp)

    def _compute(
        self, unit: Unit, engine: Engine, seed: int, on_hvp: Callable[[], object], state: State | None
    ) -> UnitResult:
        """Compute a unit, starting from its recorded state if there is one."""
        options, problem, records = self._options, self._problem, self.records
        last, before = records.state(unit)
        last = last or state
        for _ in range(before):
            on_hvp()
        operator = BlockOperator(problem, engine, unit.blocks, on_hvp)
        ids = [self._ids[l] for l in unit.blocks]

        def on_state(state: State) -> None:
            nonlocal last
            last = state
            records.after_step(unit, state, before + operator.hvps)

        if not unit.num_probes:
            exact = exact_quadratures(
                operator, ids, self._exact_rows, options.num_steps, seed, options.distribution, last, on_state
            )
            part, last = Quadrature.concatenate(exact, 1).to(problem.device), None
        else:
            part = blockhess_ext.batched_slq(
                operator, operator.dims, num_probes=unit.num_probes, first_probe=unit.first_probe, block_ids=ids,
                num_steps=options.num_steps, tol=options.tol, sigma=options.tol_sigma, seed=seed,
                distribution=options.distribution, reorthogonalize=[self._basis[l] for l in unit.blocks],
                dtype=problem.dtype, device=problem.device, on_nonfinite="mark", check=False,
                state=last, on_state=on_state,
                cuda_graph=problem.device.type == "cuda" and operator.capturable,
            )  # fmt: skip
        return UnitResult(unit, part, before + operator.hvps, last if records.keep_vectors else None)

    def _size(self, unit: Unit) -> int:
        """Return the number of elements of its vectors, or of the matrices of its exact blocks."""
        dims = [self._problem.dims[l] for l in unit.blocks]
        return unit.num_probes * sum(dims) if unit.num_probes else sum(dim * dim for dim in dims)

    def _check_vectors(self, first: SpectraData, found: list[list[Quadrature]]) -> None:
        """Check that every estimated recurrence of the first run was continued, and copy its exact blocks."""
        for l, part in enumerate(_blocks_of(first)):
            if self.plan.exact[l]:
                found[l] = [dataclasses.replace(part, num_steps=self._options.num_steps).to(self._problem.device)]
            elif sum(p.num_probes for p in found[l]) != part.num_probes:
                raise ValueError(
                    "extend: num_steps needs the vectors after the last step, which keep_vectors=True keeps in memory "
                    f"or in the run directory, got none of block {first.names[l]!r}"
                )

    def _note(self, text: str, which: Sequence[bool]) -> None:
        self.infos = tuple(with_note(info, text) if wanted else info for info, wanted in zip(self.infos, which))

    def make_engine(self) -> Engine:
        """Return the planned engine after checking its products, or another one if "auto" chose one that fails.

        A trace that fails is replaced by autograd, and autograd that lacks a second derivative by differences.
        """
        ranks = self._problem.ranks
        while True:
            failure = lacking = ""
            checked = [l for l in self.plan.checked if self._problem.is_used(l)]
            try:
                engine, self._engine = self._engine or self.plan.make(self._problem), None
                accuracy = measure(self._problem, engine, checked, self.plan.groups, self.plan.largest_group)
            except (NotTraceable, EngineMismatch) as error:
                failure = str(error)
            except NotImplementedError as error:
                if self._options.engine != "auto" or self.plan.engine == "difference":
                    raise
                lacking = str(error).removeprefix("spectrum: ")
            failure, lacking = (next(filter(None, texts), "") for texts in zip(*ranks.gather((failure, lacking))))
            if not failure and not lacking:
                break
            self.plan = self._without_second_derivative(lacking) if lacking else self._without_trace(failure)
        accuracy = ranks.gather(accuracy)[0]
        self.gradient_norms = ranks.gather(self._norms(accuracy))[0]
        release_unused()
        if self.plan.engine == "difference":
            self._warn_of_differences(accuracy)
        self._record(accuracy)
        return engine

    def _without_trace(self, failure: str) -> Plan:
        if self._options.engine == "traced":
            raise NotImplementedError(f"spectrum: engine='traced' cannot be had: {failure}")
        name, why = "ggn" if self.plan.engine == "ggn" else "autograd", f"no trace: {failure}"
        return dataclasses.replace(self.plan, engine=name, traced=False, rows=1, why=why)

    def _without_second_derivative(self, lacking: str) -> Plan:
        return dataclasses.replace(
            self.plan, engine="difference", traced=False, rows=1, retain=False, checked=tuple(range(len(self.infos))),
            why=why_difference(self._problem, lacking),
        )  # fmt: skip

    def _warn_of_differences(self, accuracy: Accuracy) -> None:
        """Warn if differences resolve products of some blocks badly."""
        ratios = {l: error / norm for l, error in accuracy.errors.items() if (norm := accuracy.norms[l])}
        bad = [l for l, ratio in ratios.items() if ratio > LARGEST_ERROR and not accuracy.is_zero(l)]
        if bad:
            worst = max(bad, key=lambda l: ratios[l])
            warnings.warn(
                f"spectrum: differences of gradients have relative errors above {LARGEST_ERROR} in {len(bad)} of "
                f"{len(self.infos)} blocks, the largest {ratios[worst]:.2g} in {self.infos[worst].name!r}"
                + less_error(self._problem),
                stacklevel=2,
            )

    def _record(self, accuracy: Accuracy) -> None:
        """Record the errors of products, and the blocks whose derivatives are confirmed."""
        self._confirmed |= accuracy.confirmed
        self._undecided = (self._undecided | accuracy.undecided) - self._confirmed
        self._left_open |= accuracy.left_open
        self._is_defined &= accuracy.is_defined
        self._largest_product = max(self._largest_product, *accuracy.norms.values(), 0.0)
        if accuracy.unknown and self.hvp_error is None:
            self.error_unknown = accuracy.unknown
            warnings.warn(
                f"spectrum: errors of products are unknown, so no block is called zero: {accuracy.unknown}",
                stacklevel=2,
            )
            return
        self.hvp_error = (self.hvp_error or {}) | {self.infos[l].name: e for l, e in accuracy.errors.items()}
        for l, error in accuracy.errors.items():
            self._zero_within[l] = self._noise(l, error) if accuracy.is_zero(l) else None

    def _check_size(self, radii: Sequence[float]) -> None:
        """Refuse a Hessian whose products all are subnormal, or so small that they vanish.

        Where they vanish from differences too, the gradient and the loss tell whether the loss is as small.
        """
        dtype = self._problem.dtype
        least = least_size(self._problem.dims, dtype)
        size = max(self._largest_product, *radii)
        if 0 < (size or max(self.gradient_norms.values(), default=0.0) or abs(self._problem.loss_value)) < least:
            raise ValueError(
                f"spectrum: products must have size {least:.2g} at least in {dtype}, got {size:.2g}, whose elements "
                "are subnormal or 0 and lack digits; multiply the loss by a constant"
                + ("" if dtype == torch.float64 else ", or pass dtype=torch.float64")
            )

    def _check_again(self, engine: Engine, radii: Sequence[float], sizes: Sequence[float]) -> None:
        """Check blocks that may be zero, or whose derivatives are in doubt, if they were not checked, flattest first.

        Args:
            radii: largest |eigenvalue| found in every block.
            sizes: root mean square of its eigenvalues, the expected size of a product with a unit vector.
        """
        largest = max((r for r in radii if math.isfinite(r)), default=0.0)
        doubtful = {l for l, error in self._left_open.items() if not error <= RESOLUTION * sizes[l]}
        flat = [l for l, r in enumerate(radii) if (r <= FLAT * largest or l in doubtful) and l not in self.plan.checked]
        flat = sorted((l for l in flat if self._problem.is_used(l)), key=lambda l: radii[l])
        self._confirmed -= doubtful
        self._undecided |= doubtful
        count = most_checked(self.hvps, self.plan.groups, len(self.plan.checked))
        if flat and self.hvp_error is not None:
            chosen = flat[:count]
            if isinstance(engine, TracedEngine):  # also the block that shows how large rounding errors may be
                chosen = list(dict.fromkeys([*chosen, max(range(len(radii)), key=lambda l: radii[l] == largest)]))
            try:
                found = measure(self._problem, engine, chosen, 0, self.plan.largest_group)
            except EngineMismatch as error:
                raise EngineMismatch(f"spectrum: {error}; pass engine='autograd'") from error
            self._record(self._problem.ranks.gather(found)[0])
        self._warn_of_undecided()

    def _warn_of_undecided(self) -> None:
        """Warn if blocks are undecided, and there is a reason to doubt their derivatives."""
        causes = suspects(self._problem, self._undecided) if self._undecided else []
        if causes or not self._is_defined:
            names = ", ".join(repr(self.infos[l].name) for l in sorted(self._undecided)[:3])
            why = f"kinks or rounding hide whether {' or '.join(causes)} has the right derivatives"
            warnings.warn(
                f"spectrum: products of {len(self._undecided)} of {len(self.infos)} blocks are not confirmed by "
                f"differences, such as {names}: "
                + (why if self._is_defined else "the loss cannot be computed beside the parameters"),
                stacklevel=2,
            )

    def _noise(self, number: int, error: float) -> float:
        """Return the largest eigenvalue that rounding gives a block that is zero in all batches, as in the first."""
        if self._problem.n_batches == 1:
            return math.inf
        # A random unit vector v has |E v| of about |E|_F / sqrt(dim).
        shares = 1 if self._problem.loss.averaged else self._problem.n_batches
        return float(10 * error * self._problem.dims[number] ** 0.5 * shares)


def _slices(block: Block) -> list[list[str | int]]:
    """Return (parameter, start, stop, dim) of the slices in a block."""
    parts = [piece.part for piece in block.pieces if piece.part is not None]
    return [[part.name, part.start, part.stop, part.dim] for part in parts]


def _blocks_of(data: SpectraData) -> list[Quadrature]:
    return [data.quadrature.select_block(l) for l in range(len(data))]
