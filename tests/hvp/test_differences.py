"""Wrong derivatives are refused by name, and their sound neighbors are not."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import blockhess
from blockhess.hvp import AutogradEngine, GaussNewtonEngine, differences
from blockhess.hvp.accuracy import measure
from blockhess.hvp.differences import DerivativeMismatch
from blockhess.problem.prepare import prepared_problem
from tests.helpers.dense_hessian import problem
from tests.helpers.model_zoo import ZOO
from tests.helpers.tiny_models import labeled, mlp

# A model, data and a loss.
Given = tuple[nn.Module, Any, Any]


class CrossEntropy(torch.autograd.Function):
    """Cross-entropy with the derivative of its backward left to autograd."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(logits, y)
        return F.cross_entropy(logits, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        logits, y = ctx.saved_tensors
        return g * (logits.softmax(1) - F.one_hot(y, logits.shape[1])) / len(y), None


class FusedCrossEntropy(CrossEntropy):
    """Computes its gradient in forward, so that its backward takes it for a constant."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward((logits.softmax(1) - F.one_hot(y, logits.shape[1])) / len(y))
        return F.cross_entropy(logits, y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.saved_tensors[0], None


def with_function(function: Any) -> Given:
    return mlp(), labeled(7), lambda m, b: function.apply(m(b[0]), b[1])


class Solve(torch.autograd.Function):
    """The fixed point z = tanh(x + z w), whose backward solves the adjoint equation without a graph."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, x: Tensor) -> Tensor:
        z = iterate(w, x)
        ctx.save_for_backward(w, x, z)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            w, x, z = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            f = torch.tanh(x + z @ w)
            u = g = g.detach()
            for _ in range(60):
                u = g + torch.autograd.grad(f, z, u, retain_graph=True)[0]
            return torch.autograd.grad(f, (w, x), u)


def iterate(w: Tensor, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(60):
        z = torch.tanh(x + z @ w)
    return z


class Equilibrium(nn.Module):
    def __init__(self, solve: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.head, self.solve = nn.Parameter(0.3 * torch.randn(3, 3)), nn.Linear(3, 3), solve

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.solve(self.w, x))


def equilibrium(solve: Callable[[Tensor, Tensor], Tensor]) -> Given:
    return Equilibrium(solve), labeled(6), nn.CrossEntropyLoss()


def with_hook(hook: Callable[[Tensor], Any]) -> Given:
    model = mlp()
    model[0].weight.register_hook(hook)  # type: ignore[no-untyped-call]
    return model, labeled(7), nn.CrossEntropyLoss()


def masked(g: Tensor) -> Tensor:
    return g * torch.tensor([[1.0], [0], [1], [0]], dtype=g.dtype)


def with_module_hook(hook: Callable[..., Any]) -> Given:
    model = mlp()
    model[2].register_full_backward_hook(hook)
    return model, labeled(7), nn.CrossEntropyLoss()


class ByTensor(nn.Module):
    """Between two layers, something is done to the activations."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.change = nn.Linear(3, 4), nn.Linear(4, 3), change

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.change(torch.tanh(self.a(x))))


def between(change: Callable[[Tensor], Tensor]) -> Given:
    return ByTensor(change), labeled(7), nn.CrossEntropyLoss()


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Copy(Reversal):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clone()


def hooked(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = 1 * x
        x.register_hook(hook)  # type: ignore[no-untyped-call]
        return x

    return change


def rounded(x: Tensor) -> Tensor:
    """Quantize, with the derivative of the identity (straight-through estimator)."""
    return x + ((8 * x).round() / 8 - x).detach()


def normalized_in_place(x: Tensor) -> Tensor:
    x = 1 * x
    x.data.div_(x.data.norm(dim=1, keepdim=True))
    return x


class Sign(nn.Module):
    """A parametrization: binary weights, with a straight-through estimator."""

    def forward(self, w: Tensor) -> Tensor:
        return w + (w.sign() * w.abs().mean() - w).detach()


class Orthant(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return F.softplus(w)


def parametrized(make: Callable[[nn.Module], object]) -> Given:
    model = mlp()
    make(model[0])
    return model, labeled(7), nn.CrossEntropyLoss()


@torch.library.custom_op("blockhess_test::sine_of", mutates_args=())
def sine_of(x: Tensor) -> Tensor:
    return torch.sin(x)


sine_of.register_autograd(
    lambda ctx, g: g * ctx.slope,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "slope", inputs[0].detach().cos()),
)


def fake_quantized(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).to(x.dtype)


WRONG: dict[str, tuple[Callable[[], Given], str]] = {
    "fused cross-entropy": (lambda: with_function(FusedCrossEntropy), "products of .*FusedCrossEntropy"),
    "adjoint solver": (lambda: equilibrium(Solve.apply), "block 'w' are not .*autograd.Function Solve"),
    "mask": (lambda: with_hook(masked), "the gradient of block '0.weight' is not .*hook on '0.weight'"),
    "clipping": (lambda: with_hook(lambda g: g.clamp(-0.01, 0.01)), "the gradient of block '0.weight'"),
    "module hook": (lambda: with_module_hook(lambda m, gi, go: (2 * gi[0],)), r"backward hook on '2' \(Linear\)"),
    "hook on an activation": (lambda: between(hooked(lambda g: 2 * g)), "the gradient of block 'a.weight'"),
    "straight-through estimator": (
        lambda: between(rounded),
        r"the gradient of block '\w.weight' .* detach\(\).* strai",
    ),
    "fake quantization": (
        lambda: between(fake_quantized),
        r"the gradient of block '\w.weight' .*may be fake quantization",
    ),
    "custom operator": (
        lambda: between(sine_of),
        r"products of .* the custom operator blockhess_test::sine_of; remove",
    ),
    "gradient reversal": (lambda: between(Reversal.apply), "'a.weight' is not that of the loss.*Reversal"),
    "detached factor": (lambda: between(lambda x: x / x.norm().detach()), "the gradient of block 'a.weight'"),
    "norm in place": (lambda: between(normalized_in_place), "the gradient of block 'a.weight'"),
    "binary weights": (
        lambda: parametrized(lambda m: parametrize.register_parametrization(m, "weight", Sign(), unsafe=True)),
        "the gradient of block '0.parametrizations.weight.original'",
    ),
}

SOUND: dict[str, Callable[[], Given]] = {
    "cross-entropy": lambda: with_function(CrossEntropy),
    "unrolled solver": lambda: equilibrium(iterate),
    "looking": lambda: with_hook(lambda g: print(end=str(g.norm())[:0])),
    "looking at a module": lambda: with_module_hook(lambda m, gi, go: None),
    "looking at an activation": lambda: between(hooked(lambda g: None)),
    "function that copies": lambda: between(Copy.apply),
    "factor": lambda: between(lambda x: x / x.norm()),
    "detached maximum": lambda: between(lambda x: (x - x.max().detach()).exp() / (x - x.max().detach()).exp().sum()),
    "positive weights": lambda: parametrized(
        lambda m: parametrize.register_parametrization(m, "weight", Orthant(), unsafe=True)
    ),
    "spectral norm": lambda: parametrized(parametrizations.spectral_norm),
    "orthogonal": lambda: parametrized(lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley")),
}


def checked(given: Given, batchnorm: str = "eval", engine: Any = AutogradEngine, **options: Any) -> Any:
    """The accuracy, with the names of the blocks that were confirmed and of all."""
    arguments = {"blocks": "parameter", "dtype": None, "memory_budget": None, "matmul_precision": "highest"} | options
    with prepared_problem(*given, batchnorm=batchnorm, **arguments) as (made, *_):
        accuracy = measure(made, engine(made))
        used = {l for l in range(len(made.dims)) if made.is_used(l)}
        return accuracy, {made.infos[l].name for l in used - accuracy.confirmed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_derivatives_are_refused(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, text = WRONG[name]
    model, data, loss_fn = make()
    with pytest.raises(DerivativeMismatch, match=f"^spectrum: .*{text}"):
        checked((model.to(dtype), tuple(t.to(dtype) if t.is_floating_point() else t for t in data), loss_fn))


@pytest.mark.parametrize("name", SOUND)
def test_their_neighbors_are_not(name: str) -> None:
    torch.manual_seed(0)
    accuracy, open_ = checked(SOUND[name]())
    assert not open_ and not accuracy.unknown


@pytest.mark.parametrize("name", ZOO)
def test_no_sound_model_is_refused(name: str) -> None:
    if ZOO[name].transformers:
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    accuracy, open_ = checked(ZOO[name].make(), ZOO[name].batchnorm)
    assert not open_ and not accuracy.unknown


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(3, 3), nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.zeros(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def deep(activation: Callable[[], nn.Module], gain: float = 1.0) -> nn.Module:
    layers = [layer for _ in range(12) for layer in (nn.Linear(6, 6), activation())]
    model = nn.Sequential(nn.Linear(3, 6), *layers, nn.Linear(6, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(gain if p.dim() > 1 else 0)  # biases of 0: units at their kink where the inputs are 0
    return model


def with_zeros(n: int) -> tuple[Tensor, Tensor]:
    x, y = labeled(n)
    x[::2] = 0
    return x, y


KINKS: dict[str, Callable[[], Given]] = {
    "ReLU": lambda: (deep(nn.ReLU, 1.5), labeled(64), nn.CrossEntropyLoss()),
    "LeakyReLU": lambda: (deep(nn.LeakyReLU), labeled(64), nn.CrossEntropyLoss()),
    "units at their kink": lambda: (deep(nn.ReLU, 2.0), with_zeros(64), nn.CrossEntropyLoss()),
    "hard limits": lambda: (deep(nn.Hardtanh, 2.0), with_zeros(64), nn.CrossEntropyLoss()),
    "vanishing gradients": lambda: (deep(nn.Sigmoid, 0.3), labeled(64), nn.CrossEntropyLoss()),
    "absolute error": lambda: (mlp(), (torch.randn(5000, 3), torch.randn(5000, 3)), nn.L1Loss()),
    "largest": lambda: (mlp(), labeled(64), lambda m, b: m(b[0]).topk(2).values.square().mean()),
    "margins": lambda: (mlp(), labeled(64), lambda m, b: (1 - m(b[0])).clamp(min=0).square().mean()),
    "zero parameters": lambda: (Adapter(), labeled(7), nn.CrossEntropyLoss()),
    "a minimum": lambda: (deep(nn.Tanh, 0.0), (torch.randn(8, 3), torch.zeros(8, 3)), nn.MSELoss()),
    "tiny weights": lambda: (deep(nn.Tanh, 1e-12), labeled(8), nn.CrossEntropyLoss()),
    "bfloat16": lambda: (mlp().bfloat16(), labeled(7), nn.CrossEntropyLoss()),
    "float32 inside": lambda: (mlp(), labeled(7), lambda m, b: F.cross_entropy(m(b[0]).float(), b[1])),
    "bfloat16 inside": lambda: (mlp(), labeled(7), lambda m, b: F.cross_entropy(m(b[0]).bfloat16().float(), b[1])),
    "float32 only": lambda: (mlp(), labeled(7), lambda m, b: F.cross_entropy(m(b[0].float()), b[1])),
    "unused": lambda: (nn.ModuleList([mlp(), mlp()]), labeled(7), lambda m, b: F.cross_entropy(m[0](b[0]), b[1])),
    "logarithm": lambda: (nn.Linear(3, 1, bias=False), torch.eye(3), lambda m, x: (m(x).abs() + 1e-9).log().mean()),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=str)
@pytest.mark.parametrize("name", KINKS)
def test_kinks_and_rounding_are_no_faults(name: str, dtype: torch.dtype | None, seed: int) -> None:
    if name == "float32 only" and dtype is not None:
        pytest.skip("it has no other dtype")
    torch.manual_seed(seed)
    checked(KINKS[name](), dtype=dtype)  # raises nothing


def test_a_linear_regression_at_its_minimum_is_the_same_function_in_both_precisions() -> None:
    torch.manual_seed(0)
    x, y, model = torch.randn(50, 3), torch.randn(50, 1), nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x.double(), y.double()).solution.T)
    accuracy, open_ = checked((model, (x, y), nn.MSELoss()))
    assert not accuracy.unknown and not open_


def test_the_gradient_of_gauss_newton_products_is_checked() -> None:
    torch.manual_seed(0)
    assert not checked(ZOO["mlp"].make(), engine=GaussNewtonEngine)[1]
    with pytest.raises(DerivativeMismatch, match=r"the gradient of block '0.weight'"):
        checked(with_hook(masked), engine=GaussNewtonEngine)


def test_a_fault_that_does_not_concern_a_block_is_not_held_against_it() -> None:
    """d2 L / da db is wrong, the blocks are right."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, ...]:
            a, b = (t.detach() for t in ctx.saved_tensors)
            return g.detach() * b, g.detach() * a

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def loss_fn(m: Two, x: Tensor) -> Tensor:
        return (x * Product.apply(m.a, m.b)).sum() + m.a.square().sum() + m.b.pow(4).sum()

    torch.manual_seed(0)
    spectra = blockhess.spectrum(Two(), torch.randn(3), loss_fn, num_probes=2, num_steps=3)
    assert spectra.provenance["unchecked"] == ["a", "b"]  # undecided together


def test_slices_of_parameters_are_checked() -> None:
    blocks = {"rows": blockhess.ParameterSlice("0.weight", 0, 2), "rest": ["0.bias", "2.weight"]}
    torch.manual_seed(0)
    assert not checked((mlp(), labeled(7), nn.CrossEntropyLoss()), blocks=blocks)[1]
    with pytest.raises(DerivativeMismatch, match="the gradient of block 'rows'"):
        checked(with_hook(masked), blocks=blocks)


def test_groups_bound_the_memory() -> None:
    torch.manual_seed(0)
    prepared = problem(mlp(), labeled(7), nn.CrossEntropyLoss())
    assert differences.parameter_groups(prepared, 16) == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    assert measure(prepared, AutogradEngine(prepared), largest_group=16).confirmed == {0, 1, 2, 3}
    assert measure(prepared, AutogradEngine(prepared), [0], 1, 16).confirmed == {2, 3}
    # Without the check, the same fault is not seen.
    model, data, loss_fn = with_hook(masked)
    wrong = problem(model, data, loss_fn)
    assert measure(wrong, AutogradEngine(wrong), [3], 1, 16).confirmed == {2, 3}
    with pytest.raises(DerivativeMismatch, match=r"0\.weight"):
        measure(wrong, AutogradEngine(wrong), [3], 2, 16)


def test_parameters_and_retained_graphs_are_as_before() -> None:
    torch.manual_seed(0)
    prepared = problem(mlp(), labeled(7), nn.CrossEntropyLoss())
    engine = AutogradEngine(prepared)
    before = {name: (p.data_ptr(), p._version, p.detach().clone()) for name, p in prepared.parameters.items()}
    products = [differences.unit_products(prepared, engine, [0])[0]]
    measure(prepared, engine)
    for name, p in prepared.parameters.items():
        assert (p.data_ptr(), p._version) == before[name][:2] and torch.equal(p, before[name][2])
    products.append(differences.unit_products(prepared, engine, [0])[0])
    assert torch.equal(*products)


def test_parameters_come_back_after_an_interrupt() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp().double(), labeled(7)
    before = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        if not torch.equal(m[0].weight, before[0][1]):
            raise KeyboardInterrupt
        return F.cross_entropy(m(batch[0]), batch[1])

    with pytest.raises(KeyboardInterrupt):
        checked((model, (x.double(), y), loss_fn))
    assert all(p.data_ptr() == old and torch.equal(p, value) for p, (old, value) in zip(model.parameters(), before))


def test_the_error_reaches_the_user() -> None:
    torch.manual_seed(0)
    for engine in ("auto", "autograd", "exact", "ggn"):
        for dtype in (None, torch.float64):
            text = r"^spectrum: the gradient of block '0.weight' .* the hook on '0.weight'; .* plain PyTorch$"
            with pytest.raises(DerivativeMismatch, match=text):
                blockhess.spectrum(*with_hook(masked), num_probes=1, num_steps=3, engine=engine, dtype=dtype)


def test_hooks_on_frozen_parameters_do_not_matter() -> None:
    torch.manual_seed(0)
    model, data, loss_fn = with_hook(masked)
    model[0].weight.requires_grad_(False)
    for dtype in (None, torch.float64):
        assert not checked((model, data, loss_fn), dtype=dtype)[1]


def captured_penalty(model: nn.Module) -> Any:
    parameters = list(model.parameters())
    return lambda m, b: F.cross_entropy(m(b[0]), b[1]) + 0.5 * sum(p.square().sum() for p in parameters)


def test_a_repeat_with_captured_parameters_is_no_evidence() -> None:
    torch.manual_seed(0)
    model, data = mlp(), labeled(7)
    with pytest.warns(UserWarning, match="errors of products are unknown, so no block is called zero") as caught:
        spectra = blockhess.spectrum(model, data, captured_penalty(model), num_probes=2, num_steps=12)
    assert len(caught) == 1
    assert spectra.provenance["hvp_error"] is None and spectra.zero_blocks == ()
    assert "parameters that it captured" in spectra.provenance["hvp_error_unknown"]
    assert spectra.provenance["unchecked"] == []  # differences see captured parameters
    assert float(spectra.eigenvalue_range()[1].min()) > 0.9
    asked = blockhess.spectrum(model, data, lambda m, b: captured_penalty(m)(m, b), num_probes=2, num_steps=12)
    assert asked.provenance["hvp_error"] and not asked.provenance["hvp_error_unknown"]


def test_a_repeat_without_any_gradient_names_the_captured_parameters() -> None:
    model = mlp()
    parameters = list(model.parameters())
    with pytest.warns(UserWarning, match="loss_fn uses parameters that it captured"):
        blockhess.spectrum(model, labeled(7), lambda m, b: sum(p.square().sum() for p in parameters), num_probes=2)


@pytest.mark.parametrize("halved", [False, True])
def test_captured_parameters_are_refused_where_they_would_be_converted(halved: bool) -> None:
    torch.manual_seed(0)
    model = mlp().bfloat16() if halved else mlp()
    text = r"^spectrum: dtype must be torch.\w+ where loss_fn uses parameters that it captured, such as '0.weight', got"
    with pytest.raises(ValueError, match=text):
        blockhess.spectrum(model, labeled(7), captured_penalty(model), dtype=None if halved else torch.float64)


def test_a_captured_parameter_that_is_constant_is_no_hindrance() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp(), labeled(7)
    teacher = [p.detach().clone() for p in model.parameters()]

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1]) + sum(
            (p - t).square().sum() for p, t in zip(m.parameters(), teacher)
        )

    assert not checked((model, (x, y), loss_fn))[0].unknown


