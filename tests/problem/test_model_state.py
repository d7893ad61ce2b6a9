"""The model is deterministic inside the context and afterwards exactly as it was."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockhess
from blockhess.problem.model_state import batchnorm_policy, fixed_state


class Everything(nn.Module):
    """Dropout, BatchNorm, an RNN, and a buffer that changes with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.rnn = nn.LSTM(3, 2, batch_first=True)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.norm(torch.randn(9, 3))  # running statistics of its own
        self.norm.train()
        self.rnn.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.scratch = torch.ones(2)
        return self.dropout(self.norm(x))


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in model.modules()],
        "buffers": [(name, id(b), b.tolist()) for name, b in model.named_buffers()],
        "parameters": [(p.tolist(), p.requires_grad, p._version) for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        "rng": torch.get_rng_state().tolist(),
        "sdpa": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "default dtype": torch.get_default_dtype(),
        "cudnn": torch.backends.cudnn.enabled,
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "training": model.training,
    }


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_everything_is_restored(batchnorm: str, failure: type[BaseException] | None, mode: Any) -> None:
    torch.manual_seed(0)
    model = Everything()
    model.norm.weight.grad = torch.ones(3)
    model.norm.bias.requires_grad_(False)
    x = torch.randn(5, 3)
    with mode():
        before = snapshot(model)
        try:
            with fixed_state(model, batchnorm):
                assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
                inside = snapshot(model)
                model(x).sum()
                torch.rand(3)
                torch.set_default_dtype(torch.float64)
                torch.autograd.grad(model(x).sum(), model.norm.weight)
                if failure:
                    raise failure
        except (ValueError, KeyboardInterrupt):
            pass
        assert snapshot(model) == before
    for changed in ("modes", "sdpa", "fast path", "cudnn"):
        assert inside[changed] != before[changed]


def test_eval_uses_running_statistics_and_no_dropout() -> None:
    model, x = Everything(), torch.randn(5, 3)
    with fixed_state(model):
        first, second = model(x), model(x)
    assert torch.equal(first, second)
    model.eval()
    assert torch.equal(first, model(x))


