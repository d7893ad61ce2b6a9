"""Measure imports, `blockhess --help`, and the HTML report of 200 blocks.

    python -m bench.end_to_end.users [--json PATH] [--text PATH] [--quick | --show PATH]

Seconds are CPU time, so that other programs do not count, with files cached by the system. Every import is measured in
a fresh process, alternating with that of torch alone. Redrawing is measured by wall clock in headless Chromium, if it
is installed with chromedriver and selenium: from the change of a slider to the end of drawing.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness import command
from bench.harness.environment import describe, one_line
from blockhess._text import format_table
from blockhess.problem.blocks import BlockInfo
from blockhess.report import html
from blockhess.spectra import Spectra
from blockhess_ext import batched_slq

BLOCKS, PROBES, STEPS, DIM = 200, 10, 100, 2000

# Name -> what is imported after torch.
IMPORTS = {"import blockhess": "import blockhess", "and blockhess.spectrum": "import blockhess; blockhess.spectrum"}

# Quantity -> (text, limit).
TARGETS = {
    "import blockhess": ("<= 0.3 s beyond torch", 0.3),
    "and blockhess.spectrum": ("<= 0.3 s beyond torch", 0.3),
    "blockhess --help": ("<= 1 s", 1.0),
    "page written, s": ("<= 10 s", 10.0),
    "size, MB": ("<= 6 MB", 6.0),
}

REDRAW = """
const [id, count] = arguments, plot = blockhess.spectra, times = [];
blockhess.choose(Array.from({ length: count }, (_, i) => i));
const slider = document.getElementById(id);
for (let i = -15; i < 15; i++) {
  slider.value = String(10 * i);
  const start = performance.now();
  plot.update();
  document.getElementById("density").getContext("2d").getImageData(0, 0, 1, 1);
  times.push(performance.now() - start);
}
slider.value = "0";
return times;
"""


def seconds(*command: str) -> float:
    """Return the CPU seconds of a fresh process of this interpreter."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = spent()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return spent() - start


def startup(rounds: int) -> dict[str, float]:
    """Return medians over rounds of the time of each import beyond torch, and of --help."""
    extra: dict[str, list[float]] = {name: [] for name in IMPORTS}
    base, shown = [], []
    for _ in range(rounds + 1):
        base.append(seconds("-c", "import torch"))
        for name, code in IMPORTS.items():
            extra[name].append(seconds("-c", f"import torch; {code}") - base[-1])
        shown.append(seconds("-m", "blockhess.cli.main", "--help"))
    # The first round reads the files from disk.
    medians = {name: statistics.median(values[1:]) for name, values in extra.items()}
    return {"import torch": statistics.median(base[1:])} | medians | {"blockhess --help": statistics.median(shown[1:])}


def many_blocks(blocks: int) -> Spectra:
    """Return spectra of diagonal Hessians with a bulk and a few outliers."""
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** (4 * torch.rand(blocks, 1, generator=generator, dtype=torch.float64) - 4)
    eigenvalues = scale * torch.randn(blocks, DIM, generator=generator, dtype=torch.float64)
    eigenvalues[:, :5] *= 10
    flat = eigenvalues.flatten()
    options: dict[str, Any] = {"num_probes": PROBES, "num_steps": STEPS, "reorthogonalize": "none"}
    quadrature = batched_slq(lambda v: flat * v, [DIM] * blocks, dtype=torch.float64, **options)
    names = [f"layers.{i // 4}.{('query', 'key', 'value', 'mlp')[i % 4]}.weight" for i in range(blocks)]
    return Spectra([BlockInfo(name, (50, DIM // 50), DIM, (name,), "") for name in names], quadrature, {"model": "GPT"})


def measure_browser(path: Path, blocks: int) -> dict[str, float]:
    """Return milliseconds in headless Chromium; empty if it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        return {}
    if not (chromium and driver):
        return {}
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,900"):
        options.add_argument(f"--{argument}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        browser.get(path.as_uri())
        loaded = browser.execute_script("return performance.getEntriesByType('navigation')[0].loadEventEnd")
        found = {"page loaded, ms": loaded}
        for count in (6, 8, blocks):
            times = browser.execute_script(REDRAW, "sigma", count)
            found[f"{count} curves drawn anew, ms"] = statistics.median(times)
        return found
    finally:
        browser.quit()


def measure(quick: bool) -> dict[str, Any]:
    """Return the result that the table shows."""
    blocks = 20 if quick else BLOCKS
    found = startup(1 if quick else 5)
    spectra = many_blocks(blocks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        start = time.process_time()
        html.write([spectra], path)
        found["page written, s"] = time.process_time() - start
        found["size, MB"] = path.stat().st_size / 1e6
        found |= measure_browser(path, blocks)
    return {"blocks": blocks, "found": found, "load": os.getloadavg()[0], "machine": describe()}


def text(result: dict[str, Any]) -> str:
    """Return the table of a result."""
    rows = []
    for what, value in result["found"].items():
        target, limit = TARGETS.get(what, ("", 0.0))
        unit = "" if what.endswith(("ms", "MB", ", s")) else " s"
        rows.append([what, f"{value:.3g}{unit}", target, ("met" if value <= limit else "missed") if target else ""])
    about = f"{result['blocks']} blocks, {PROBES} probes, {STEPS} steps"
    return (
        f"CPU seconds, imports beyond torch; the HTML report is of {about}.\n\n"
        f"{format_table(['what', 'measured', 'target', ''], rows)}\n\n{one_line(result['machine'])}; load average "
        f"{result['load']:.1f}; times in ms are wall-clock times"
    )


def main() -> None:
    command.run(__doc__, measure, text, quick="few blocks and one round, to check that it runs")


if __name__ == "__main__":
    main()
