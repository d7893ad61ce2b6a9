"""What is right for a random problem: its dense Hessian by differences of the gradient of its plain twin, or a refusal.

The gradient of the twin is compared with differences of the loss first.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import blockhess
from blockhess.problem.blocks import ZERO_NOTE
from tests.random_problems.problem import Problem, build

STEP = 1e-5
# Relative to the size of a block: errors of rounding in the precision of the computation.
TOLERANCES = {torch.float32: 2e-3, torch.float64: 1e-5}
# A known limit: where the loss is another function in float64, of which spectrum warns, float32 differences miss faults
# of this size.
MISSED_IN_FLOAT32 = 5e-2
# Size below which a block is small beside the largest one, of which its rounding errors are a part.
FLOOR = 1e-4


class OracleError(Exception):
    """The truth itself is in doubt: this is a fault of the test."""


class Kink(Exception):
    """The loss has a kink within the step of the differences."""


@dataclass(frozen=True)
class Truth:
    """The loss of the plain twin and its derivatives, over all entries of its trainable parameters.

    Attributes:
        places: parameter -> the indices of its entries, in its shape.
    """

    loss: float
    gradient: Tensor
    hessian: Tensor
    places: dict[str, Tensor]

    def block(self, indices: Tensor) -> Tensor:
        """Eigenvalues of a block."""
        return torch.linalg.eigvalsh(self.hessian[indices][:, indices])


def fix(model: nn.Module, policy: str, forward: Callable[[], object]) -> None:
    """Set the mode of all modules as `spectrum` documents it."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in model.modules():
        module.training = False
    if policy == "batch" or policy == "frozen_batch_stats":
        for norm in norms:
            norm.training = True
    if policy == "frozen_batch_stats":
        for norm in norms:
            norm.momentum = None
            norm.reset_running_stats()
        forward()
        for norm in norms:
            norm.training = False


def twin_of(problem: Problem) -> Problem:
    """Return the plain twin of a problem, with its parameters, buffers and modes of computation."""
    twin = build(problem.seed, plain=True, forced=problem.forced)
    assert twin.kinds == problem.kinds, "the twins differ"
    for own, other in zip((twin.inner, *twin.held), (problem.inner, *problem.held)):
        own.load_state_dict(other.state_dict())
    for function in twin.before:
        function()
    return twin


def truth(twin: Problem) -> Truth:
    """Return the derivatives of the loss of a plain problem.

    Raises:
        Kink: of the loss.
        OracleError: the gradient is not that of the loss.
    """
    fix(twin.inner, twin.options.get("batchnorm", "eval"), lambda: twin.total(twin.inner))
    named = {name: p for name, p in twin.inner.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]
    indices = torch.arange(sum(sizes)).split(sizes)
    places = {name: i.view(p.shape) for (name, p), i in zip(named.items(), indices)}

    def loss() -> Tensor:
        return twin.total(twin.inner)

    def gradient() -> Tensor:
        found = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
        return torch.cat([torch.zeros(n) if g is None else g.to_dense().flatten() for g, n in zip(found, sizes)])

    value, slope = loss(), gradient()
    if not value.isfinite() or not slope.isfinite().all():
        raise Kink("the loss is not finite")
    rows = []
    for name, p in named.items():
        _check_gradient(loss, p, slope[places[name]], value)
        flat = p.data.view(-1)
        for i in range(len(flat)):
            rows.append(_difference(gradient, flat, i))
    hessian = torch.stack(rows)
    scale = float(hessian.abs().max()) + float(slope.abs().max()) + 1e-9
    if float((hessian - hessian.mT).abs().max()) > 1e-6 * scale:
        raise Kink(f"the Hessian is not symmetric: {float((hessian - hessian.mT).abs().max()) / scale:.1e}")
    return Truth(float(value), slope, (hessian + hessian.mT) / 2, places)


def _difference(of: Callable[[], Tensor], flat: Tensor, i: int) -> Tensor:
    kept = float(flat[i])
    flat[i] = kept + STEP
    up = of()
    flat[i] = kept - STEP
    down = of()
    flat[i] = kept
    return (up - down) / (2 * STEP)


