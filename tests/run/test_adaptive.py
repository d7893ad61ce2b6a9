"""Work by tolerance, and probes added to a finished run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockhess
from blockhess.problem import fingerprint
from blockhess.run.adaptive import missed, probes_needed, statistical_error
from blockhess_ext import Quadrature, batched_slq
from blockhess_ext.early_stopping import change
from tests.helpers.tiny_models import labeled, mlp


def with_eigenvalues(eigenvalues: Tensor, distribution: str, num_probes: int, first_probe: int = 0) -> Quadrature:
    """Quadratures of a diagonal operator with the eigenvalues of few kinds, exact after as many steps."""
    return batched_slq(
        lambda v: v * eigenvalues, [len(eigenvalues)], num_probes=num_probes, first_probe=first_probe,
        num_steps=30, dtype=torch.float64, distribution=distribution, reorthogonalize="full",
    )  # fmt: skip


@pytest.mark.parametrize("sigma", [None, 0.05])
@pytest.mark.parametrize("probes", [1, 4])
def test_the_error_expected_is_the_error_observed(sigma, probes):
    """On average over 60 trials, against the truth; a factor of 1.3 would be seen."""
    eigenvalues = torch.linspace(-1, 3, 20, dtype=torch.float64).repeat_interleave(10)
    truth = (eigenvalues.unique()[None], torch.full((1, 20), 1 / 20, dtype=torch.float64))
    everything = with_eigenvalues(eigenvalues, "gaussian", 60 * probes)
    observed, expected = [], []
    for trial in range(60):
        rows = slice(trial * probes, (trial + 1) * probes)
        nodes, weights = everything.nodes[rows].flatten()[None], everything.weights[rows].flatten()[None] / probes
        observed.append(float(change((nodes, weights), truth, sigma)))
        part = with_eigenvalues(eigenvalues, "gaussian", probes, trial * probes)
        expected.append(float(statistical_error(part, sigma)))
    assert sum(observed) / sum(expected) == pytest.approx(1, abs=0.15)


def test_rademacher_probes_are_not_worse():
    """Two distinct eigenvalues with random eigenvectors, where the bound is nearly reached; none for diagonal ones."""
    eigenvalues = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(50)
    basis = torch.linalg.qr(torch.randn(100, 100, generator=torch.Generator().manual_seed(0)).double())[0]
    matrix = basis * eigenvalues @ basis.T
    q = batched_slq(lambda v: v @ matrix, [100], num_probes=300, dtype=torch.float64, distribution="rademacher")
    share = (q.weights * (q.nodes > 0.5)).sum(-1)
    bound = math.sqrt(2 * 0.25 / 102) * 102 / 100
    assert 0.8 * bound < float((share - 0.5).pow(2).mean().sqrt()) < 1.1 * bound
    diagonal = with_eigenvalues(eigenvalues, "rademacher", 2)
    torch.testing.assert_close(diagonal.weights[..., :2], torch.full((2, 1, 2), 0.5).double())


def test_large_blocks_need_few_probes():
    q = batched_slq(
        lambda v: v * torch.linspace(0, 1, v.shape[1]), [100, 10_000, 400_000], num_probes=2, num_steps=30,
        reorthogonalize="none",
    )  # fmt: skip
    small, middle, large = probes_needed(q, tol=0.02, sigma=None)
    assert 15 < small < 50 and middle == large == 2
    assert probes_needed(q, tol=0.01, sigma=None)[0] == pytest.approx(4 * small, abs=4)
    nothing = batched_slq(lambda v: v * math.nan, [5], num_probes=2, on_nonfinite="mark")
    assert probes_needed(nothing, 0.01, None) == [2] and statistical_error(nothing).item() == math.inf


class Diagonal(nn.Module):
    """Blocks whose Hessians are diagonal matrices: uniform eigenvalues, of a large and of a small block."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.ones(40_000))
        self.small = nn.Parameter(torch.ones(300))

    def forward(self, scale: Tensor) -> Tensor:
        parts = (w @ (torch.linspace(0, 1, len(w)) * w) for w in (self.large, self.small))
        return scale * sum(parts) / 2  # type: ignore[no-any-return]


