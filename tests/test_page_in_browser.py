"""The report in a real browser, from a file: nothing is fetched, both languages and schemes, cells open, it prints."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from samples import HOSTILE, sample

from trimtab import page

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: make browser")


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # Root, as containers have it, needs --no-sandbox; the pages here are our own.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it, of hostile rows."""
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page.render(sample(800, 6, text=HOSTILE)), "utf-8")
    return file


@pytest.fixture
def opened(browser: "Browser", report: Path) -> Iterator[Any]:
    """Opens the page as a person with these habits does; what it asked for and complained of is checked at the end."""
    contexts, asked, complaints = [], [], []

    def look(**habits: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1_200, "height": 900}} | habits)
        contexts.append(context)
        tab = context.new_page()
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message))
        tab.goto(report.as_uri())
        return tab

    yield look
    assert set(asked) == {report.as_uri()}, "the page asks for nothing but itself"
    assert complaints == []
    for context in contexts:
        context.close()


def seen(tab: Any) -> str:
    return str(tab.inner_text("body"))


def test_the_browser_s_language_is_the_page_s_and_the_switch_changes_it(opened: Any) -> None:
    english = opened(locale="en-GB")
    assert "Confusion matrix" in seen(english)
    assert "混淆矩阵" not in seen(english)
    english.check("#zh", force=True)
    assert "混淆矩阵" in seen(english)
    assert "Confusion matrix" not in seen(english)
    assert english.evaluate("document.documentElement.lang") == "zh-Hans"
    chinese = opened(locale="zh-CN")
    assert "混淆矩阵" in seen(chinese)
    assert not re.search(r"Confusion|training loss", seen(chinese))


def test_without_script_it_is_english_and_can_be_switched(opened: Any) -> None:
    tab = opened(java_script_enabled=False, locale="zh-CN")
    assert "Confusion matrix" in seen(tab)
    tab.check("#zh", force=True)
    assert "混淆矩阵" in seen(tab)


def test_the_keyboard_reaches_the_switch(opened: Any) -> None:
    tab = opened()
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    assert "混淆矩阵" in seen(tab)


def test_a_cell_opens_its_examples_and_escape_closes_them(opened: Any) -> None:
    tab = opened()
    cell = tab.locator("button.miss").first
    examples = tab.locator(f"#{cell.get_attribute('popovertarget')}")
    assert not examples.is_visible()
    cell.click()
    assert examples.is_visible()
    assert "<script>alert(1)</script>" in examples.inner_text()
    assert "sealed.csv:" in examples.inner_text()
    tab.keyboard.press("Escape")
    assert not examples.is_visible()


CONTRAST = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = color => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] === 255) return c; } return rgb(getComputedStyle(document.body).backgroundColor); };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
    if (e.closest("title, desc, script, .hidden, .zero")) continue;
    const style = getComputedStyle(e);
    const ink = light(rgb(e.closest("svg") ? style.fill : style.color)), paper = light(ground(e));
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    found.push([ratio, e.tagName + "." + e.getAttribute("class")]);
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 3);
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible_in_both_colour_schemes(opened: Any, scheme: str) -> None:
    tab = opened(color_scheme=scheme)
    assert (tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)") == (
        scheme == "light"
    )
    faintest = tab.evaluate(CONTRAST)
    assert faintest[0][0] >= 4.5, faintest  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize("width", [360, 800, 1_400])
def test_it_never_scrolls_sideways(opened: Any, width: int) -> None:
    tab = opened(viewport={"width": width, "height": 800})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [800, 900, 1_000, 1_400])
def test_the_verdict_on_each_baseline_is_in_sight(opened: Any, width: int) -> None:
    tab = opened(viewport={"width": width, "height": 800})
    table = tab.locator("#verdict .scroll")
    assert table.evaluate("e => e.scrollWidth <= e.clientWidth")


def test_charts_and_tables_are_told_to_a_screen_reader(opened: Any) -> None:
    tab = opened()
    images = tab.get_by_role("img")
    assert images.count() == 6
    assert tab.get_by_role("img", name="Loss by epoch").count() == 1
    assert tab.get_by_role("rowheader").count() > 20
    assert tab.get_by_role("heading", name="Worst mistakes").count() == 1


def test_it_prints_without_what_only_a_screen_can_use(opened: Any) -> None:
    tab = opened(color_scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.locator("nav").is_visible()
    assert not tab.locator(".switch").is_visible()
    printed = tab.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12
