"""What a user waits for beside the job itself: imports, `blockhess --help`, and the HTML page of 200 blocks.

    python -m bench.end_to_end.users [--json PATH] [--text PATH] [--quick | --show PATH]

Seconds are the processor's, so that other programs do not count; files are in memory by then. Every import is of a
fresh process, in turns with torch's own. The page's pictures are timed by the clock in headless Chromium, if it is
installed with chromedriver and selenium: from the change of a slider to the end of the drawing.
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

from bench.harness.command import arguments, result_of, tell
from bench.harness.environment import describe
from blockhess._text import format_table
from blockhess.problem.blocks import BlockInfo
from blockhess.report import html
from blockhess.spectra import Spectra
from blockhess_ext import batched_slq

BLOCKS, PROBES, STEPS, DIM = 200, 10, 100, 2000

# What is imported after torch; "--help" is a command of its own.
IMPORTS = {"import blockhess": "import blockhess", "and blockhess.spectrum": "import blockhess; blockhess.spectrum"}

# what -> (text, limit)
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
    """Of a fresh process of this interpreter."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    start = spent()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return spent() - start


def startup(rounds: int) -> dict[str, float]:
    """Medians over rounds: of the extra time of each import, and of the time of --help."""
    extra: dict[str, list[float]] = {name: [] for name in IMPORTS}
    base, shown = [], []
    for _ in range(rounds + 1):
        base.append(seconds("-c", "import torch"))
        for name, code in IMPORTS.items():
            extra[name].append(seconds("-c", f"import torch; {code}") - base[-1])
        shown.append(seconds("-m", "blockhess.cli.main", "--help"))
    # The first round reads the files from the disk.
    medians = {name: statistics.median(values[1:]) for name, values in extra.items()}
    return {"import torch": statistics.median(base[1:])} | medians | {"blockhess --help": statistics.median(shown[1:])}


def many_blocks(blocks: int) -> Spectra:
    """Spectra of diagonal Hessians, with a bulk and some outliers each."""
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** (4 * torch.rand(blocks, 1, generator=generator, dtype=torch.float64) - 4)
    eigenvalues = scale * torch.randn(blocks, DIM, generator=generator, dtype=torch.float64)
    eigenvalues[:, :5] *= 10
    flat = eigenvalues.flatten()
    quadrature = batched_slq(
        lambda v: flat * v,
        [DIM] * blocks,
        num_probes=PROBES,
        num_steps=STEPS,
        dtype=torch.float64,
        reorthogonalize="none",
    )
    names = [f"layers.{i // 4}.{('query', 'key', 'value', 'mlp')[i % 4]}.weight" for i in range(blocks)]
    return Spectra([BlockInfo(name, (50, DIM // 50), DIM, (name,), "") for name in names], quadrature, {"model": "GPT"})


def browsing(path: Path, blocks: int) -> dict[str, float]:
    """Milliseconds in headless Chromium, or none where it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        return {}
    if not (chromium and driver):
        return {}
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
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
    """All of it."""
    torch.set_num_threads(1)
    blocks = 20 if quick else BLOCKS
    found = startup(1 if quick else 5)
    spectra = many_blocks(blocks)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        start = time.process_time()
        html.write([spectra], path)
        found["page written, s"] = time.process_time() - start
        found["size, MB"] = path.stat().st_size / 1e6
        found |= browsing(path, blocks)
    return {"blocks": blocks, "found": found, "load": os.getloadavg()[0], "machine": describe()}


def told(result: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for what, value in result["found"].items():
        text, limit = TARGETS.get(what, ("", 0.0))
        unit = "" if what.endswith(("ms", "MB", ", s")) else " s"
        rows.append([what, f"{value:.3g}{unit}", text, ("met" if value <= limit else "missed") if text else ""])
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    about = f"{result['blocks']} blocks, {PROBES} probes, {STEPS} steps"
    return (
        f"Seconds of the processor, imports beyond torch's own; the page is of {about}.\n\n"
        f"{format_table(['what', 'measured', 'target', ''], rows)}\n\n{machine}; load {result['load']:.1f} on "
        f"{os.cpu_count()} cores; times in ms are the clock's, which other programs lengthen"
    )


def main() -> None:
    """Measure, or show what was kept."""
    options = arguments(__doc__, "few blocks, one round: that it runs").parse_args()
    result = result_of(options, measure)
    tell(options, result, told(result))


if __name__ == "__main__":
    main()