@torch.no_grad()
def _check_gradient(loss: Callable[[], Tensor], p: Tensor, gradient: Tensor, value: Tensor) -> None:
    direction = torch.linspace(0.5, 1.5, p.numel(), dtype=torch.float64).view(p.shape)
    kept, slopes = p.data, []
    for step in (STEP, STEP / 2):
        ends = []
        for sign in (1, -1):
            p.data = kept + sign * step * direction
            ends.append(float(_under_grad(loss)))
        slopes.append((ends[0] - ends[1]) / (2 * step))
    p.data = kept
    expected = float((gradient * direction).sum())
    noise = 1e-6 * (float(gradient.abs().sum()) + abs(float(value)) + 1e-3)
    if abs(slopes[0] - slopes[1]) > noise:
        raise Kink("the loss has a kink")
    if abs(slopes[0] - expected) > noise:
        raise OracleError(f"the gradient is {expected:.9g}, by differences of the loss {slopes[0]:.9g}")


@torch.enable_grad()
def _under_grad(loss: Callable[[], Tensor]) -> Tensor:
    return loss().detach()


def expected_blocks(problem: Problem, places: dict[str, Tensor]) -> dict[str, Tensor]:
    """Block -> the indices of its entries."""
    spec = problem.options["blocks"]
    flat = {name: place.flatten() for name, place in places.items()}
    if spec == "parameter":
        return flat
    if spec == "full":
        return {"full": torch.cat(list(flat.values()))}
    if isinstance(spec, list):
        groups: dict[str, list[Tensor]] = {}
        for name, place in flat.items():
            number = next((part for part in name.split(".")[:-1] if part.isdigit()), None)
            groups.setdefault("others" if number is None else f"part {number}", []).append(place)
        return {name: torch.cat(parts) for name, parts in groups.items()}
    made = {}
    for block, selection in spec.items():
        parts = selection if isinstance(selection, list) else [selection]
        made[block] = torch.cat(
            [flat[s] if isinstance(s, str) else places[s.name][s.start : s.stop].flatten() for s in parts]
        )
    return made


def snapshot(problem: Problem) -> dict[str, Any]:
    """What must be the same after the call, to the bit."""
    found: dict[str, Any] = {}
    modules = [("", problem.model), *((f"held {i}", m) for i, m in enumerate(problem.held))]
    for label, root in modules:
        for name, module in root.named_modules():
            place = f"{label}{name or 'the model'}"
            for key, value in vars(module).items():
                if key in ("_parameters", "_buffers"):
                    for each, tensor in value.items():
                        found[f"{place}.{each}"] = kept(tensor, identity=True)
                elif isinstance(value, Tensor | bool | int | float | str | None):
                    found[f"{place}.{key}"] = kept(value, identity=False)
                elif key.endswith("_hooks"):
                    found[f"{place}.{key}"] = list(value)
    for name, p in problem.model.named_parameters():
        found[f"{name}.grad"] = kept(p.grad, identity=True)
        found[f"{name}'s hooks"] = list(p._backward_hooks or ())
    backends: Any = torch.backends
    return found | {
        "default dtype": torch.get_default_dtype(),
        "torch's random numbers": kept(torch.get_rng_state(), identity=False),
        "random's state": random.getstate(),
        "NumPy's random numbers": str(np.random.get_state()),  # noqa: NPY002
        "gradients enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "switches": (
            backends.mha.get_fastpath_enabled(), backends.cudnn.enabled, backends.mkldnn.enabled,
            backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(), torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(),
        ),
    }  # fmt: skip


