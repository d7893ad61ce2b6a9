"""The paper's optimizers on quadratics: torch.optim where they coincide, exact contraction, no underflow."""

from __future__ import annotations

import math

import pytest
import torch

from blockhess_paper.theory.descent import blockwise_rate, iterates, optimal_rate, search_rate
from blockhess_paper.theory.proposition1 import example
from blockhess_paper.theory.quadratics import Quadratics, case, make_quadratics

EPS = torch.finfo(torch.float64).eps
STEPS = 40


def points(problems: Quadratics, rates: torch.Tensor, beta2: float | None = None) -> torch.Tensor:
    """w^0 .. w^STEPS, (STEPS + 1, n_trials, L, d, n_rates)."""
    return torch.stack([s.u * torch.exp2(s.exponent) for s in iterates(problems, rates, STEPS, beta2=beta2)])


def torch_points(problems: Quadratics, trial: int, make, prepare=None) -> torch.Tensor:
    """The same by a torch optimizer and autograd, (STEPS + 1, L, d)."""
    w = problems.start[trial].clone().requires_grad_()
    optimizer = make([w])
    found = [w.detach().clone()]
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = 0.5 * (w[:, None] @ problems.hessian[trial] @ w[..., None]).sum()
        loss.backward()
        if step == 0 and prepare is not None:
            prepare(optimizer, w)
        optimizer.step()
        found.append(w.detach().clone())
    return torch.stack(found)


def preset(optimizer, w):
    """RMSprop starts its average at 0, equation (3) at the first squared gradient."""
    optimizer.state[w] = {"step": torch.tensor(0.0), "square_avg": w.grad.square()}


