"""The page as a file: whole, small, and made of our own markup whatever the data holds."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from samples import HOSTILE, sample

from trimtab import charts, page
from trimtab.findings import BINS, Bin, Contender

LARGEST_BYTES = 400_000
VOID = {"meta", "input", "br", "link", "img", "hr"}


class Reader(HTMLParser):
    """Notes elements and attributes, and that every element is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def ids(self) -> list[str]:
        return [attrs["id"] or "" for _, attrs in self.elements if "id" in attrs]


@pytest.fixture(scope="module")
def wild() -> str:
    """The largest page: many rows and labels, each of them long and hostile."""
    return page.render(sample(20_000, 77, text=HOSTILE * 20, label=HOSTILE * 20, base=HOSTILE, run=f"/{HOSTILE}"))


def test_it_stays_small_whatever_the_data(wild: str) -> None:
    assert len(wild.encode()) < LARGEST_BYTES
    quotes = page.render(sample(2_000, 1_000, text="'" * 5_000, label="'" * 5_000))  # an escape of five bytes each
    assert len(quotes.encode()) < LARGEST_BYTES
    many = {f"/data/{i}.csv": "60" * 32 for i in range(5_000)}
    files = sample(recipe=sample().recipe.model_copy(update={"sha256": many}))
    assert len(page.render(files).encode()) < LARGEST_BYTES


def test_data_never_becomes_markup(wild: str) -> None:
    found = Reader(wild)
    tags = [tag for tag, _ in found.elements]
    assert tags.count("script") == 1
    assert not {"img", "iframe", "link", "object", "form", "base"} & set(tags)
    assert not [name for _, attrs in found.elements for name in attrs if name.startswith("on")]
    assert "49" not in "".join(found.texts).split(), "a template in a text is not run"
    assert any("<script>alert(1)</script>" in text for text in found.texts)
    assert "\u202e" not in wild
    assert "\x1b" not in wild


def test_nothing_is_asked_of_a_network(wild: str) -> None:
    for tag, attrs in Reader(wild).elements:
        assert not {"src", "srcset", "action", "poster", "data"} & attrs.keys(), tag
        assert (attrs.get("href") or "#").startswith("#")
    assert not re.search(r"url\(|@import", wild)
    assert "default-src &#39;none&#39;" in wild or "default-src 'none'" in wild


@pytest.mark.parametrize("classes", [2, 5, 77])
def test_ids_are_unique_and_every_cell_and_link_has_its_target(classes: int) -> None:
    found = Reader(page.render(sample(500, classes)))
    ids = found.ids()
    assert len(ids) == len(set(ids))
    targets = [attrs["popovertarget"] for _, attrs in found.elements if "popovertarget" in attrs]
    targets += [attrs["href"][1:] for _, attrs in found.elements if attrs.get("href")]
    assert len(targets) > 12
    assert set(targets) <= set(ids)
    named = [attrs["aria-labelledby"] for _, attrs in found.elements if "aria-labelledby" in attrs]
    assert set(named) <= set(ids)


def test_every_chart_has_a_name_and_its_figures() -> None:
    text = page.render(sample(500, 3))
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(drawings) == 2 * 6  # standing, loss, scores, calibration before and after, time; in two languages
    for drawing in drawings:
        assert drawing.startswith('<svg role="img"')
        assert re.search(r"<title>[^<]+</title><desc>[^<]*\d[^<]*</desc>", drawing)
        assert "nan" not in drawing
        assert "inf" not in drawing.replace("info", "")


def test_a_run_with_little_to_tell_has_no_empty_section() -> None:
    right = sample(6, 2, epochs=1, temperature=0.0, baselines=False, data_report={}, environment={}, steps=())
    assert right.mistake_rows == 0
    text = page.render(right)
    sections = set(re.findall(r'<section id="(\w+)"', text))
    assert sections == {"verdict", "curves", "matrix", "classes", "calibration", "cost", "repeat"}
    assert not re.search(r"<(tbody|ul|nav)>\s*</\1>", text)
    assert not re.search(r'<div class="beside">\s*</div>', text)
    assert set(re.findall(r'href="#(\w+)"', text)) == sections - {"verdict"}


def test_a_run_without_its_predictions_tells_the_rest() -> None:
    text = page.render(sample(300, 3, scored=None))
    assert set(re.findall(r'<section id="(\w+)"', text)) == {"verdict", "curves", "classes", "data", "cost", "repeat"}


class TestCharts:
    def test_ticks_enclose_the_values_and_are_few(self) -> None:
        rng = np.random.default_rng(0)
        spans = [[0.0, 0.0], [0.5, 0.5], [0.0, 1e-9], [0.9991, 0.9992], [0.0, 3e6], *rng.random((200, 2)).tolist()]
        for low, high in map(sorted, spans):
            ticks = charts._ticks(low, high, 5)
            assert ticks[0] <= low + 1e-9
            assert ticks[-1] >= high - 1e-9
            assert 2 <= len(ticks) <= 8
            shown = [f"{tick:.{charts._digits(ticks)}f}" for tick in ticks]
            assert len(set(shown)) == len(shown), "neighbours are told apart"

    def test_a_bin_without_rows_has_no_bar(self) -> None:
        bins = [Bin(i / BINS, (i + 1) / BINS, 0, 0.0, 0.0) for i in range(BINS)]
        assert 'class="bar"' not in charts.reliability(bins, 0.0, "as trained", "en")
        bins[-1] = Bin(14 / 15, 1.0, 4, 0.98, 0.75)
        drawn = charts.reliability(bins, 0.2, "as trained", "en")
        assert drawn.count('class="bar"') == 1
        assert "Confidence 0.93 to 1.00: 4 rows, accuracy 0.750." in drawn

    def test_the_description_of_a_standing_has_every_figure(self) -> None:
        told = charts.standing([Contender("adapter", 0.9, (0.85, 0.94)), Contender("majority", 0.5)], "en")
        assert "adapter 0.900 (95 % interval 0.850 to 0.940); majority 0.500." in told