def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
    return model(batch), 1.0


DATA = torch.tensor(3.0)


def adaptive(**options: Any) -> blockhess.Spectra:
    return blockhess.spectrum(Diagonal(), DATA, loss, **{"engine": "autograd", "num_probes": 40, **options})


def errors(spectra: blockhess.Spectra, sigma: float | None = None) -> list[float]:
    nodes, weights = spectra.merged
    result = []
    for row, dim in enumerate(spectra.dims):
        truth = (3 * torch.linspace(0, 1, dim, dtype=torch.float64)[None], torch.full((1, dim), 1 / dim).double())
        result.append(float(change((nodes[row : row + 1], weights[row : row + 1]), truth, sigma)))
    return result


def probes_of(spectra: blockhess.Spectra) -> list[int]:
    return [int((spectra[name].steps > 0).sum()) for name in spectra.names]


@pytest.mark.parametrize(("tol", "sigma"), [(0.02, None), (0.1, 0.05)])
def test_the_error_asked_for_at_less_work(tol, sigma, tmp_path: Path):
    spectra = adaptive(tol=tol, tol_sigma=sigma)
    assert max(errors(spectra, sigma)) < tol
    large, small = probes_of(spectra)
    assert large == 2 < small < 40 == spectra.provenance["num_probes"]
    steps = [int(spectra[name].steps.max()) for name in spectra.names]
    assert max(steps) < 60
    made = spectra.provenance
    assert made["tol"] == tol and made["tol_sigma"] == sigma
    assert made["hvps"] == int(spectra.quadrature.steps.sum())
    assert made["hvps"] + made["hvps_saved"] == 40 * 100 * 2
    # Everything else takes what is there, and so does a file.
    assert not any(block.note for block in spectra.blocks)
    assert spectra.trace()[1].isfinite().all() and float(spectra.js0()) < 0.2
    assert " 0.." not in spectra.table()
    again = blockhess.load(spectra.save(tmp_path / "adaptive.npz"))
    assert torch.equal(again.quadrature.steps, spectra.quadrature.steps)


def test_what_was_too_little_is_noted():
    few_steps = adaptive(tol=0.01, num_steps=20)
    assert [block.note for block in few_steps.blocks] == ["tolerance not reached"] * 2
    few_probes = adaptive(tol=0.02, num_probes=3)
    assert [block.note for block in few_probes.blocks] == ["", "tolerance not reached"]


def test_steps_that_exhaust_a_krylov_space_were_enough():
    eigenvalues = torch.tensor([1.0, 2.0, 3.0]).repeat(10)
    for num_steps, few in ((2, True), (3, False)):
        q = batched_slq(lambda v: v * eigenvalues, [30], num_probes=2, num_steps=num_steps, reorthogonalize="full")
        assert int(q.steps.min()) == num_steps and missed(q, 0.9, None) == [few]


@pytest.mark.parametrize("sigma", [None, 0.05])
def test_steps_that_settle_at_the_last_one_were_enough(sigma):
    eigenvalues, tol = torch.linspace(0, 1, 40_000), 0.03

    def run(num_steps: int) -> Quadrature:
        return batched_slq(lambda v: v * eigenvalues, [40_000], num_probes=2, num_steps=num_steps, tol=tol, sigma=sigma)

    settled = int(run(100).steps.max())
    assert settled < 100
    for num_steps, few in ((settled, False), (settled - 1, True), (settled - 5, True), (settled + 1, False)):
        q = run(num_steps)
        assert int(q.steps.max()) == min(num_steps, settled) and missed(q, tol, sigma) == [few]
    # Beside a longer block the tables are padded, and the answer is the same.
    long = batched_slq(lambda v: v * eigenvalues[:200], [200], num_probes=2, num_steps=200, reorthogonalize="full")
    beside = Quadrature.concatenate([run(settled), dataclasses.replace(long, num_steps=settled)], 1)
    assert beside.alpha.shape[-1] == 200 and missed(beside, tol, sigma)[0] is False


