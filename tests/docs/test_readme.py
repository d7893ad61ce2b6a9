"""README fits one page, its examples run and are what they claim, and its numbers are those of committed results."""

from __future__ import annotations

import torch

import blockhess
from blockhess_ext import ops
from blockhess_ext.layout import Layout
from docs._generate import readme
from tests import ROOT
from tests.helpers.newcomer import follow, parts

README = ROOT / "README.md"


def test_it_is_one_page():
    text = README.read_bytes()
    assert len(text) <= 6144 and text.count(b"\n") <= 130


def test_it_is_as_it_says(tmp_path, monkeypatch, capsys, passed_over):
    monkeypatch.chdir(tmp_path)
    followed = follow(README)
    passed_over["README.md"] = followed.passed_over
    assert isinstance(followed.names["spectra"], blockhess.Spectra)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "JS0 = " in capsys.readouterr().out


def test_the_equivalent_code_gives_the_same_nodes(float64_models):
    (code,) = (text for language, text in parts(README) if language == "python" and "def lanczos" in text)
    names = {"torch": torch}
    exec(code, names)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    data, loss_fn, steps = (torch.randn(32, 6), torch.randint(3, (32,))), torch.nn.CrossEntropyLoss(), 10
    spectra = blockhess.spectrum(
        model, data, loss_fn, num_probes=2, num_steps=steps, engine="autograd", reorthogonalize="none", progress=False
    )
    q = spectra.quadrature
    layout = Layout.of(q.dims)
    probes = ops.random_probes(layout, 2, seed=q.seed, block_ids=torch.tensor(q.block_ids), dtype=torch.float64)
    for probe in range(2):
        v = probes[probe, : model[0].weight.numel()].view_as(model[0].weight)
        nodes, weights = names["lanczos"](loss_fn(model(data[0]), data[1]), model[0].weight, v, steps)
        torch.testing.assert_close(q.nodes[probe, 0, :steps], nodes.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(q.weights[probe, 0, :steps], weights.detach(), rtol=1e-7, atol=1e-10)


def test_measured_parts_are_up_to_date():
    for path, text in readme.pages().items():
        assert path.read_text() == text, f"{path.name}: run python -m docs._generate.readme"
