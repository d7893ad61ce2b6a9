"""The HTML page in headless Chromium: it loads silently, and pointer, keys, sliders and clicks do what they say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from blockhess.analysis.axes import Axis
from blockhess.report import html
from tests.helpers.spectra_cases import random_spectra
from tests.report.test_html import HOSTILE as ALL_HOSTILE

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.actions.pointer_input import PointerInput  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not both installed")

N_BLOCKS = 12

HOSTILE = [name for name in ALL_HOSTILE if "\ud800" not in name]  # chromedriver cannot tell of half a character


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    names = [f"layers.{i}.weight" for i in range(N_BLOCKS - len(HOSTILE))] + HOSTILE
    results = [
        random_spectra(n_blocks=N_BLOCKS, seed=i, names=names, model=HOSTILE[0], step=100 * i, dims=[500] * N_BLOCKS)
        for i in range(3)
    ]
    html.write(results, folder / "three.html", [f"step {100 * i}" for i in range(3)])
    html.write(results[:1], folder / "one.html")
    html.write([random_spectra(n_blocks=1)], folder / "single.html")
    html.write([random_spectra(n_probes=1, partial=True)], folder / "unfinished.html")
    return folder


def opened(browser: Any, path: Path, width: int = 1280, dark: bool = False) -> Any:
    wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wishes.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(path.as_uri())
    drawn(browser)
    return browser


def drawn(browser: Any) -> None:
    """Wait for two frames: what was to be drawn is."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def text(browser: Any, name: str) -> str:
    return str(browser.find_element(By.ID, name).text)


def chosen(browser: Any) -> list[str]:
    return list(browser.execute_script("return blockhess.spectra.curves.map((c) => c.block.block)"))


def pixels(browser: Any, name: str) -> str:
    return str(browser.execute_script(f"return document.getElementById('{name}').toDataURL()"))


def slide(browser: Any, name: str, value: int) -> None:
    browser.execute_script(
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('input'))",
        name,
        value,
    )
    drawn(browser)


def test_the_log_hears_complaints(browser: Any, pages: Path, tmp_path: Path) -> None:
    """Otherwise the tests below could not fail."""
    written = (pages / "one.html").read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(written.replace("window.blockhess = new Page", "window.blockhess = new Paper"))
    browser.get(broken.as_uri())
    assert any("Content Security Policy" in message for message in complaints(browser))  # another hash: it may not run
    assert not browser.execute_script("return window.blockhess")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["three", "single"])
def test_it_loads_silently_and_fits(browser: Any, pages: Path, name: str, width: int) -> None:
    opened(browser, pages / f"{name}.html", width)
    assert complaints(browser) == []
    content, window = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert content <= window == width
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('p,td,th,li,dd,dt,button,output')]"
        ".map((e) => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 11.5
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button,input,select,canvas[tabindex],[role=region]')].filter((e) =>"
        " !e.getAttribute('aria-label') && !e.textContent.trim() && !(e.labels && e.labels.length)).length"
    )
    assert unnamed == 0
    assert browser.find_element(By.ID, "evolution").is_displayed() == (name == "three")
    assert browser.find_element(By.ID, "comparison").is_displayed() == (name == "three")


def test_it_asks_for_nothing(browser: Any, pages: Path) -> None:
    browser.get_log("performance")
    opened(browser, pages / "three.html")
    asked = [
        entry["message"] for entry in browser.get_log("performance") if 'Network.requestWillBeSent"' in entry["message"]
    ]
    assert all('"url":"file:' in message or '"url":"data:' in message for message in asked) and asked


def test_hostile_names_are_text(browser: Any, pages: Path) -> None:
    opened(browser, pages / "three.html")
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0
    assert browser.execute_script("return document.scripts.length") == 2
    cells = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "td.name")]
    assert HOSTILE[0] in cells and HOSTILE[1] in cells
    assert HOSTILE[0] in text(browser, "model")