def test_passes_that_fit_a_budget_give_the_same():
    whole, parts = adaptive(tol=0.03), adaptive(tol=0.03, memory_budget="2 MiB")
    assert len(parts.provenance["plan"]["passes"]) > 1
    assert torch.equal(whole.quadrature.steps, parts.quadrature.steps)
    assert torch.equal(whole.quadrature.nodes, parts.quadrature.nodes)


def test_blocks_that_are_written_out_stand_beside_the_others():
    spectra = adaptive(tol=0.01, engine="auto")
    assert spectra.provenance["plan"]["exact"] == ["small"]
    assert probes_of(spectra) == [2, 2] and int(spectra["small"].steps[0]) == 300
    longer = blockhess.extend(spectra, Diagonal(), DATA, loss, num_probes=4)
    assert probes_of(longer) == [4, 2] and longer.provenance["plan"]["exact"] == ["small"]


@pytest.mark.parametrize("options", [{}, {"tol": 0.03}, {"reorthogonalize": "full", "distribution": "rademacher"}])
def test_an_extended_run_is_a_longer_run(options):
    options = {"num_steps": 20, "seed": 5, **options}
    short = adaptive(**options, num_probes=3)
    longer = blockhess.extend(short, Diagonal(), DATA, loss, num_probes=7)
    at_once = adaptive(**{**options, "tol": None} if "tol" not in options else options, num_probes=7)
    rows = slice(0, min(probes_of(at_once)))
    for name in ("nodes", "weights", "alpha", "beta", "steps"):
        assert torch.equal(getattr(longer.quadrature, name)[rows], getattr(at_once.quadrature, name)[rows])
    assert probes_of(longer) == [7, 7] and probes_of(short) == probes_of(adaptive(**options, num_probes=3))
    made = longer.provenance
    assert made["hvps"] == int(longer.quadrature.steps.sum()) and made["num_probes"] == 7 and made["seed"] == 5
    twice = blockhess.extend(longer, Diagonal(), DATA, loss, num_probes=8, seed=5, num_steps=20)
    assert probes_of(twice) == [8, 8]
    assert torch.equal(twice.quadrature.nodes[:7], longer.quadrature.nodes)
    same = blockhess.extend(twice, Diagonal(), DATA, loss, num_probes=8)
    assert torch.equal(same.quadrature.nodes, twice.quadrature.nodes)
    assert same.provenance["hvps"] == twice.provenance["hvps"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 1}, "seed must be that of the first run, 0, got 1"),
        ({"num_steps": 3}, "num_steps must be at least 4, which spectra has, got 3"),
        ({"tol": 0.1}, "tol must be that of the first run, None, got 0.1"),
        ({"distribution": "rademacher"}, "distribution must be that of the first run, 'gaussian', got 'rademacher'"),
        ({"reorthogonalize": "full"}, "reorthogonalize must be that of the first run, 'auto', got 'full'"),
        ({"batchnorm": "batch"}, "batchnorm must be that of the first run, 'none', got 'batch'"),
        ({"num_probes": 1}, "num_probes must be at least 2, which spectra has, got 1"),
        ({"num_probes": 0}, "num_probes must be an integer at least 1, got 0"),
        ({"loss_fn": nn.MSELoss()}, "loss must be that of the first run, 'CrossEntropyLoss', got"),
        ({"blocks": "full"}, "names of the blocks must be that of the first run"),
        (
            {"blocks": {n: [n] for n in ("0.bias", "0.weight", "2.weight", "2.bias")}},
            "names of the blocks must be that",
        ),
        ({"dtype": torch.float64}, "dtype of the vectors must be that of the first run, 'float32', got 'float64'"),
        ({"model": "other"}, "fingerprint of the model must be that of the first run"),
        (
            {"data": "other"},
            "fingerprint of the data must be that of the first run.*; a loader that shuffles or augments",
        ),
    ],
)
def test_an_extension_of_something_else_is_refused(change, text):
    torch.manual_seed(0)
    model, data = mlp(), labeled(7)
    spectra = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=2, num_steps=4)
    other = {"model": mlp(), "data": labeled(7)}
    given = {"model": model, "data": data, "loss_fn": nn.CrossEntropyLoss(), "num_probes": 3}
    given |= {name: other[name] if value == "other" else value for name, value in change.items()}
    with pytest.raises(ValueError, match=f"extend: {text}"):
        blockhess.extend(spectra, **given)


