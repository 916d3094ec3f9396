"""The report page in a real browser: quiet, drawn, readable at both widths and in both colour schemes."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report_page import FIGURES, make_directory

from sqa.experiments.plan import Plan
from sqa.experiments.report import read_experiment, write_report

pytestmark = [pytest.mark.browser, pytest.mark.slow]

WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")

# What is wider than the window, or text of a chart that its drawing cuts off; tables scroll in a box of their own.
OVERFLOWING = """
const wide = [...document.body.querySelectorAll("*")].filter(e => !e.closest(".wide, svg") &&
  e.getClientRects().length && e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.outerHTML);
const cut = [...document.querySelectorAll(".chart svg")].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(t => t.textContent && +getComputedStyle(t).opacity).filter(t => {
    const r = t.getBoundingClientRect();
    return r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1;
  }).map(t => svg.closest(".chart").id + ": " + t.textContent);
});
const scrolled = [...document.querySelectorAll(".wide")].filter(e => e.scrollWidth > e.clientWidth).length;
return {page: document.documentElement.scrollWidth, window: window.innerWidth, wide, cut, scrolled};
"""

# Texts of one chart that lie on each other by more than a sliver.
OVERLAPPING = """
return [...document.querySelectorAll(".chart svg")].flatMap(svg => {
  const texts = [...svg.querySelectorAll("text")].filter(t => t.textContent && +getComputedStyle(t).opacity);
  const boxes = texts.map(t => t.getBoundingClientRect());
  const found = [];
  boxes.forEach((a, i) => boxes.slice(0, i).forEach((b, j) => {
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    const both = texts[j].textContent + " on " + texts[i].textContent;
    if (x > 2 && y > 4) found.push(svg.closest(".chart").id + ": " + both);
  }));
  return found;
});
"""

# The widest gap between figures of each column.
HOLES = """
const columns = {};
for (const figure of document.querySelectorAll("figure")) {
  const box = figure.getBoundingClientRect();
  (columns[Math.round(box.left)] ??= []).push(box);
}
return Object.values(columns).map(boxes => {
  boxes.sort((a, b) => a.top - b.top);
  return Math.max(0, ...boxes.slice(1).map((box, i) => box.top - boxes[i].bottom));
});
"""

# The contrast (WCAG 2) of every text and mark with the page's paper; the numbers of a heat map stand on its cells.
CONTRASTS = """
const channels = colour => colour.match(/[\\d.]+/g).map(Number);
const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = colour => {
  const [r, g, b] = channels(colour).map(v => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const paper = light(getComputedStyle(document.body).backgroundColor);
const contrast = (colour, ground = paper) => {
  const ink = light(colour);
  return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
};
const seen = colour => /^rgb/.test(colour) && (channels(colour).length < 4 || channels(colour)[3] > 0);
const words = [...document.querySelectorAll("h1, h2, p, li, th, td, figcaption, .unsure, .chart text")]
  .filter(e => e.textContent.trim() && e.getClientRects().length && !e.closest("#grid .role-mark"))
  .map(e => [e.textContent.slice(0, 40), e.closest("svg") ? getComputedStyle(e).fill : getComputedStyle(e).color]);
const marks = [...document.querySelectorAll(".chart:not(#grid) .role-mark path")]
  .filter(e => +getComputedStyle(e).opacity > 0.9 && e.getBoundingClientRect().width > 1)
  .flatMap(e => ["fill", "stroke"].map(name => [e.closest(".chart").id, getComputedStyle(e)[name]]))
  .filter(([, colour]) => seen(colour));
const worst = pairs => Object.fromEntries(pairs.map(([name, c]) => [name + " " + c, contrast(c)]).filter(([, c]) => c));
const cells = [...document.querySelectorAll("#grid .role-mark path")].flatMap(cell =>
  [...document.querySelectorAll("#grid .role-mark text")].map(text =>
    contrast(getComputedStyle(text).fill, light(getComputedStyle(cell).fill))));
return {words: worst(words), marks: worst(marks), cells};
"""


class Browser:
    """Headless Chromium with one page open."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def show(self, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
        """Open the page as a window of this width and colour scheme shows it, and wait until its figures are drawn."""
        from selenium.webdriver.support.ui import WebDriverWait

        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for log in ("browser", "performance"):
            self.driver.get_log(log)  # forgets what other pages left
        self.driver.get(page.as_uri())
        WebDriverWait(self.driver, 60).until(lambda driver: driver.execute_script(
            'return document.body.classList.contains("drawn")'
        ))  # fmt: skip

    def ask(self, script: str) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script)

    def complaints(self) -> list[str]:
        """What has been written to the console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that have been asked for."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def point_at(self, selector: str, across: float, down: float) -> None:
        """Move the pointer to a place in an element, given as shares of its width and height."""
        self.ask(f'document.querySelector("{selector}").scrollIntoView({{block: "center"}})')
        box = self.ask(f'return document.querySelector("{selector}").getBoundingClientRect().toJSON()')
        for step in (0, 1):  # a pointer that enters, and then moves
            at = {"x": box["x"] + across * box["width"] + step, "y": box["y"] + down * box["height"]}
            self.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **at})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium, or a skip."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    driver_program = shutil.which("chromedriver")
    if program is None or driver_program is None:
        pytest.skip("browser: no chromium with its chromedriver here")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_program))
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of eight variants and three seeds."""
    return write_report(read_experiment([make_directory(tmp_path_factory.mktemp("report") / "made-up")]))[0]


def test_page_draws_everything_and_asks_nobody(browser: Browser, page: Path) -> None:
    browser.show(page)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    drawn = browser.ask(
        'return [...document.querySelectorAll(".chart")].map(e => [e.id, e.querySelector("svg").clientWidth,'
        ' e.querySelectorAll(".role-mark path").length])'
    )
    assert [name for name, _, _ in drawn] == FIGURES
    for name, width, marks in drawn:
        assert width > 300, name
        assert marks >= 7, name


@pytest.mark.parametrize(("figure", "words"), [
    ("loss-over-tokens", ("variant", "loss", "tokens")),
    ("loss-over-seconds", ("variant", "loss", "seconds")),
    ("loss-against-gqa", ("variant", "difference", "tokens")),
    ("parameters", ("variant", "value")),
])  # fmt: skip
def test_values_show_under_the_pointer(browser: Browser, page: Path, figure: str, words: tuple[str, ...]) -> None:
    browser.show(page)
    browser.point_at(f"#{figure} svg", 0.4, 0.4 if figure.startswith("loss-over") else 0.3)
    shown = browser.ask(
        'const tip = document.querySelector("#vg-tooltip-element.visible"); return tip && '
        "[tip.innerText, tip.getBoundingClientRect().right <= innerWidth]"
    )
    assert shown is not None
    text, inside = shown
    assert all(word in text for word in words), text
    assert inside


@pytest.fixture(scope="module")
def pages(page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the pages by what they hold: also committed runs of two lengths, and the losses of all head counts."""
    folder, root = tmp_path_factory.mktemp("pages"), Path(__file__).resolve().parents[2] / "benchmarks"
    horizons = [root / "results" / name for name in ("horizon-2M", "horizon-16M")]
    plan = Plan.read(str(root / "plans" / "grid.toml"))
    same = {"variants": plan.variants, "shapes": plan.shapes, "model": plan.model, "shape": "demo", "timing_rounds": 0}
    return {
        "variants": page,
        "horizons": write_report(read_experiment(horizons), folder / "horizons")[0],
        "grid": write_report(read_experiment([make_directory(folder / "grid", seeds=1, steps=5, **same)]))[0],
    }


HELD = pytest.mark.parametrize("held", ["variants", "horizons", "grid"])


@HELD
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_or_overlaps(browser: Browser, pages: dict[str, Path], held: str, width: int) -> None:
    browser.show(pages[held], width=width)
    assert browser.complaints() == []
    found = browser.ask(OVERFLOWING)
    assert found["window"] == width
    assert found["page"] <= width
    assert found["wide"] == []
    assert found["cut"] == []
    assert width < 600 or found["scrolled"] == 0  # tables scroll on a telephone only
    assert browser.ask(OVERLAPPING) == []
    holes = browser.ask(HOLES)
    assert len(holes) == (1 if width < 600 else 2)  # as many columns
    assert max(holes) < 60


@HELD
@pytest.mark.parametrize("scheme", SCHEMES)
def test_words_and_marks_stand_out_from_the_paper(
    browser: Browser, pages: dict[str, Path], held: str, scheme: str
) -> None:
    browser.show(pages[held], scheme=scheme)
    contrasts = browser.ask(CONTRASTS)
    assert len(contrasts["words"]) > 100
    assert len(contrasts["marks"]) >= 3
    # WCAG 2.1 asks for 4.5 of text (1.4.3) and 3 of marks that have no label beside them (1.4.11)
    assert {what: c for what, c in contrasts["words"].items() if c < 4.5} == {}
    assert {what: c for what, c in contrasts["marks"].items() if c < 3} == {}
    assert len(contrasts["cells"]) == (100 if held == "grid" else 0)
    assert min(contrasts["cells"], default=4.5) >= 4.5


def test_a_broken_page_would_be_noticed(browser: Browser, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(
        '<body style="background: #fff"><img src="https://example.invalid/x.png"><div style="width: 5000px">x</div>'
        '<p style="color: #eee">pale</p><div class="chart" id="c"><svg width="10" height="10">'
        '<text y="9">cut off</text><text y="9">cut on</text></svg></div>'
        '<script>document.body.classList.add("drawn"); vegaEmbed("#x")</script>'
    )
    browser.show(broken)
    assert any("vegaEmbed is not defined" in line for line in browser.complaints())
    assert "https://example.invalid/x.png" in browser.requests()
    found = browser.ask(OVERFLOWING)
    assert found["page"] > 1280
    assert len(found["wide"]) == 1
    assert found["cut"] == ["c: cut off", "c: cut on"]
    assert len(browser.ask(OVERLAPPING)) == 1
    assert browser.ask(CONTRASTS)["words"]["pale rgb(238, 238, 238)"] < 1.5