def test_batch_uses_the_batchs_statistics() -> None:
    model, x = Everything(), torch.randn(50, 3)
    with fixed_state(model, "batch"):
        y = model(x)
    torch.testing.assert_close(y.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    with fixed_state(model, "eval"):
        assert model(x).mean(0).abs().max() > 1e-3


def test_the_policy_is_what_the_layers_do() -> None:
    kept, none_kept = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    mixed = nn.Sequential(kept, none_kept)
    for asked in ("eval", "batch", "frozen_batch_stats"):
        assert batchnorm_policy(nn.Linear(3, 3), asked) == "none"
        assert batchnorm_policy(kept, asked) == asked
    assert [batchnorm_policy(none_kept, asked) for asked in ("eval", "batch")] == ["batch", "batch"]
    assert batchnorm_policy(mixed, "batch") == "batch"
    for model, asked in ((none_kept, "frozen_batch_stats"), (mixed, "eval"), (mixed, "frozen_batch_stats")):
        with pytest.raises(ValueError, match=f"keeps no running statistics, as '1?' .*got '{asked}'"):
            batchnorm_policy(model, asked)
    scripted = nn.Sequential(torch.jit.script(kept))
    assert batchnorm_policy(scripted, "eval") == "eval"
    for asked in ("batch", "frozen_batch_stats"):  # its mode is its own
        with pytest.raises(ValueError, match=f"must be 'eval' where a layer is a ScriptModule, as '0', got '{asked}'"):
            batchnorm_policy(scripted, asked)
    x = torch.randn(50, 3)
    with fixed_state(none_kept, "eval"):
        eval_ = none_kept(x)
    with fixed_state(none_kept, "batch"):
        assert torch.equal(eval_, none_kept(x))


def test_compiled_models_run_eagerly() -> None:
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    model = torch.compile(nn.Linear(2, 2), backend=backend)
    with fixed_state(model):
        model(torch.ones(1, 2))
    assert not calls
    model(torch.ones(1, 2))
    assert calls


class Config:
    """As Transformers' configurations: setting the attention of a whole sets that of its part."""

    def __init__(self, name: str, part: Config | None = None) -> None:
        self.part = part
        self.name = name

    @property
    def _attn_implementation(self) -> str:
        return self.name

    @_attn_implementation.setter
    def _attn_implementation(self, value: str) -> None:
        self.name = value
        if self.part:
            self.part._attn_implementation = value


def test_attention_implementations_are_switched_and_restored() -> None:
    part = Config("eager")
    whole = Config("flash_attention_2", part)
    model = nn.Sequential(nn.Linear(1, 1))
    model.config, model[0].config = whole, part
    with fixed_state(model):
        assert whole.name == "sdpa"
    assert (whole.name, part.name) == ("flash_attention_2", "eager")


def test_bad_policy() -> None:
    model = Everything()
    before = snapshot(model)
    with (
        pytest.raises(ValueError, match="batchnorm must be one of eval, batch, frozen_batch_stats, got 'train'"),
        fixed_state(model, "train"),
    ):
        pass
    assert snapshot(model) == before


def float32_settings() -> list[object]:
    """The settings of torch, older and newer; None where torch refuses to return one."""
    b = torch.backends
    owners = (b, b.cudnn, b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
    found: list[object] = [owner.fp32_precision for owner in owners]
    for older in (torch.get_float32_matmul_precision, lambda: b.cudnn.allow_tf32, lambda: b.cuda.matmul.allow_tf32):
        try:
            found.append(older())
        except RuntimeError:
            found.append(None)
    return found


SETTINGS = {
    "torch's own": "",
    "older": "torch.set_float32_matmul_precision('high'); b.cudnn.allow_tf32 = False",
    "newer": "b.cuda.matmul.fp32_precision = 'tf32'; b.cudnn.conv.fp32_precision = 'ieee'",
    "for all": "b.fp32_precision = 'tf32'",
    "for cuDNN": "b.cudnn.fp32_precision = 'ieee'",
    "on the CPU": "b.mkldnn.matmul.fp32_precision = b.mkldnn.conv.fp32_precision = 'bf16'",
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_float32_precision(precision: str, setting: str) -> None:
    """In a process of its own, since settings that were never made cannot be made again."""
    program = f"""
import torch
import blockhess
from blockhess.problem.model_state import float32_precision
from tests.problem.test_model_state import float32_settings
b = torch.backends
{setting}
before = float32_settings()
try:
    with float32_precision({precision!r}):
        cuda, older = ("ieee", False) if {precision!r} == "highest" else ("tf32", True)
        cpu = dict(highest="ieee", high="tf32", medium="bf16")[{precision!r}]
        found = float32_settings()[2:]
        assert found == [*[cuda] * 3, cpu, "ieee", "ieee", {precision!r}, older, older], found
        with b.cudnn.flags(enabled=False):  # torch reads the older settings here
            pass
        raise KeyError
except KeyError:
    pass
assert float32_settings() == before, (before, float32_settings())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_spectrum_sets_the_precision_of_convolutions() -> None:
    seen = []

    def loss_fn(m: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(float32_settings())
        return m(batch).square().mean()

    before = float32_settings()
    for precision in ("highest", "high"):
        blockhess.spectrum(nn.Conv1d(1, 1, 2), torch.randn(2, 1, 3), loss_fn, num_probes=1, num_steps=1,
                           matmul_precision=precision)  # fmt: skip
    assert [found[3] for found in (seen[0], seen[-1])] == ["ieee", "tf32"]
    assert float32_settings() == before


def test_statistics_are_frozen_in_the_dtype_of_the_computation() -> None:
    torch.manual_seed(0)
    halved = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()
    x, y = torch.randn(12, 3), torch.arange(12) % 2
    data, before = [(x, y), (x[:7], y[:7])], copy.deepcopy(halved.state_dict())
    options = {"batchnorm": "frozen_batch_stats", "num_probes": 2, "num_steps": 5}
    found = blockhess.spectrum(halved, data, nn.CrossEntropyLoss(), **options)
    wanted = blockhess.spectrum(copy.deepcopy(halved).float(), data, nn.CrossEntropyLoss(), **options)
    assert torch.equal(found.quadrature.nodes, wanted.quadrature.nodes)
    for name, tensor in halved.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
