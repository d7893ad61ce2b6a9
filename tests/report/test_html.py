"""The HTML page without a browser: sizes, what stands in its data, and that hostile files stay data."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockhess.cli.main import main
from blockhess.report import html
from blockhess.report.html.contents import MOST_NODES, condense, page_contents
from blockhess.report.rows import block_records
from blockhess.spectra import Spectra
from tests.helpers.spectra_cases import make_spectra, random_spectra

HOSTILE = [
    "</script><script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "<!--<script>",
    "%%DATA%%",
    "\u2028\ud800\u202e&amp;",
]


class Elements(HTMLParser):
    """The elements of a page, with attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(("", {}, []))  # what follows is no text of that element

    def handle_data(self, data: str) -> None:
        if self.found:
            self.found[-1][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.found if name == tag]


def data_of(html: str) -> dict[str, Any]:
    """The data of the page."""
    ((_, text),) = [(a, t) for a, t in Elements(html).all("script") if a.get("type") == "application/json"]
    data: dict[str, Any] = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return data


def unpacked(result: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Nodes and weights of every block."""
    nodes, weights = (np.frombuffer(base64.b64decode(result[name]), "<f4") for name in ("nodes", "weights"))
    stops = np.cumsum([sum(block["probes"]) for block in result["blocks"]])
    assert stops[-1] == len(nodes) == len(weights)
    return [
        (block["radius"] * x.astype(float), w.astype(float))
        for block, x, w in zip(result["blocks"], np.split(nodes, stops), np.split(weights, stops))
    ]


def test_the_page_holds_the_measures_and_the_matrix() -> None:
    spectra = random_spectra(model="Net", step=7)
    (result,) = data_of(html.render(page_contents([spectra])))["results"]
    assert (result["model"], result["step"], result["summary"]) == ("Net", 7, repr(spectra))
    for (x, w), nodes, weights in zip(unpacked(result), *spectra.merged):
        assert x == pytest.approx(nodes.numpy(), rel=1e-6) and w == pytest.approx(weights.numpy(), rel=1e-6)
    first = result["comparisons"][0]
    upper = np.frombuffer(base64.b64decode(first["matrix"]), "<u2") / 65535
    matrix = spectra.js_matrix().numpy()
    assert upper == pytest.approx(matrix[np.triu_indices(4, 1)], abs=1e-5)
    assert first["text"] == str(spectra.js0(confidence=0.95)) and sorted(first["order"]) == [0, 1, 2, 3]
    for block, record in zip(result["blocks"], block_records(spectra)):
        assert {name: block[name] for name in record} == record


def test_similar_blocks_stand_side_by_side() -> None:
    nodes = [[[0.0, 1.0], [9.0, 9.5], [0.0, 1.01], [9.0, 9.51], [0.01, 1.0]]]
    spectra = make_spectra(nodes, [[[0.5, 0.5]] * 5], dims=[9] * 5)
    order = page_contents([spectra])["results"][0]["comparisons"][0]["order"]
    kinds = [row % 2 for row in order]
    assert kinds in ([0, 0, 0, 1, 1], [1, 1, 0, 0, 0])


def test_hostile_names_stay_data() -> None:
    spectra = make_spectra([[[1.0, 2.0]] * 5], [[[0.5, 0.5]] * 5], names=HOSTILE, notes=HOSTILE, model=HOSTILE[0])
    written = html.render(page_contents([spectra], [HOSTILE[1]]))
    elements = Elements(written)
    assert len(elements.all("script")) == 2 and not elements.all("img")
    assert not any(name.startswith("on") for _, attributes, _ in elements.found for name in attributes)
    (result,) = data_of(written)["results"]
    assert [block["block"] for block in result["blocks"]] == HOSTILE
    assert (result["model"], result["label"]) == (HOSTILE[0], HOSTILE[1])
    written.encode()  # the lone surrogate is escaped


def test_the_page_loads_nothing_and_may_not() -> None:
    written = html.render(page_contents([random_spectra()]))
    assert not re.findall(r"https?://|//cdn|@import|url\(", written)
    elements = Elements(written)
    (policy,) = [a["content"] for a, _ in elements.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    ((_, style),) = elements.all("style")
    (script,) = [text for attributes, text in elements.all("script") if not attributes]
    for text in (style, script):
        assert html._hash(text) in policy
    for script_file in Path(html.__file__).parent.glob("assets/*.js"):
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", script_file.read_text())


@pytest.mark.slow
def test_two_hundred_blocks_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    # 1,000 nodes a block; error bars cost a matrix of all pairs for every probe, so they come from few.
    nodes = torch.randn(10, 200, 100, generator=generator, dtype=torch.float64).sort(-1).values
    spectra = make_spectra(nodes.tolist(), torch.full(nodes.shape, 0.01).tolist(), dims=[5000] * 200)
    assert len(html.render(page_contents([spectra]))) < 6e6


def test_too_many_nodes_are_condensed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockhess.report.html.contents.MOST_NODES", 800)
    spectra = random_spectra(n_probes=5, n_blocks=2, m=100, dims=[1000] * 2)
    made = page_contents([spectra, spectra])
    assert made["condensed"] == 200
    for result in made["results"]:
        for (x, w), (nodes, weights) in zip(unpacked(result), zip(*spectra.merged)):
            assert len(x) <= 200 and w.sum() == pytest.approx(1, abs=1e-6)
            assert float((x * w).sum()) == pytest.approx(float((nodes * weights).sum()), abs=1e-6 * abs(x).max())
            assert (x.min(), x.max()) == pytest.approx((float(nodes.min()), float(nodes.max())), rel=0.05)
    assert page_contents([spectra])["condensed"] == 400


@pytest.mark.parametrize("x", [[3.0, 3.0, 3.0], [0.0, 0.0], [-1e-300, 1e-300], [-1.0, 1e-9, 2e-9, 5e10]])
def test_condensing_degenerate_measures(x: list[float]) -> None:
    w = np.full(len(x), 1 / len(x))
    nodes, weights = condense(np.array(x), w, 10)
    assert weights.sum() == pytest.approx(1)
    assert float(nodes @ weights) == pytest.approx(float(np.mean(x)), rel=1e-12, abs=1e-300)


def test_blocks_of_which_nothing_is_known() -> None:
    spectra = make_spectra(
        [[[1.0, 2.0], [0.0, 0.0]]], [[[0.5, 0.5], [0.0, 0.0]]], steps=[[2, 0]], nonfinite=[[False, True]]
    )
    (result,) = data_of(html.render(page_contents([spectra])))["results"]
    assert [block["lambda_max"] for block in result["blocks"]] == [2.0, None]
    assert result["blocks"][1]["probes"] == [] and result["comparisons"] == []
    assert any("not finite: block1." in text for text in result["highlights"])


def test_report_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(random_spectra(seed=i).save(tmp_path / f"step{i}.npz")) for i in range(2)]
    assert main(["report", *files]) == 0
    path = tmp_path / "step1.html"
    assert capsys.readouterr().out == f"Report written into {path}\n"
    assert [r["label"] for r in data_of(path.read_text())["results"]] == ["step0", "step1"]
    assert main(["report", files[0], "-o", str(tmp_path / "page.html")]) == 0
    assert len(data_of((tmp_path / "page.html").read_text())["results"]) == 1
    one = random_spectra()
    assert one.report(tmp_path / "method.html") == tmp_path / "method.html"
    assert len(data_of((tmp_path / "method.html").read_text())["results"][0]["blocks"]) == len(one)


def test_an_unfinished_run_is_reported() -> None:
    def said(**provenance: Any) -> Any:
        return page_contents([random_spectra(**provenance)])["results"][0]["unfinished"]

    assert said() is None and said(partial=False, hvps=3) is None
    assert said(partial=True).startswith("This run is not finished: ")
    text = said(partial=True, hvps=1200, hvps_planned=5000, blocks_missing=2)
    assert text.endswith("1,200 of at most 5,000 Hessian-vector products are done. 2 of 6 blocks have no spectrum yet.")
    assert said(partial=True, hvps="<b>", hvps_planned=[], blocks_missing="many") == said(partial=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.npz"], "load: no such file: missing.npz"),
        (["{file}", "-o", "{file}/x.html"], "save: cannot write"),
        (["{newer}"], "a newer blockhess wrote it: upgrade"),
        ([], "files"),
    ],
)
def test_report_refuses(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, newer = random_spectra().save(tmp_path / "a.npz"), tmp_path / "newer.npz"
    with np.load(file) as old:
        arrays = dict(old)
    header = arrays["header"].tobytes().replace(b'"version": 1', b'"version": 9')
    np.savez(newer, **arrays | {"header": np.frombuffer(header, np.uint8)})
    given = [argument.format(file=file, newer=newer) for argument in arguments]
    assert main(["report", *given]) == 2
    text = capsys.readouterr().err
    assert message in text.replace("FILES", "files") and text.count("\n") == 1


def test_contents_refuses() -> None:
    with pytest.raises(ValueError, match="results must hold at least one, got none"):
        page_contents([])
    with pytest.raises(ValueError, match="labels must be as many as results, 1, got 2"):
        page_contents([random_spectra()], ["a", "b"])
    some, more = random_spectra(n_blocks=3), random_spectra(n_blocks=4)
    unlike = random_spectra(n_blocks=4, dims=[12, 12, 12, 13])
    with pytest.raises(
        ValueError, match=r"report: results must be of the same blocks.*got a with not all.* b: block3;"
    ):
        page_contents([some, more], ["a", "b"])
    with pytest.raises(ValueError, match=r"got b with other blocks than a: block3;"):
        page_contents([more, unlike], ["a", "b"])
    with pytest.raises(ValueError, match=r"got 2 with other blocks than 1: x, y, z \.\.\.;"):
        page_contents([more, random_spectra(names=["x", "y", "z", "w"])])
    page_contents([random_spectra(n_blocks=3, partial=True), more])  # an unfinished run has not all of them yet
    assert MOST_NODES * 8 * 4 / 3 < 4e6


NODE = shutil.which("node")

SMOOTH = """
const fs = require("fs"), vm = require("vm");
vm.runInThisContext(fs.readFileSync(process.argv[1], "utf8").replaceAll("const ", "var "));
const { blocks, axis, sigma, start, step, count } = JSON.parse(fs.readFileSync(0, "utf8"));
const scale = axis === "asinh" ? defaultScale(blocks) : null;
const nodes = blocks.map((b) => placed(b, scale));
const width = sigma === null ? defaultSigma(extent(nodes)) : sigma;
const all = blocks.map((b, i) => Array.from(density(nodes[i], b.weights, start, step, count, width)));
const one = blocks.map((b, i) => densityAt(nodes[i], b.weights, start + 5 * step, width));
console.log(JSON.stringify({ scale, width, all, one }));
"""


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("axis", ["linear", "asinh"])
@pytest.mark.parametrize("sigma", [None, 0.003, 2.0])
def test_the_page_smooths_as_blockhess_does(axis: str, sigma: float | None) -> None:
    spectra: Spectra = random_spectra(n_probes=2, n_blocks=4, m=20)
    (result,) = page_contents([spectra])["results"]
    scale = spectra.js0(axis=axis).scale
    sizes = [{"radius": b["radius"], "rms": b["rms"]} for b in result["blocks"]]
    start, step, count = -3.0, 0.01, 601
    blocks = [
        s | {"nodes": (x / s["radius"]).tolist(), "weights": w.tolist()} for s, (x, w) in zip(sizes, unpacked(result))
    ]
    job = {"blocks": blocks, "axis": axis, "sigma": sigma, "start": start, "step": step, "count": count}
    script = Path(html.__file__).parent / "assets/density.js"
    done = subprocess.run(
        [str(NODE), "-e", SMOOTH, str(script)], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    got = json.loads(done.stdout)
    width = spectra.default_sigma(axis=axis) if sigma is None else sigma
    assert got["width"] == pytest.approx(width, rel=1e-6)
    if axis == "asinh":
        assert got["scale"] == pytest.approx(scale, rel=1e-6)
    grid = start + step * torch.arange(count, dtype=torch.float64)
    _, expected = spectra.density(sigma=width, grid=grid, axis=axis)
    # Nodes are float32: they move by 6e-8 of their size, on a slope of at most 0.25 / sigma^2.
    tolerance = 6e-8 * 4 / width**2 + 1e-6 / width
    assert np.array(got["all"]) == pytest.approx(expected.numpy(), abs=tolerance)
    assert got["one"] == pytest.approx(expected[:, 5].tolist(), abs=tolerance)
    assert np.array(got["all"]).max() > 100 * tolerance


ERRORS = """
const fs = require("fs"), vm = require("vm");
vm.runInThisContext(fs.readFileSync(process.argv[1], "utf8").replaceAll("const ", "var "));
const { blocks, sigma, start, step, count } = JSON.parse(fs.readFileSync(0, "utf8"));
console.log(JSON.stringify(blocks.map((b) => {
  const nodes = Float64Array.from(b.nodes), weights = Float64Array.from(b.weights);
  const values = density(nodes, weights, start, step, count, sigma);
  return Array.from(densityErrors({ ...b, weights }, nodes, values, start, step, count, sigma));
})));
"""


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_pages_standard_errors() -> None:
    """Of each point's Gaussian, over the probes and over the eigenvalues, with numpy's sums."""
    n_probes, n_blocks, sigma, count = 4, 3, 0.3, 401
    spectra = random_spectra(n_probes=n_probes, n_blocks=n_blocks, m=6, dims=[6, 40, 4000])
    (result,) = page_contents([spectra])["results"]
    blocks = [b | {"nodes": x.tolist(), "weights": w.tolist()} for b, (x, w) in zip(result["blocks"], unpacked(result))]
    job = {"blocks": blocks, "sigma": sigma, "start": -2.0, "step": 0.01, "count": count}
    script = Path(html.__file__).parent / "assets/density.js"
    done = subprocess.run(
        [str(NODE), "-e", ERRORS, str(script)], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    grid = -2.0 + 0.01 * np.arange(count)
    larger = []
    for row, got in enumerate(json.loads(done.stdout)):
        x, w = (part[:, row].numpy() for part in (spectra.quadrature.nodes, spectra.quadrature.weights))
        f = np.exp(-0.5 * ((grid - x[..., None]) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
        of_probes = (w[..., None] * f).sum(1)
        sample = of_probes.var(0, ddof=1)
        mean_square = (w[..., None] * f**2).sum(1).mean(0)
        theory = 2 / (spectra.dims[row] + 2) * (mean_square - of_probes.mean(0) ** 2)
        assert got == pytest.approx(np.sqrt(np.maximum(sample, theory) / n_probes).tolist(), abs=2e-6)
        larger.append(theory > sample)
    assert np.any(larger[0]) and not np.all(larger[2])  # both are tested