def test_draws_that_depend_on_the_dtype_make_the_error_unknown() -> None:
    generator = torch.Generator()

    def loss_fn(m: nn.Module, batch: Any, dtype: torch.dtype | None = None) -> Tensor:
        generator.manual_seed(3)
        noise = torch.randn(batch[0].shape, generator=generator, dtype=dtype or batch[0].dtype).to(batch[0].dtype)
        return F.cross_entropy(m(batch[0] + noise), batch[1])

    torch.manual_seed(0)
    accuracy, open_ = checked((mlp(), labeled(7), loss_fn))
    assert "another function" in accuracy.unknown and not accuracy.errors and not open_
    fixed, _ = checked((mlp(), labeled(7), lambda m, b: loss_fn(m, b, torch.float32)))
    assert not fixed.unknown


def test_a_block_is_zero_only_if_differences_agree() -> None:
    """The loss is linear in the bias, or has a kink there."""
    torch.manual_seed(0)
    model, data = nn.Linear(3, 2), (torch.randn(5, 3), torch.zeros(5, 2))
    at = model.bias.detach().clone()
    losses: list[tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = [
        (torch.sum, ("bias",)),
        (lambda b: (b - at).abs().sum(), ()),
    ]
    for of_bias, zero in losses:

        def loss_fn(m: nn.Linear, batch: Any, of_bias: Callable[[Tensor], Tensor] = of_bias) -> Tensor:
            return m.weight.square().sum() + of_bias(m.bias)

        spectra = blockhess.spectrum(model, data, loss_fn, num_probes=1, num_steps=2)
        assert spectra.zero_blocks == zero
        assert ("bias" in spectra.provenance["unchecked"]) == (not zero)


class ConstantSlope(torch.autograd.Function):
    """Tanh whose backward takes its slope for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 1 - torch.tanh(x) ** 2
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class Branch(nn.Module):
    """A residual branch with little influence, and so little curvature."""

    def __init__(self, act: Callable[[Tensor], Tensor], gain: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.gain = act, gain

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x))
        out: Tensor = self.last(z + self.gain * self.act(self.inner(z)))
        return out


BRANCH_DATA = torch.linspace(-2, 2, 128).sin().view(32, 4), torch.arange(32) % 3
SHORT = {"num_probes": 2, "num_steps": 20, "progress": False}


@pytest.mark.parametrize("gain", [1e-5, 1e-6])
def test_faults_in_parameters_of_little_curvature_are_found(gain: float) -> None:
    found = blockhess.spectrum(Branch(torch.tanh, gain), BRANCH_DATA, nn.CrossEntropyLoss(), **SHORT)
    assert found.provenance["unchecked"] == []
    with pytest.raises(DerivativeMismatch, match=r"products of block 'inner\.\w+' .* ConstantSlope"):
        blockhess.spectrum(Branch(ConstantSlope.apply, gain), BRANCH_DATA, nn.CrossEntropyLoss(), **SHORT)


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-25])
@pytest.mark.parametrize("engine", ["autograd", "difference"])
def test_faults_are_found_in_float32_alone_at_any_scale(engine: str, scale: float) -> None:
    """A group of parameters hides the gradient of one block, and squares of 1e25 overflow in float32."""
    torch.manual_seed(1)
    shortened = hooked(lambda g: 0.7 * g)
    model, x = nn.ParameterDict({"small": torch.randn(12), "large": torch.randn(12)}), torch.randn(40, 12)

    def loss_fn(m: Any, batch: Any, change: Any = shortened) -> Tensor:
        return ((x @ change(0.05 * m["small"])).sin().square() + (x @ m["large"]).tanh().square()).mean() * scale

    options = {"engine": engine, "num_probes": 1, "num_steps": 2, "progress": False}
    with pytest.raises(DerivativeMismatch, match=r"the gradient of block 'small' is not that of the loss"):
        blockhess.spectrum(model, torch.zeros(1), loss_fn, **options)
    right = blockhess.spectrum(model, torch.zeros(1), lambda m, b: loss_fn(m, b, torch.clone), **options)
    assert "small" not in right.provenance["unchecked"]


@pytest.mark.parametrize("gain", [0.1, 1e-2, 1e-3])
def test_faults_within_the_rounding_of_float32_are_not_confirmed(gain: float) -> None:
    eye = torch.eye(4)  # in float32 only

    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(m(batch[0] @ eye), batch[1])

    with pytest.warns(UserWarning) as caught:
        found = blockhess.spectrum(Branch(ConstantSlope.apply, gain), BRANCH_DATA, loss_fn, **SHORT)
    assert {"inner.weight", "inner.bias"} <= set(found.provenance["unchecked"]) < set(found.names)
    text = f"products of {len(found.provenance['unchecked'])} of 6 blocks are not confirmed by differences, such as"
    assert text in str(caught[-1].message) and str(caught[-1].message).endswith(
        ": kinks or rounding hide whether the torch.autograd.Function ConstantSlope has the right derivatives"
    )
    with pytest.warns(UserWarning, match="errors of products are unknown") as caught:
        blockhess.spectrum(Branch(torch.tanh, gain), BRANCH_DATA, loss_fn, **SHORT)
    assert len(caught) == 1


class Scaled(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-3 * self.act(x)


@pytest.mark.parametrize("faulty", [False, True])
def test_kinks_that_may_hide_a_fault_are_warned_of(faulty: bool) -> None:
    torch.manual_seed(0)
    sizes = (16, 128, 128, 128, 128)
    layers = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.ReLU())]
    model = nn.Sequential(*layers, Scaled(ConstantSlope.apply if faulty else torch.tanh), nn.Linear(128, 3))
    data = torch.randn(1024, 16), torch.randint(3, (1024,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=1, num_steps=3, engine="autograd")
    assert len(found.provenance["unchecked"]) > 3 or not faulty
    assert [("not confirmed" in str(w.message)) for w in caught] == [True] * faulty


def test_a_loss_that_is_undefined_beside_the_parameters_leaves_blocks_unchecked() -> None:
    model = mlp()
    start = [p.detach().double().clone() for p in model.parameters()]

    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert all(torch.equal(p.double(), before) for p, before in zip(m.parameters(), start))
        return F.cross_entropy(m(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="products of 4 of 4 .*: the loss cannot be computed beside the parameters"):
        found = blockhess.spectrum(model, labeled(7), loss_fn, num_probes=1, num_steps=2, progress=False)
    assert set(found.provenance["unchecked"]) == set(found.names)
    assert not found.zero_blocks


def test_a_model_of_one_dtype_only_has_unknown_errors() -> None:
    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert batch[0].dtype == torch.float32
        return F.cross_entropy(m(batch[0]), batch[1])

    with pytest.warns(UserWarning, match="errors of products are unknown"):
        found = blockhess.spectrum(mlp(), labeled(7), loss_fn, num_probes=1, num_steps=2, progress=False)
    assert found.provenance["hvp_error"] is None and not found.zero_blocks


class HalfHidden(nn.Module):
    """Runs a layer whose parameters require gradients under no_grad, or with gradients."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.inner, self.last, self.hidden = nn.Linear(3, 4), nn.Linear(4, 3), hidden

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.hidden):
            x = torch.tanh(self.inner(x))
        out: Tensor = self.last(x)
        return out


def test_parameters_without_a_gradient_have_no_effect_on_the_loss() -> None:
    torch.manual_seed(0)
    found = blockhess.spectrum(HalfHidden(False), labeled(7), nn.CrossEntropyLoss(), num_probes=1, num_steps=2)
    assert not found.provenance["unused"]
    with pytest.raises(DerivativeMismatch, match=r"the gradient of block 'inner\.\w+' is not that of the loss"):
        blockhess.spectrum(HalfHidden(True), labeled(7), nn.CrossEntropyLoss(), num_probes=1, num_steps=2)