def test_gd_is_torch_sgd():
    problems = case(4, num_trials=2)
    found = points(problems, optimal_rate(problems))
    for trial in range(2):
        rate = optimal_rate(problems)[trial].item()
        expected = torch_points(problems, trial, lambda p, rate=rate: torch.optim.SGD(p, lr=rate))
        torch.testing.assert_close(found[:, trial, ..., 0], expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("beta2", [0.9, 0.999, 1.0])
def test_adam_is_torch_rmsprop_from_the_first_gradient(beta2):
    problems, rates = case(3, num_trials=2), torch.tensor([[1e-3, 1e-2]])
    found = points(problems, rates, beta2)
    for column, rate in enumerate(rates[0].double().tolist()):
        make = lambda p, rate=rate: torch.optim.RMSprop(p, lr=rate, alpha=beta2, eps=0.0)  # noqa: E731
        expected = torch_points(problems, 1, make, preset)
        torch.testing.assert_close(found[:, 1, ..., column], expected, rtol=1e-9, atol=1e-12)
        if beta2 < 1:
            unlike = torch_points(problems, 1, make)
            assert not torch.allclose(found[:, 1, ..., column], unlike, rtol=1e-3)


def test_first_step_is_torch_adam():
    problems, rate = case(3), 0.01
    found = points(problems, torch.tensor([[rate]], dtype=torch.float64), 0.999)[:, 0, ..., 0]
    expected = torch_points(problems, 0, lambda p: torch.optim.Adam(p, lr=rate, betas=(0.0, 0.999), eps=0.0))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(found[5], expected[5], rtol=1e-6)  # bias correction: another weighting


def test_equation_3_has_its_weights():
    """(s^t)^2 = (1 - beta_2) sum_{k=1..t} beta_2^{t-k} (g^k)^2 + beta_2^t (g^0)^2, summed term by term."""
    problems, beta2, rate = case(3), 0.7, 0.01
    w = points(problems, torch.tensor([[rate]], dtype=torch.float64), beta2)[:, 0, ..., 0]
    g = (problems.hessian[0] @ w[..., None])[..., 0]
    for t in (0, 1, 2, 7):
        square = beta2**t * g[0] ** 2
        square = square + (1 - beta2) * sum(beta2 ** (t - k) * g[k] ** 2 for k in range(1, t + 1))
        torch.testing.assert_close(w[t + 1], w[t] - rate * g[t] / square.sqrt(), rtol=1e-10, atol=1e-13)


def test_blockwise_gd_uses_every_blocks_own_rate():
    problems = case(3)
    w = points(problems, blockwise_rate(problems))[:2, 0, ..., 0]
    for block, largest in enumerate((3.0, 101.0, 2000.0)):
        expected = w[0, block] - problems.hessian[0, block] @ w[0, block] / largest
        torch.testing.assert_close(w[1, block], expected, rtol=1e-12, atol=1e-14)


def test_gd_contracts_exactly_in_two_dimensions():
    """At 2 / (mu + L) every iteration takes the loss times rho^2, rho = (kappa - 1) / (kappa + 1)."""
    problems = example(torch.tensor([10.0, 2000.0]))
    losses = torch.stack([step.log_loss()[:, 0] for step in iterates(problems, optimal_rate(problems), 50)])
    rho = (problems.kappa - 1) / (problems.kappa + 1)
    torch.testing.assert_close(losses.diff(dim=0), (2 * rho.log()).expand(50, 2), rtol=0, atol=64 * EPS * 2000)


def test_norms_and_losses_do_not_underflow():
    """GD on kappa = 1.1 reaches 1e-1000, where float64 ends at 1e-323 and squares at 1e-162."""
    problems = example(torch.tensor([1.1], dtype=torch.float64))
    steps = list(iterates(problems, optimal_rate(problems), 760))
    norms = torch.stack([step.log10_gradient_norm()[0, 0] for step in steps])
    rho = 0.1 / 2.1
    expected = norms[0] + torch.arange(761, dtype=torch.float64) * math.log10(rho)
    assert norms[-1] < -1000 and 10 ** norms[-1].item() == 0.0
    torch.testing.assert_close(norms, expected, rtol=1e-9, atol=0)
    assert steps[-1].log_loss().item() / math.log(10) < -2000


def test_diverging_rates_do_not_overflow():
    problems = case(3)
    *_, last = iterates(problems, torch.tensor([[10.0]]), 200)
    assert 800 < last.log10_gradient_norm().item() < math.inf


def test_squared_gradients_of_1e_200_do_not_underflow():
    problems = make_quadratics([[1.0, 2.0]])
    tiny = Quadratics(problems.hessian, problems.eigenvalues, problems.start * 1e-200)
    first = points(problems, torch.tensor([[1e-3]], dtype=torch.float64), 0.9)
    scaled = points(tiny, torch.tensor([[1e-203]], dtype=torch.float64), 0.9)
    torch.testing.assert_close(scaled * 1e200, first, rtol=1e-9, atol=0)


def test_zero_gradient_entries():
    problems = make_quadratics([[1.0]])
    still = Quadratics(problems.hessian, problems.eigenvalues, torch.zeros_like(problems.start))
    *_, last = iterates(still, optimal_rate(still), 3)
    assert last.log10_gradient_norm().item() == -math.inf
    with pytest.raises(ValueError, match="Assumption 1"):
        next(iterates(still, torch.tensor([[0.1]]), 3, beta2=1.0))


def test_search_chooses_by_the_last_norm():
    problems, rates = case(3, num_trials=5), torch.logspace(-3, 1, 9, dtype=torch.float64)
    search = search_rate(problems, rates, 200, beta2=1.0)
    assert bool(search.converged.all())
    for trial in range(5):
        assert search.best[trial].item() == rates[search.final[trial].argmin()].item()
    assert bool((search.final[:, -1] > 0).any())  # the grid has rates that diverge


def test_search_tells_of_grids_without_a_converging_rate():
    search = search_rate(case(3, num_trials=2), torch.tensor([50.0, 100.0]), 50, beta2=1.0)
    assert not search.converged.any() and search.at_edge.all()


@pytest.mark.parametrize(
    ("rates", "beta2"),
    [
        (torch.tensor([0.1]), None),
        (torch.tensor([[-0.1]]), None),
        (torch.tensor([[math.nan]]), None),
        (torch.tensor([[0.1]]), 1.5),
        (torch.tensor([[0.1]]), 0.0),
    ],
)
def test_bad_rates(rates, beta2):
    with pytest.raises(ValueError, match=r"iterates: (rates|beta2)"):
        next(iterates(case(3), rates, 1, beta2=beta2))


def test_bad_grid():
    for rates in ([0.2, 0.1], [], [[0.1]]):
        with pytest.raises(ValueError, match="ascend"):
            search_rate(case(3), torch.tensor(rates), 1, beta2=1.0)
