"""Modules that are not written in plain PyTorch have the spectra of the plain ones, or are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blockhess
from tests.helpers.tiny_models import labeled, mlp


class Table(nn.Module):
    """Adds rows of a table to its input."""

    def __init__(self, look_up: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 15).view(5, 3))
        self.look_up = look_up

    def forward(self, x: Tensor) -> Tensor:
        return x + self.look_up(torch.arange(len(x)) % 3, self.table)


class Embedded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inner = nn.Embedding.from_pretrained(torch.linspace(-1, 1, 15).view(5, 3), freeze=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(torch.arange(len(x)) % 3)


class FrozenAttention(nn.Module):
    """An encoder whose parameters are frozen, so that torch may take its fused kernels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
        self.kind, self.encoder = kind, nn.TransformerEncoder(layer, 1) if kind == "encoder" else layer.self_attn
        self.encoder.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x[None], (0, 1))
        if self.kind == "encoder":
            return self.encoder(x, src_key_padding_mask=torch.zeros(x.shape[:2], dtype=torch.bool))[0, :, :3]
        return self.encoder(x, x, x, need_weights=False)[0][0, :, :3]


def before(first: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(first, mlp())


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (labeled(5)[0],)).module()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "scripted": (lambda: torch.jit.script(before(nn.Tanh())), lambda: before(nn.Tanh())),
    "scripted part": (lambda: before(torch.jit.script(nn.Tanh())), lambda: before(nn.Tanh())),
    "traced": (lambda: torch.jit.trace(before(nn.Tanh()), labeled(5)[0]), lambda: before(nn.Tanh())),
    "symbolically traced": (lambda: torch.fx.symbolic_trace(before(nn.Tanh())), lambda: before(nn.Tanh())),
    "exported": (lambda: exported(before(nn.Tanh())), lambda: before(nn.Tanh())),
    "sparse gradient": (
        lambda: before(Table(lambda i, w: F.embedding(i, w, sparse=True))), lambda: before(Table(lambda i, w: w[i]))
    ),
    "sparse embedding": (lambda: before(Embedded(sparse=True)), lambda: before(Embedded())),
    "max_norm": (lambda: before(Embedded(max_norm=0.5)), lambda: before(Table(lambda i, w: w[i]))),
    "encoder": (lambda: before(FrozenAttention("encoder")), lambda: before(FrozenAttention("encoder"))),
    "attention": (lambda: before(FrozenAttention("attention")), lambda: before(FrozenAttention("attention"))),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["auto", "traced"])
@pytest.mark.parametrize("name", MODELS)
def test_spectra(name: str, engine: str) -> None:
    model, plain = (make() for make in MODELS[name])
    data = labeled(5)
    if name == "max_norm":
        with torch.no_grad():
            plain[0].table.mul_((0.5 / (plain[0].table.norm(dim=1, keepdim=True) + 1e-7)).clamp(max=1))
    right = blockhess.spectrum(
        plain.double(), (data[0].double(), data[1]), nn.CrossEntropyLoss(), engine="exact", progress=False
    )
    options: dict[str, Any] = {"num_probes": 2, "num_steps": 40, "progress": False, "dtype": torch.float64}
    if name in ("scripted", "sparse gradient") and engine == "traced":
        with pytest.raises(NotImplementedError, match=r"^spectrum: engine='traced' cannot be had: "):
            blockhess.spectrum(model, data, nn.CrossEntropyLoss(), engine=engine, **options)
        return
    found = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), engine=engine, **options)
    # max_norm is applied to float32 weights.
    rtol = 1e-6 if name == "max_norm" else 1e-10
    for ours, theirs in zip(found.eigenvalue_range(), right.eigenvalue_range()):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-10)


def test_the_fast_path_of_attention_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    for kernel in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        function = getattr(torch, kernel)
        monkeypatch.setattr(torch, kernel, lambda *a, f=function, **k: (taken.append(1), f(*a, **k))[1])
    for kind in ("encoder", "attention"):
        model = before(FrozenAttention(kind))
        model.eval()(labeled(5)[0])
        assert taken, kind
        taken.clear()
        blockhess.spectrum(model, labeled(5), nn.CrossEntropyLoss(), num_probes=1, num_steps=2, progress=False)
        assert not taken, kind
