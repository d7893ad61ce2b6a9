"""The README's Python examples and commands run as they stand, and its measured parts are those of bench/results."""

from __future__ import annotations

import pytest

from tests import ROOT
from tests.helpers.newcomer import follow

README = ROOT / "README.md"


def test_it_is_as_it_says(tmp_path, monkeypatch, capsys, passed_over):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    followed = follow(README)
    names, passed_over["README.md"] = followed.names, followed.passed_over
    log_det, stderr = names["log_det"], names["stderr"]
    exact = [names["np"].linalg.slogdet(kernel)[1] for kernel in names["kernels"]]
    assert all(abs(a - b) < 5 * s for a, b, s in zip(exact, log_det.tolist(), stderr.tolist()))
    assert sorted(path.name for path in (tmp_path / "spectra").iterdir()) == [
        *(f"step_{step:08d}.npz" for step in (0, 50)), "step_00000100.html", "step_00000100.npz"
    ]  # fmt: skip
    assert (tmp_path / "heatmap.png").stat().st_size > 10_000
    assert "JS0 = " in capsys.readouterr().out


def test_measured_parts_are_up_to_date():
    from docs._generate import readme

    text = README.read_text()
    assert readme.replaced(text, "demo", readme.demo_part()) == text
    assert readme.replaced(text, "bench", readme.bench_part()) == text
    assert readme.replaced(text, "products", readme.product_part()) == text
    assert readme.results_page() + "\n" == (ROOT / "bench/results/cpu.md").read_text()