def kept(value: Any, identity: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    bits = value.detach().contiguous().flatten().view(torch.uint8).tolist() if value.numel() else []
    own = (id(value), value.data_ptr()) if identity else ()
    return value.dtype, tuple(value.shape), value.requires_grad, bits, own


@contextmanager
def surroundings(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        if name == "no_grad":
            stack.enter_context(torch.no_grad())
        elif name == "inference_mode":
            stack.enter_context(torch.inference_mode())
        elif name == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        elif name == "float64 by default":
            torch.set_default_dtype(torch.float64)
            stack.callback(torch.set_default_dtype, torch.float32)
        yield


@dataclass(frozen=True)
class Verdict:
    """Whether an outcome is right.

    Attributes:
        outcome: "right", "refused", "warned" (of weights that were guessed) or "kink", or what is wrong.
        text: details.
    """

    outcome: str
    text: str = ""

    @property
    def good(self) -> bool:
        return self.outcome in ("right", "refused", "warned", "kink")


def judge(
    seed: int, forced: frozenset[str] = frozenset(), compute: Callable[..., Any] = blockhess.spectrum
) -> tuple[Problem, Verdict]:
    """Build the problem of a seed, compute its spectra, and say whether they are right."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = build(seed, forced=forced)
        try:
            right = truth(twin_of(problem))
        except Kink as error:
            return problem, Verdict("kink", str(error))
        before = None
        with surroundings(problem.surroundings), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            before = snapshot(problem)
            try:
                found = compute(problem.model, problem.data, problem.loss_fn, **problem.options)
            except Exception as error:
                found = error
            after = snapshot(problem)
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    if isinstance(found, Exception):
        verdict = of_error(problem, right, found)
    else:
        verdict = of_spectra(problem, right, found, [str(w.message) for w in caught])
    if verdict.good and changed:
        verdict = Verdict("model changed", ", ".join(sorted(changed)[:5]))
    return problem, verdict


def of_error(problem: Problem, right: Truth, error: Exception) -> Verdict:
    text = f"{type(error).__name__}: {error}"
    if not str(error).startswith("spectrum:"):
        return Verdict("not in the package's words", text)
    if "\n" in str(error):
        return Verdict("more than one line", text)
    if problem.refusals:
        return Verdict("refused", text)
    if problem.options["engine"] == "traced" and "engine='traced' cannot be had" in str(error):
        return Verdict("refused", text)
    own = torch.cat(list(expected_blocks(problem, right.places).values()))
    if not right.gradient[own].any() and "depend" in str(error):
        return Verdict("refused", text)
    return Verdict("refused without a reason", text)


def of_spectra(problem: Problem, right: Truth, spectra: Any, messages: list[str]) -> Verdict:
    blocks = expected_blocks(problem, right.places)
    if set(spectra.names) != set(blocks):
        return Verdict("wrong blocks", f"{sorted(spectra.names)}, not {sorted(blocks)}")
    if "sizes of batches unknown" in problem.kinds and any("weight" in message for message in messages):
        return Verdict("warned", messages[0])
    tolerance = TOLERANCES[problem.compute]
    if "float32 inside the model" in problem.kinds:
        tolerance = TOLERANCES[torch.float32]
    if problem.refusals and problem.compute == torch.float32 and spectra.provenance["hvp_error_unknown"]:
        tolerance = MISSED_IN_FLOAT32
    if not math.isclose(spectra.provenance["loss_value"], right.loss, rel_tol=tolerance, abs_tol=tolerance):
        return Verdict("wrong loss", f"{spectra.provenance['loss_value']:.9g}, not {right.loss:.9g}")
    eigenvalues = {name: right.block(indices) for name, indices in blocks.items()}
    scale = max(float(right.hessian.abs().max()), float(right.gradient.abs().max()))
    q = spectra.quadrature
    for l, block in enumerate(spectra.blocks):
        values = eigenvalues[block.name]
        largest = float(values.abs().max())
        size = max(largest, FLOOR * scale)
        if block.note.startswith(ZERO_NOTE) and largest > FLOOR * scale:
            return Verdict("called zero", f"{block.name}: {largest:.3g} beside {scale:.3g}")
        error = 0.0
        for probe in range(q.num_probes):
            steps = int(q.steps[probe, l])
            if steps == 0:
                return Verdict("wrong number", f"{block.name}: no nodes")
            nodes, weights = q.nodes[probe, l, :steps], q.weights[probe, l, :steps]
            error = max(error, distance(nodes, weights, values, exact=q.reorthogonalize[l] == "exact"))
        if not error <= tolerance * size:
            text = f"{block.name}: error {error / size:.1e} of {size:.3g}; note {block.note!r}"
            checked = [spectra.blocks[i].name for i in spectra.provenance["plan"]["checked"]]
            unchecked = "" if block.name in checked else ", not checked"
            return Verdict(f"wrong number{unchecked}", f"{text}; nodes {nodes.tolist()}, not {values.tolist()}")
    return Verdict("right")


def distance(nodes: Tensor, weights: Tensor, eigenvalues: Tensor, exact: bool) -> float:
    """Distance of a quadrature from the spectrum of a block.

    All steps have been made, so every node is an eigenvalue, and the extreme ones are found. Of one computed exactly,
    the Wasserstein-1 distance of the distributions too.
    """
    between = (nodes[:, None] - eigenvalues).abs()
    found = max(float(between.min(1).values.max()), float((nodes.min() - eigenvalues.min()).abs()))
    found = max(found, float((nodes.max() - eigenvalues.max()).abs()))
    if exact:
        points = torch.cat([nodes, eigenvalues])
        masses = torch.cat([weights / weights.sum(), torch.full_like(eigenvalues, -1 / len(eigenvalues))])
        points, order = points.sort()
        found = max(found, float((masses[order].cumsum(0)[:-1].abs() * points.diff()).sum()))
    return found