def test_an_extension_of_hand_made_spectra_or_by_unknown_options_is_refused():
    torch.manual_seed(0)
    model, data = mlp(), labeled(7)
    spectra = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=2, num_steps=4)
    bare = blockhess.Spectra(spectra.blocks, spectra.quadrature, {})
    with pytest.raises(
        ValueError, match="extend: spectra must be computed by this version of spectrum, whose provenance has num_s"
    ):
        blockhess.extend(bare, model, data, nn.CrossEntropyLoss(), num_probes=3)
    with pytest.raises(TypeError, match="extend: arguments must be those of spectrum, got 'steps'"):
        blockhess.extend(spectra, model, data, nn.CrossEntropyLoss(), num_probes=3, steps=4)


def test_another_loss_of_the_same_name_is_refused():
    def twice(model: nn.Module, batch: Tensor) -> tuple[Tensor, float]:
        return 2 * model(batch), 1.0

    twice.__name__, twice.__qualname__ = loss.__name__, loss.__qualname__
    with pytest.raises(ValueError, match="extend: value of the loss must be that of the first run"):
        blockhess.extend(adaptive(num_probes=2, num_steps=2), Diagonal(), DATA, twice, num_probes=3)


def test_fingerprints_tell_every_bit():
    base = {"x": torch.ones(3), "mask": torch.tensor([True, False]), "empty": torch.zeros(0), "none": None, "text": "a"}
    same = [fingerprint.of_data([base]), fingerprint.of_data([{**base, "text": "b"}])]  # tensors are what counts
    others = [
        fingerprint.of_data([{**base, **change}])
        for change in (
            {"x": torch.tensor([1.0, 1.0, 1.0 + 2**-23])},
            {"x": torch.ones(3).half()},
            {"x": torch.ones(3, 1)},
            {"mask": torch.tensor([False, True])},
            {"empty": torch.eye(2).to_sparse()},
        )
    ]
    assert len(set(same)) == 1 and len({*same, *others}) == 6
    assert fingerprint.of_data([torch.arange(6).view(1, 6)[:, 2]]) == fingerprint.of_data([torch.tensor([2])])
    model = mlp()
    before = fingerprint.of_model(model)
    with torch.no_grad():
        model[2].bias[1] += 1e-3
    assert fingerprint.of_model(model) != before


@pytest.mark.parametrize(
    "options", [{"tol": 0.0}, {"tol": 0.1, "tol_sigma": 0.0}, {"tol": 0.1, "tol_sigma": 1.01}, {"tol_sigma": 1}]
)
def test_bad_input(options):
    with pytest.raises(ValueError, match=r"spectrum: (tol|tol_sigma) must be "):
        adaptive(**options)


def test_one_step_gives_the_frobenius_norm_of_many():
    """|H v|^2 = alpha_0^2 + beta_0^2, which two steps integrate exactly and one alone does not."""
    one, two = (adaptive(num_probes=3, num_steps=steps) for steps in (1, 2))
    for of_one, of_two in zip(one.frobenius_norm(), two.frobenius_norm()):
        torch.testing.assert_close(of_one, of_two, rtol=1e-6, atol=0)
    assert float(one.quadrature.integrate(torch.square)[0][0]) < 0.8 * float(two.frobenius_norm()[0][0]) ** 2