def contrast(browser: Any, selector: str) -> float:
    """Contrast ratio of an element's text and what is behind it, as WCAG 2 defines it."""
    pair = browser.execute_script(
        "let e = document.querySelector(arguments[0]); const ink = getComputedStyle(e).color;"
        "while (/, 0\\)$/.test(getComputedStyle(e).backgroundColor)) e = e.parentElement;"
        "return [ink, getComputedStyle(e).backgroundColor]",
        selector,
    )

    def luminance(rgb: str) -> float:
        linear = [(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for c in
                  (int(part) / 255 for part in re.findall(r"\d+", rgb)[:3])]  # fmt: skip
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, pair))
    return (light + 0.05) / (dark + 0.05)


def test_colors_follow_the_scheme(browser: Any, pages: Path) -> None:
    seen = []
    for dark in (False, True):
        opened(browser, pages / "one.html", dark=dark)
        body, card = browser.execute_script(
            "return [getComputedStyle(document.body).color, "
            "getComputedStyle(document.querySelector('.card')).backgroundColor]"
        )
        ink, paper = (sum(map(int, rgb[4:-1].split(", "))) for rgb in (body, card))
        assert (ink > paper) == dark and abs(ink - paper) > 500
        for selector in (".card .quiet", ".segments input:checked + span", "thead button", "dt"):
            assert contrast(browser, selector) >= 4.5, selector
        seen.append(pixels(browser, "density"))
    assert seen[0] != seen[1]


def test_curves_agree_with_blockhess(browser: Any, pages: Path) -> None:
    """What is drawn, on both axes: heights at the points of the page's own grid."""
    opened(browser, pages / "one.html")
    spectra = random_spectra(n_blocks=N_BLOCKS, seed=0, dims=[500] * N_BLOCKS)
    for axis in ("linear", "asinh"):
        browser.execute_script(f"document.querySelector('#axis input[value={axis}]').click()")
        drawn(browser)
        rows, sigma, scale, low, high, heights = browser.execute_script(
            "const s = blockhess.spectra; return [blockhess.chosen, s.sigma, s.scale, s.frame.low, s.frame.high,"
            " s.curves.map((c) => Array.from(c.values))]"
        )
        names = [spectra.names[row] for row in rows]
        assert sigma == pytest.approx(spectra.default_sigma(names, axis), rel=1e-6)
        count = len(heights[0])
        step = min(max(sigma / 6, (high - low) / 6000), (high - low) / 200)
        grid = low + step * torch.arange(count, dtype=torch.float64)
        _, density = spectra.density(sigma, grid, Axis(axis, scale=scale), names)
        expected = (density * sigma * (2 * torch.pi) ** 0.5).numpy()
        for got, want in zip(heights, expected):
            assert got == pytest.approx(want.tolist(), abs=1e-4)
        assert expected.max() > 0.1


def test_sliders_and_axes_redraw(browser: Any, pages: Path) -> None:
    opened(browser, pages / "one.html")
    before, said = pixels(browser, "density"), text(browser, "sigma-readout")
    slide(browser, "sigma", 100)
    assert pixels(browser, "density") != before and text(browser, "sigma-readout") != said
    assert text(browser, "sigma-readout").endswith("10 % of the range")
    before = pixels(browser, "density")
    slide(browser, "scale", -200)
    assert pixels(browser, "density") != before
    browser.find_element(By.CSS_SELECTOR, "#axis label:first-of-type").click()
    drawn(browser)
    assert not browser.find_element(By.ID, "scale").is_displayed()
    browser.find_element(By.ID, "reset").click()
    assert text(browser, "sigma-readout").endswith(", 1 % of the range")
    assert complaints(browser) == []


def test_standard_errors_are_drawn_and_can_be_left_out(browser: Any, pages: Path) -> None:
    opened(browser, pages / "one.html")
    with_bands = pixels(browser, "density")
    canvas = browser.find_element(By.ID, "density")
    canvas.send_keys(Keys.ARROW_RIGHT)
    assert " ± " in text(browser, "density-readout")
    browser.find_element(By.ID, "bands").send_keys(Keys.SPACE)
    drawn(browser)
    assert pixels(browser, "density") != with_bands
    canvas.send_keys(Keys.ARROW_RIGHT)
    assert " ± " not in text(browser, "density-readout")
    opened(browser, pages / "unfinished.html")  # of one probe
    assert not browser.find_element(By.ID, "bands").is_displayed()
    assert complaints(browser) == []


