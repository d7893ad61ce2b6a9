"""The README's Python examples run as they stand, and its measured parts are those of bench/results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("example", EXAMPLES, ids=["model", "training", "operator"])
def test_examples_run(example, tmp_path, monkeypatch, capsys):
    if "transformers" in example:
        pytest.importorskip("transformers")
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    if "quadrature" in names:
        log_det, stderr = names["log_det"], names["stderr"]
        exact = [names["np"].linalg.slogdet(kernel)[1] for kernel in names["kernels"]]
        assert all(abs(a - b) < 5 * s for a, b, s in zip(exact, log_det.tolist(), stderr.tolist()))
    elif "watch" in names:
        assert [path.stem for path in sorted((tmp_path / "spectra").iterdir())] == [
            f"step_{step:08d}" for step in (0, 50, 100)
        ]
    else:
        assert (tmp_path / "heatmap.png").stat().st_size > 10_000
        assert "JS0 = " in capsys.readouterr().out


def test_measured_parts_are_up_to_date():
    from bench import readme

    assert readme.replaced(README, "demo", readme.demo_part()) == README
    assert readme.replaced(README, "bench", readme.bench_part()) == README
    assert readme.replaced(README, "products", readme.product_part()) == README
    assert readme.results_page() + "\n" == (ROOT / "bench/results/cpu.md").read_text()
