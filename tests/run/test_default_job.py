"""`spectrum` without counts: the error it promises at the products it needs, and counts that are used as given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockhess
from blockhess.run.status import partial, status
from blockhess.run.storage import checkpoint, directory
from blockhess_ext.early_stopping import change
from tests.crash.scenarios import same_bits
from tests.helpers.dense_hessian import dense_hessian
from tests.run.test_adaptive import DATA, Diagonal, loss
from tests.run.test_job import Stop, after

LOSS = nn.CrossEntropyLoss()
SEEDS = range(5)


def network(inputs: int, width: int, samples: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A network whose first block is too large to be computed exactly, and its data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 5)).double()
    return model, (torch.randn(samples, inputs, dtype=torch.float64), torch.randint(5, (samples,)))


def default(*given: Any, **options: Any) -> blockhess.Spectra:
    return blockhess.spectrum(*given, progress=False, **options)


@pytest.fixture(scope="module", params=[(25, 42, 64), (8, 130, 16)])
def known(request) -> tuple[nn.Module, Any, dict[str, Tensor]]:
    model, (x, y) = network(*request.param)
    eigenvalues = {
        name: torch.linalg.eigvalsh(dense_hessian(model, lambda f: LOSS(f(x), y), [name]))
        for name, _ in model.named_parameters()
    }
    return model, (x, y), eigenvalues


def test_the_errors_are_those_promised(known):
    """Of the distribution function 1 % of the range, which one in twenty may exceed; of the ends 1 % of the radius."""
    model, data, eigenvalues = known
    distances, ends = [], []
    for seed in SEEDS:
        spectra = default(model, data, LOSS, seed=seed)
        made = spectra.provenance
        assert made["tol"] == 0.01 and made["hvps"] < 0.25 * 10 * sum(min(100, d) for d in spectra.dims)
        assert "0.weight" not in made["plan"]["exact"] and not any(block.note for block in spectra.blocks)
        nodes, weights = spectra.merged
        for row, truth in enumerate(eigenvalues.values()):
            rule = truth[None], torch.full((1, len(truth)), 1 / len(truth), dtype=torch.float64)
            distances.append(float(change((nodes[row : row + 1], weights[row : row + 1]), rule)))
            found = torch.stack(nodes[row].aminmax())
            ends.append(float((found - torch.stack(truth.aminmax())).abs().max() / truth.abs().max()))
    assert sum(distance > 0.01 for distance in distances) <= 0.05 * len(distances)
    assert max(distances) < 0.015 and max(ends) < 0.01


def test_a_tolerance_that_is_larger_errs_more(known):
    """Negative control of the test before."""
    model, data, eigenvalues = known
    nodes, weights = (values[:1] for values in default(model, data, LOSS, tol=0.1).merged)
    truth = eigenvalues["0.weight"]
    assert float(change((nodes, weights), (truth[None], torch.full_like(truth, 1 / len(truth))[None]))) > 0.015


@pytest.mark.parametrize(
    ("given", "counts"),
    [({"num_steps": 10}, (10, 10)), ({"num_probes": 3}, (3, 100)), ({"num_probes": 2, "num_steps": 7}, (2, 7))],
)
def test_counts_that_are_given_are_used_as_they_are(given, counts):
    spectra = default(Diagonal(), DATA, loss, engine="autograd", **given)
    made = spectra.provenance
    assert (made["num_probes"], made["num_steps"], made["tol"]) == (*counts, None)
    assert made["hvps"] == 2 * counts[0] * counts[1] and (spectra.quadrature.steps == counts[1]).all()
    assert len(spectra.quadrature.nodes) == counts[0]
    planned = blockhess.plan(Diagonal(), DATA, loss, engine="autograd", **given)
    assert planned.hvps == planned.least_hvps == planned.expected_hvps == made["hvps"]


def test_a_default_job_is_that_of_a_tolerance_of_1_percent():
    spectra, same = default(Diagonal(), DATA, loss), default(Diagonal(), DATA, loss, tol=0.01)
    assert same_bits(spectra, same) and same_bits(spectra, default(Diagonal(), DATA, loss))
    made = spectra.provenance
    assert (made["num_probes"], made["num_steps"], made["tol"]) == (10, 100, 0.01)
    planned = blockhess.plan(Diagonal(), DATA, loss)
    assert (
        planned.least_hvps < planned.expected_hvps < planned.hvps and planned.least_hvps < made["hvps"] < planned.hvps
    )
    assert "at most" in str(planned) and str(planned.expected_hvps) in str(planned)
    with pytest.raises(ValueError, match="spectrum: tol must be given with tol_sigma"):
        default(Diagonal(), DATA, loss, tol_sigma=0.05)


def test_blocks_that_need_many_probes_are_computed_exactly():
    """Uniform eigenvalues of a block of 300 need 26 probes."""
    spectra = default(Diagonal(), DATA, loss)
    made = spectra.provenance
    tried = default(Diagonal(), DATA, loss, engine="autograd", num_probes=2, tol=0.01).quadrature.steps
    assert made["plan"]["exact"] == ["small"] and made["hvps"] == int(tried.sum()) + 300
    assert [block.note for block in spectra.blocks] == ["", ""]
    truth = 3 * torch.linspace(0, 1, 300, dtype=torch.float64)
    torch.testing.assert_close(spectra["small"].nodes[0], truth, rtol=0, atol=1e-5)  # eps of float32 x dim
    assert default(Diagonal(), DATA, loss, keep_vectors=True).provenance["plan"]["exact"] == ["small"]
    without = default(Diagonal(), DATA, loss, engine="autograd")
    assert [block.note for block in without.blocks] == ["", "tolerance not reached"]
    assert without.provenance["hvps"] <= blockhess.plan(Diagonal(), DATA, loss, engine="autograd").hvps


@pytest.mark.parametrize("count", [3, 20, 100])
def test_an_interrupted_default_job_goes_on_with_the_same_bits(count, tmp_path: Path, monkeypatch):
    """Also after the switch from probes to exact, whose unit saves the last states."""
    monkeypatch.setattr(checkpoint, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", float("inf"))
    expected = default(Diagonal(), DATA, loss)

    def stop() -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        after(patch, count, stop)
        default(Diagonal(), DATA, loss, run_dir=tmp_path)
    so_far = partial(tmp_path)
    assert so_far.names == expected.names and bool((so_far.quadrature.steps > 0).all())
    assert so_far.provenance["hvps"] <= status(tmp_path).most
    resumed = default(Diagonal(), DATA, loss, run_dir=tmp_path)
    assert same_bits(resumed, expected) and resumed.provenance["hvps"] == expected.provenance["hvps"]
    assert same_bits(default(Diagonal(), DATA, loss, run_dir=tmp_path), expected)
    assert partial(tmp_path).names == expected.names


def test_what_is_saved_of_a_run_has_one_result_per_block(tmp_path: Path, monkeypatch):
    """Of a run that ends between its last unit and its result: the first probes, and the exact spectrum."""

    def stop(*_: Any) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(directory.RunDirectory, "finish", stop)
        default(Diagonal(), DATA, loss, run_dir=tmp_path)
    saved, expected = partial(tmp_path).quadrature, default(Diagonal(), DATA, loss).quadrature
    assert saved.reorthogonalize == expected.reorthogonalize and torch.equal(saved.nodes, expected.nodes)


def test_of_runs_that_computed_a_block_exactly_or_not_the_exact_spectrum_is_merged():
    def of_probes(first: int, **options: Any) -> blockhess.Spectra:
        return default(Diagonal(), DATA, loss, tol=0.01, num_probes=4, first_probe=first, **options)

    exact, estimated = of_probes(0), of_probes(4, engine="autograd")
    for runs in ((exact, estimated), (of_probes(4), of_probes(0, engine="autograd"))):
        merged = blockhess.merge(runs)
        assert merged.provenance["plan"]["exact"] == ["small"] and merged.quadrature.reorthogonalize[1] == "exact"
        assert torch.equal(merged["small"].nodes[0], exact["small"].nodes[0])
        assert int((merged["large"].steps > 0).sum()) == 4 and merged["small"].trace_stderr == 0