@pytest.mark.parametrize("dark", [False, True])
def test_an_unfinished_run_has_a_banner(browser: Any, pages: Path, dark: bool) -> None:
    opened(browser, pages / "one.html", dark=dark)
    assert not browser.find_element(By.ID, "unfinished").is_displayed()
    opened(browser, pages / "unfinished.html", dark=dark)
    assert "not finished" in text(browser, "unfinished") and contrast(browser, "#unfinished") >= 4.5
    assert chosen(browser)


@pytest.mark.parametrize("dark", [False, True])
def test_many_curves_stand_out_from_the_page(browser: Any, pages: Path, dark: bool) -> None:
    opened(browser, pages / "one.html", dark=dark)
    browser.find_element(By.ID, "choose-all").click()
    drawn(browser)
    strokes = browser.execute_script("return blockhess.spectra.curves.map((c) => c.stroke)")
    paper = browser.execute_script("return getComputedStyle(document.querySelector('.card')).backgroundColor")
    paper_channels, *channels = ([int(part) for part in re.findall(r"\d+", c)] for c in (paper, *strokes))
    assert len(channels) == N_BLOCKS
    assert all(max(abs(a - b) for a, b in zip(stroke, paper_channels)) > 90 for stroke in channels)


def test_pointer_reads_values_and_zooms(browser: Any, pages: Path) -> None:
    opened(browser, pages / "one.html")
    canvas = browser.find_element(By.ID, "density")
    move = webdriver.ActionChains(browser, duration=0).move_to_element_with_offset
    move(canvas, 0, 0).perform()
    drawn(browser)
    assert text(browser, "tip").startswith("eigenvalue ")
    whole = browser.execute_script("return blockhess.spectra.view()")
    actions = webdriver.ActionChains(browser, duration=0).move_to_element_with_offset(canvas, -60, 0)
    actions.click_and_hold().move_by_offset(120, 0).release().perform()
    part = browser.execute_script("return blockhess.spectra.view()")
    assert whole[0] < part[0] < part[1] < whole[1]
    webdriver.ActionChains(browser).double_click(canvas).perform()
    assert browser.execute_script("return blockhess.spectra.view()") == whole


def test_a_cell_of_the_heat_map_shows_its_two_spectra(browser: Any, pages: Path) -> None:
    opened(browser, pages / "one.html")
    canvas = browser.find_element(By.ID, "heatmap")
    left, size, rows, names = browser.execute_script(
        "const h = blockhess.heatmap; return [h.frame.left, h.frame.size, h.rows, h.names]"
    )
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)  # offsets are from what is in view
    box = canvas.rect
    x, y = left + 4.5 * size - box["width"] / 2, 1.5 * size - box["height"] / 2
    webdriver.ActionChains(browser).move_to_element_with_offset(canvas, int(x), int(y)).click().perform()
    drawn(browser)
    assert chosen(browser) == [names[1], names[4]]
    spectra = random_spectra(n_blocks=N_BLOCKS, seed=0)
    distance = float(spectra.js_matrix()[rows[1], rows[4]])
    told = text(browser, "heatmap-readout")
    assert told.startswith("Showing distance ")
    assert float(told.split()[2].rstrip(",").replace("−", "-")) == pytest.approx(distance, rel=0.01, abs=1e-4)
    plain = pixels(browser, "heatmap")
    browser.find_element(By.ID, "stretch").send_keys(Keys.SPACE)
    drawn(browser)
    assert pixels(browser, "heatmap") != plain
    upper = spectra.js_matrix().triu(1)
    assert browser.execute_script("return blockhess.heatmap.top") == pytest.approx(float(upper.max()), abs=1e-4)
    browser.execute_script("document.querySelector('#order input[value=model]').click()")
    assert browser.execute_script("return blockhess.heatmap.rows") == list(range(N_BLOCKS))


