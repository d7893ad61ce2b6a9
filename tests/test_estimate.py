"""`blockhess.spectrum`, from a model to its block spectra, against dense eigendecompositions in float64."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import blockhess
from blockhess.problem.model_state import fixed_state
from blockhess.run.progress import progress_bar
from tests.helpers.dense_hessian import dense_hessian, operator, operator_blocks
from tests.helpers.tiny_models import CASES, convolutional, labeled, mlp

pytestmark = pytest.mark.usefixtures("float64_models")


def same(a: blockhess.Spectra, b: blockhess.Spectra, name: str) -> bool:
    """Whether the spectra of a block are the same to the last bit, whatever padding they have."""
    steps = a[name].steps
    if not torch.equal(steps, b[name].steps):
        return False
    m = int(steps.max())
    return torch.equal(a[name].nodes[:, :m], b[name].nodes[:, :m]) and torch.equal(
        a[name].weights[:, :m], b[name].weights[:, :m]
    )


@pytest.mark.parametrize(
    ("case", "batchnorm"), [(case, "eval") for case in CASES] + [("convolution and BatchNorm", "batch")]
)
def test_full_depth_is_the_dense_spectrum(case: str, batchnorm: str) -> None:
    make_model, make_data = CASES[case]
    model, (x, y) = make_model(), make_data()
    spectra = blockhess.spectrum(
        model, (x, y), nn.CrossEntropyLoss(), num_probes=2, num_steps=200, reorthogonalize="full", batchnorm=batchnorm
    )
    for name, _ in model.named_parameters():
        with fixed_state(model, batchnorm):
            hessian = dense_hessian(model, lambda call: F.cross_entropy(call(x), y), [name])
        exact = torch.linalg.eigvalsh(hessian)
        for probe, steps in enumerate(spectra[name].steps.tolist()):
            # A multiple eigenvalue is one node, so the two sets are compared, not the two lists.
            distance = (spectra[name].nodes[probe, :steps, None] - exact).abs()
            scale = 1e-9 * max(1.0, exact.abs().max().item())
            assert distance.min(0).values.max() < scale, name
            assert distance.min(1).values.max() < scale, name


def test_weights_are_those_of_the_dense_hessian() -> None:
    # E[weight of an eigenvalue] = multiplicity / dim; and sum_i w_i lambda_i^2 estimates |H|_F^2 / dim.
    model, data = mlp(), labeled(7)
    spectra = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=200)
    for name, block in operator_blocks(operator(model, data, nn.CrossEntropyLoss())).items():
        found = spectra[name]
        assert abs(found.trace - block.trace().item()) < 5 * found.trace_stderr + 1e-12
        assert abs(found.frobenius_norm - block.norm().item()) < 5 * found.frobenius_stderr + 1e-12
        assert found.trace_stderr < 0.2 * block.norm().item()


def test_a_blocks_result_does_not_depend_on_the_partition() -> None:
    model, data = mlp(), labeled(7)
    options = {"num_probes": 2, "num_steps": 6}
    whole = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), **options)
    alone = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), blocks={"2.weight": "2.weight"}, **options)
    assert same(whole, alone, "2.weight")
    other = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), seed=1, **options)
    assert not same(whole, other, "2.weight")


def test_same_seed_same_bits() -> None:
    model, data = mlp(), labeled(7)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_steps=5))
    finally:
        torch.set_num_threads(threads)
    assert all(same(*runs, name) for name in runs[0].names)


def test_batches_of_unequal_size_equal_the_whole_batch() -> None:
    model, (x, y) = mlp(), labeled(7)
    split = [(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])]
    one, three = (blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=2) for data in ((x, y), split))
    for name in one.names:
        torch.testing.assert_close(three[name].trace, one[name].trace, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(three[name].lambda_max, one[name].lambda_max, rtol=1e-9, atol=1e-12)
    assert three.provenance["weight"] == 7
    assert three.provenance["loss_value"] == pytest.approx(F.cross_entropy(model(x), y).item())


def graph_batch(nodes: int) -> dict[str, Tensor]:
    x, y = labeled(nodes)
    return {"edges": torch.zeros(2, 3 * nodes, dtype=torch.int64), "x": x, "y": y}


def of_graph(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def test_weights_that_shapes_do_not_determine_are_warned_of() -> None:
    model, options = mlp(), {"num_probes": 1, "num_steps": 2, "engine": "autograd"}
    graphs, (x, y) = [graph_batch(7), graph_batch(3)], labeled(8)
    with pytest.warns(
        UserWarning, match=r"weighted by their first dimensions, 7, 3, .* return.*\(mean loss, weight"
    ) as w:
        guessed = blockhess.spectrum(model, graphs, of_graph, **options)
    assert len(w) == 1 and guessed.provenance["weight"] == 10
    for padded in ([(x, y), (x[:4, None], y[:4])], [pack_sequence([x, x[:2]]), pack_sequence([x])]):
        with pytest.warns(UserWarning, match="weighted by their first dimensions"):
            blockhess.spectrum(model, padded, lambda m, b: m(b[0]).square().mean(), **options)


def test_weights_that_are_known_need_no_warning() -> None:
    model, options = mlp(), {"num_probes": 1, "num_steps": 2, "engine": "autograd"}
    (x, y), equal = labeled(8), [graph_batch(5), graph_batch(5)]
    rows = [(x, y), (x[:3], y[:3])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blockhess.spectrum(model, graph_batch(7), of_graph, **options)
        blockhess.spectrum(model, equal, of_graph, **options)
        blockhess.spectrum(model, [equal[0], graph_batch(3)], lambda m, b: (of_graph(m, b), len(b["y"])), **options)
        for loss_fn in (nn.CrossEntropyLoss(), lambda m, b: F.cross_entropy(m(b[0]), b[1])):
            blockhess.spectrum(model, rows, loss_fn, **options)
        sums = [(x[:, None], x[:, None]), (x, x)]
        spectra = blockhess.spectrum(model, sums, nn.MSELoss(reduction="sum"), **options)
    assert spectra.provenance["weight"] == 2


class Tempered(nn.Module):
    """A criterion with a parameter, a buffer and dropout, which counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.7))
        self.dropout = nn.Dropout()
        self.register_buffer("classes", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(self.dropout(logits) * self.temperature, targets, self.classes)

    def of_batch(self, model: nn.Module, batch: Any) -> Tensor:
        return self(model(batch[0]), batch[1])


class Penalized(Tempered):
    """A criterion that holds the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return super().forward(logits, targets) + sum(p.square().sum() for p in self.model.parameters())


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["criterion", "method", "holds the model"])
def test_a_criterion_is_converted_and_restored_with_the_model(kind: str, given: torch.dtype) -> None:
    model, (x, y) = mlp().to(given), labeled(9)
    criterion = (Penalized(model) if kind == "holds the model" else Tempered()).to(given)
    loss_fn = criterion.of_batch if kind == "method" else criterion
    before = [t.clone() for t in criterion.state_dict().values()]
    data = x.float(), y
    spectra = blockhess.spectrum(model, data, loss_fn, num_probes=1, engine="exact", dtype=torch.float64)
    assert criterion.training and all(torch.equal(a, b) for a, b in zip(before, criterion.state_dict().values()))
    assert all(t.dtype == given for t in criterion.state_dict().values())
    assert spectra.provenance["loss_parameters"] == ["temperature"]
    model, criterion = model.double(), criterion.double().eval()
    for name, dim in zip(spectra.names, spectra.dims):
        dense = dense_hessian(model, lambda m: Tempered.forward(criterion, m(x.float().double()), y), [name])
        if kind == "holds the model":
            dense += 2 * torch.eye(dim)
        values = torch.linalg.eigvalsh(dense)
        low, high = (float(v[spectra.names.index(name)]) for v in spectra.eigenvalue_range())
        assert (low, high) == pytest.approx((float(values[0]), float(values[-1])), abs=1e-9 * float(values.abs().max()))


def test_layers_without_running_statistics_are_recorded_as_what_they_do() -> None:
    model, data = convolutional(), (torch.randn(9, 1, 4, 4), torch.randint(3, (9,)))
    model[1] = nn.BatchNorm2d(model[1].num_features, track_running_stats=False)
    options = {"num_probes": 2, "num_steps": 3, "engine": "autograd"}
    first, asked = (
        blockhess.spectrum(model, data, nn.CrossEntropyLoss(), batchnorm=policy, **options)
        for policy in ("eval", "batch")
    )
    assert first.provenance["batchnorm"] == asked.provenance["batchnorm"] == "batch"
    assert torch.equal(first.quadrature.nodes, asked.quadrature.nodes)
    longer = blockhess.extend(first, model, data, nn.CrossEntropyLoss(), num_probes=3)
    assert torch.equal(longer.quadrature.nodes[:2], first.quadrature.nodes)


def test_provenance_tells_how_it_was_made() -> None:
    model = mlp()
    model.unused = nn.Parameter(torch.ones(2))
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    model.twice = model[0]
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    spectra = blockhess.spectrum(
        model, labeled(7), nn.CrossEntropyLoss(), num_probes=2, num_steps=3, seed=5, engine="autograd"
    )
    made = spectra.provenance
    expected = {
        "model": "Sequential",
        "loss": "CrossEntropyLoss",
        "batchnorm": "none",
        "dtype": "float64",
        "seed": 5,
        "num_probes": 2,
        "num_steps": 3,
        "distribution": "gaussian",
        "reorthogonalize": "auto",
        "engine": "autograd",
        "matmul_precision": "highest",
        "frozen": ["frozen"],
        "tied": {"0.weight": ["twice.weight"], "0.bias": ["twice.bias"]},
        "unused": ["unused"],
        "hvps": 2 * 3 * 4,
        "weight": 7.0,
        "torch": str(torch.__version__),
        "blockhess": blockhess.__version__,
    }
    assert {key: made[key] for key in expected} == expected
    assert made["seconds"] > 0
    json.dumps(dict(made))
    assert [(b.name, b.note) for b in spectra.blocks if b.note] == [
        ("unused", "unused"),
        ("0.weight", "tied with twice.weight"),
        ("0.bias", "tied with twice.bias"),
    ]
    fresh = blockhess.spectrum(model, labeled(7), nn.CrossEntropyLoss(), num_probes=1, num_steps=1, seed=None)
    assert isinstance(fresh.provenance["seed"], int)


# What the model is afterwards; test_model_state.py looks closer.


def state(model: nn.Module) -> list[Any]:
    return [
        [m.training for m in model.modules()],
        [b.tolist() for b in model.buffers()],
        [(p.tolist(), p.grad, p.requires_grad) for p in model.parameters()],
        torch.get_rng_state().tolist(),
        torch.backends.cuda.flash_sdp_enabled(),
    ]


@pytest.mark.parametrize("failure", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
def test_the_model_is_left_as_it_was(batchnorm: str, failure: type[BaseException] | None) -> None:
    make_model, make_data = CASES["convolution and BatchNorm"]
    model, (x, y) = make_model(), make_data()
    model[5].eval()
    calls = 0

    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if failure and calls == 8:  # when the second batch's graph is built, in the first Lanczos step
            raise failure
        return F.cross_entropy(m(batch[0]), batch[1])

    before = state(model)
    try:
        blockhess.spectrum(model, [(x, y), (x, y)], loss_fn, num_probes=1, num_steps=5, batchnorm=batchnorm)
    except (RuntimeError, KeyboardInterrupt):
        assert calls == 8
    assert calls >= 6
    assert state(model) == before


def test_drawing_the_data_leaves_no_trace() -> None:
    model, (x, y) = mlp(), labeled(7)
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    before = state(model)
    shuffled = blockhess.spectrum(model, loader, nn.CrossEntropyLoss(), num_probes=1)
    assert state(model) == before
    whole = blockhess.spectrum(model, (x, y), nn.CrossEntropyLoss(), num_probes=1)
    assert shuffled["0.weight"].trace == pytest.approx(whole["0.weight"].trace, rel=1e-9)


def test_a_shuffling_loader_does_not_resume(tmp_path: Path) -> None:
    model, data = mlp(), TensorDataset(*labeled(7))
    for seed in range(2):
        torch.manual_seed(seed)
        loader = DataLoader(data, batch_size=3, shuffle=True)
        if seed:
            with pytest.raises(ValueError, match=r"differs:\n(.|\n)*\na loader that shuffles or augments yields other"):
                blockhess.spectrum(model, loader, nn.CrossEntropyLoss(), num_probes=1, run_dir=tmp_path / "run")
        else:
            blockhess.spectrum(model, loader, nn.CrossEntropyLoss(), num_probes=1, run_dir=tmp_path / "run")


def test_without_gradients_and_in_a_wrapper() -> None:
    model, data = mlp(), labeled(7)
    expected = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_steps=4)
    with torch.no_grad():
        found = blockhess.spectrum(nn.DataParallel(torch.compile(model)), data, nn.CrossEntropyLoss(), num_steps=4)
    assert found.names == expected.names and all(same(found, expected, name) for name in found.names)
    assert found.provenance["model"] == "Sequential"


# Transformers


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


def gpt2(transformers: Any) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    config = transformers.GPT2Config(vocab_size=7, n_embd=4, n_layer=2, n_head=2, n_positions=6)
    model = transformers.GPT2LMHeadModel(config).double()
    ids = torch.randint(7, (3, 5))
    labels = ids.clone()
    labels[2, 2:] = -100
    return model, [{"input_ids": ids[:2], "labels": labels[:2]}, {"input_ids": ids[2:], "labels": labels[2:]}]


def test_transformers_model(transformers: Any) -> None:
    model, batches = gpt2(transformers)
    assert model.training
    found = blockhess.spectrum(model, batches, num_probes=1, num_steps=1)
    assert model.training
    assert found.provenance["weight"] == 2 * 4 + 1
    assert found.provenance["tied"] == {"transformer.wte.weight": ["lm_head.weight"]}
    assert len(found.names) == 28

    def loss_fn(m: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        logits = m(batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), int((labels != -100).sum())

    def of_all(call: Any) -> Tensor:
        return sum(loss_fn(call, batch)[0] * loss_fn(call, batch)[1] for batch in batches) / 9

    names = ["transformer.wte.weight", "transformer.h.1.attn.c_proj.weight", "transformer.h.0.ln_1.bias"]
    options = {"blocks": {n: n for n in names}, "num_probes": 1, "num_steps": 60, "reorthogonalize": "full"}
    found, own = (blockhess.spectrum(model, batches, loss, **options) for loss in (None, loss_fn))
    for name in names:
        with fixed_state(model):
            eigenvalues = torch.linalg.eigvalsh(dense_hessian(model, of_all, [name]))
        scale = eigenvalues.abs().max().item()
        for end, exact in (("lambda_min", eigenvalues[0].item()), ("lambda_max", eigenvalues[-1].item())):
            assert getattr(own[name], end) == pytest.approx(exact, abs=1e-9 * scale)
            # Transformers computes its losses in float32.
            assert getattr(found[name], end) == pytest.approx(exact, abs=1e-6 * scale)


def test_transformers_flash_attention_is_switched(transformers: Any) -> None:
    model, batches = gpt2(transformers)
    expected = blockhess.spectrum(model, batches[0], num_probes=1, num_steps=3)
    model.config._attn_implementation = "flash_attention_2"
    found = blockhess.spectrum(model, batches[0], num_probes=1, num_steps=3)
    assert model.config._attn_implementation == "flash_attention_2"
    assert all(same(found, expected, name) for name in found.names)


def test_heads_of_a_fused_qkv(transformers: Any) -> None:
    model, batches = gpt2(transformers)
    name = "transformer.h.0.attn.c_attn.weight"
    blocks = blockhess.heads(model, name, 2, dim=1, roles=("q", "k", "v"))
    spectra = blockhess.spectrum(model, batches[0], blocks=blocks, num_probes=1, num_steps=50)
    assert spectra.dims == (8,) * 6
    with fixed_state(model):
        whole = operator_blocks(operator(model, batches[0], None, {name: name}))[name].view(4, 12, 4, 12)
    part = whole[:, 4:6, :, 4:6].reshape(8, 8)  # key of head 0
    eigenvalues = torch.linalg.eigvalsh(part)
    assert spectra[f"{name}[k0]"].lambda_max == pytest.approx(eigenvalues[-1].item(), abs=1e-12)
    assert spectra[f"{name}[k0]"].lambda_min == pytest.approx(eigenvalues[0].item(), abs=1e-12)


# Failures


class SecondDerivativeIsInfinite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.bad = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.bad.abs().pow(1.5).sum()


def test_nonfinite_products_keep_the_other_blocks() -> None:
    model, data = SecondDerivativeIsInfinite(), labeled(7)
    options = {"num_probes": 2, "num_steps": 5}
    with pytest.raises(blockhess.NonFiniteError, match=r"got NaN, inf or sizes .* in 1 of 3 blocks: bad; ") as caught:
        blockhess.spectrum(model, data, F.cross_entropy, blocks={"bad": "bad", **by_name(model.layer)}, **options)
    partial = caught.value.partial
    good = blockhess.spectrum(model, data, F.cross_entropy, blocks=by_name(model.layer), **options)
    assert all(same(partial, good, name) for name in good.names)
    assert partial["bad"].steps.tolist() == [0, 0]
    reported = blockhess.spectrum(model, data, F.cross_entropy, on_nonfinite="mark", **options)
    assert dict(reported.excluded) == {"bad": "non-finite"}


def by_name(layer: nn.Module) -> dict[str, str]:
    return {f"layer.{name}": f"layer.{name}" for name, _ in layer.named_parameters()}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_steps": 0}, "num_steps must be an integer at least 1, got 0"),
        ({"num_probes": -1}, "num_probes must be an integer at least 1, got -1"),
        ({"num_steps": 2.5}, "num_steps must be an integer at least 1, got 2.5"),
        ({"distribution": "uniform"}, "distribution must be one of gaussian, rademacher, got 'uniform'"),
        ({"reorthogonalize": True}, "reorthogonalize must be one of none, full, partial, auto, got True"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of raise, mark, got 'ignore'"),
        ({"batchnorm": "train"}, "batchnorm must be one of eval, batch, frozen_batch_stats, got 'train'"),
        ({"progress": "yes"}, "progress must be True, False or 'auto', got 'yes'"),
        ({"blocks": {"a": "0.wieght"}}, "no parameter '0.wieght'; the nearest are '0.weight'"),
        ({"data": []}, "data must hold at least one batch, got an empty list"),
        ({"model": "gpt2"}, "model must be a torch.nn.Module, got str"),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, "must return one number"),
        ({"loss_fn": lambda m, batch: m(batch[0])}, r"0-dimensional tensor, got shape \(7, 3\)"),
        ({"loss_fn": lambda m, batch: batch[0].sum()}, "requires no gradient"),
        ({"loss_fn": None}, "must hold mappings"),
    ],
)
def test_bad_input(options: dict[str, Any], text: str) -> None:
    arguments = {"model": mlp(), "data": labeled(7), "loss_fn": nn.CrossEntropyLoss()} | options
    with pytest.raises((ValueError, TypeError), match=f"^spectrum: .*{text}"):
        blockhess.spectrum(**arguments)


# Progress, and what an import costs


def test_short_jobs_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    blockhess.spectrum(mlp(), labeled(7), nn.CrossEntropyLoss(), num_steps=5, progress=True)
    assert capfd.readouterr() == ("", "")


def test_progress_counts_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.asked = options["total"]
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    x, y = labeled(8)
    spectra = blockhess.spectrum(
        mlp(), [(x[:4], y[:4]), (x[4:], y[4:])], nn.CrossEntropyLoss(), num_probes=2, num_steps=3, engine="autograd"
    )
    assert bars[0].n == bars[0].asked == spectra.provenance["hvps"] == 2 * 2 * (3 + 3 + 3 + 3)
    with progress_bar(9, "HVP", False) as update:
        update()
    assert len(bars) == 1


def test_a_batch_too_large_for_the_device() -> None:
    def loss_fn(m: nn.Module, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="got batches of 7; pass smaller ones, in a list"):
        blockhess.spectrum(mlp(), labeled(7), loss_fn)


def test_progress_needs_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'pip install "blockhess\[cli\]"'):
        blockhess.spectrum(mlp(), labeled(7), nn.CrossEntropyLoss(), num_steps=1, progress=True)
    blockhess.spectrum(mlp(), labeled(7), nn.CrossEntropyLoss(), num_steps=1)  # "auto" does without


def test_import_loads_nothing_heavy_and_every_name_is_there() -> None:
    code = (
        "import sys, blockhess;"
        "assert not {'torch', 'matplotlib', 'typer', 'tqdm'} & set(sys.modules);"
        "[getattr(blockhess, name) for name in blockhess.__all__]; assert callable(blockhess.spectrum);"
        "assert not {'matplotlib', 'typer'} & set(sys.modules)"
    )
    root = str(Path(blockhess.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"], check=True)
    with pytest.raises(AttributeError, match="no attribute 'spectra_of'"):
        _ = blockhess.spectra_of


def test_blocks_of_equal_size_have_probes_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    q = blockhess.spectrum(model, labeled(5), nn.CrossEntropyLoss(), num_probes=1, num_steps=1).quadrature
    assert len(set(q.block_ids)) == 4


def test_other_thread_counts_agree_to_rounding() -> None:
    """Not to the bit: the backward pass of LayerNorm adds in an order that depends on the number of threads."""
    model = nn.Sequential(nn.Linear(3, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 3))
    data, before, results = labeled(200), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=2, num_steps=5))
    torch.set_num_threads(before)
    one, two = (spectra.frobenius_norm()[0] for spectra in results)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-9)


def test_frozen_statistics_of_a_loss_with_gradients() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh(), torch.nn.Linear(4, 1))

    def penalty(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
        return slope.square().mean()

    options = {"batchnorm": "frozen_batch_stats", "num_probes": 1, "num_steps": 3}
    found = blockhess.spectrum(model, torch.randn(8, 3), penalty, **options)
    assert found.provenance["batchnorm"] == "frozen_batch_stats"