def tap(browser: Any, canvas: Any, x: float, y: float) -> None:
    """Touch a canvas, x and y from its left upper corner."""
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", canvas)
    left, top = browser.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.left, b.top]", canvas)
    actions = ActionBuilder(browser, mouse=PointerInput("touch", "finger"), duration=0)
    finger = actions.pointer_action
    finger.move_to_location(int(left + x), int(top + y)).pointer_down().pointer_up()
    actions.perform()
    drawn(browser)


def test_fingers(browser: Any, pages: Path) -> None:
    opened(browser, pages / "three.html", width=390)
    density, heatmap, history = (browser.find_element(By.ID, name) for name in ("density", "heatmap", "history"))
    tap(browser, density, 150, 80)
    assert text(browser, "density-readout").startswith("eigenvalue ")
    left, size, names = browser.execute_script(
        "const h = blockhess.heatmap; return [h.frame.left, h.frame.size, h.names]"
    )
    tap(browser, heatmap, left + 2.5 * size, 5.5 * size)
    assert chosen(browser) == [names[5], names[2]]
    tap(browser, history, browser.execute_script("return blockhess.evolution.frame.x(0)"), 100)
    assert browser.execute_script("return blockhess.current") == 0
    assert complaints(browser) == []


def test_everything_can_be_done_with_keys(browser: Any, pages: Path) -> None:
    opened(browser, pages / "three.html")
    canvas = browser.find_element(By.ID, "density")
    canvas.send_keys(Keys.ARROW_RIGHT)
    assert text(browser, "density-readout").startswith("eigenvalue ")
    whole = browser.execute_script("return blockhess.spectra.view()")
    canvas.send_keys("+")
    assert browser.execute_script("return blockhess.spectra.view()") != whole
    canvas.send_keys("0")
    heatmap = browser.find_element(By.ID, "heatmap")
    heatmap.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ENTER)
    names = browser.execute_script("return blockhess.heatmap.names")
    assert chosen(browser) == [names[2], names[0]]
    history = browser.find_element(By.ID, "history")
    history.send_keys(Keys.ARROW_LEFT, Keys.ENTER)
    assert browser.execute_script("return blockhess.current") == 1
    assert chosen(browser) == [names[2], names[0]]  # the same blocks in another checkpoint
    box = browser.find_element(By.CSS_SELECTOR, "tbody input")
    was = box.is_selected()
    box.send_keys(Keys.SPACE)
    assert browser.find_element(By.CSS_SELECTOR, "tbody input").is_selected() != was
    assert complaints(browser) == []


def test_the_table_sorts_filters_and_chooses(browser: Any, pages: Path) -> None:
    opened(browser, pages / "one.html")

    def column() -> list[str]:
        return [row.text for row in browser.find_elements(By.CSS_SELECTOR, "td.name") if row.is_displayed()]

    spectra = random_spectra(n_blocks=N_BLOCKS, seed=0)
    in_order = column()
    heading = browser.find_element(By.CSS_SELECTOR, "th[data-key=lambda_max]")
    heading.find_element(By.TAG_NAME, "button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    by_value = spectra.eigenvalue_range()[1].argsort(descending=True).tolist()
    assert column() == [in_order[row] for row in by_value]
    heading.find_element(By.TAG_NAME, "button").click()
    assert column() == [in_order[row] for row in reversed(by_value)] != in_order
    heading.find_element(By.TAG_NAME, "button").click()
    assert heading.get_attribute("aria-sort") is None and column() == in_order
    browser.find_element(By.ID, "filter").send_keys("layers.1")
    assert column() == ["layers.1.weight"]
    browser.find_element(By.ID, "choose-all").click()
    assert chosen(browser) == ["layers.1.weight"]
    browser.find_element(By.ID, "choose-none").click()
    assert chosen(browser) == [] and "Choose blocks" in text(browser, "legend")
    assert complaints(browser) == []


def test_evolution_shows_every_quantity(browser: Any, pages: Path) -> None:
    opened(browser, pages / "three.html")
    seen = set()
    options = browser.find_elements(By.CSS_SELECTOR, "#quantity option")
    for option in options:
        option.click()
        drawn(browser)
        seen.add(pixels(browser, "history"))
    assert len(seen) == len(options) == 7
    assert browser.execute_script("return blockhess.evolution.positions") == [0, 100, 200]
    assert complaints(browser) == []
