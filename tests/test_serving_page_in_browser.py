"""The server's page in a real browser: choose an adapter, write texts, see what it says; in both languages."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from adapters import write_adapter
from bases import write_base
from servers import ADMIN, READER, TOKENS, Server, start

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: make browser")

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \"q\" 'a' &amp; \u202eright to left"
MANY = 1_100  # more than one page of the server's list


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # Root, as containers have it, needs --no-sandbox; the pages here are our own.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_base(folder / "base", "bert")
    # The fifth seed makes one that agrees with the first on some texts only.
    for name, seed, labels in (
        ("reviews", 0, ("差评", "好评")),
        ("reviews-new", 5, ("差评", "好评")),
        ("topics", 2, ("sport", "film", HOSTILE)),
        ("wide", 3, ("one", "two", "three", "four", "five", "six")),
    ):
        write_adapter(folder / "adapters" / name, folder / "base", seed=seed, labels=labels)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = start("--adapter-dir", str(folder / "adapters"), "--watch", "0")
    yield server
    server.stop()


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Starts servers that one test alone uses, over a copy of the adapters, and stops those that still run."""
    started = []

    def run(*arguments: str) -> Server:
        shutil.copytree(folder / "adapters", tmp_path / "adapters", dirs_exist_ok=True)
        started.append(start("--adapter-dir", str(tmp_path / "adapters"), *arguments))
        return started[-1]

    yield run
    for one in started:
        if one.process.poll() is None:
            one.stop()


@pytest.fixture
def opened(browser: "Browser") -> Iterator[Any]:
    """Opens a server's page as a person with these habits does; what it asked for and complained of is checked.

    The browser itself writes refused requests into its console; `refusals` says which a test provokes.
    """
    contexts, asked, complaints, expected = [], [], [], []

    def look(url: str, *, path: str = "/", refusals: str = "", **habits: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1_100, "height": 900}, "locale": "en-GB"} | habits)
        contexts.append(context)
        expected.append((url + "/", refusals))
        tab = context.new_page()
        tab.set_default_timeout(10_000)
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: complaints.append(dialog.message))
        tab.goto(url + path, wait_until="networkidle")
        return tab

    yield look
    urls, refusals = zip(*expected, strict=True)
    assert [url for url in asked if not url.startswith(urls)] == [], "the page asks nobody but its server"
    allowed = re.compile("|".join(filter(None, refusals)) or "nothing")
    assert [one for one in complaints if not allowed.search(one)] == []
    for context in contexts:
        context.close()


def ask(tab: Any, texts: str, first: str = "reviews", second: str = "") -> None:
    """Chooses and asks, and waits for the end of it."""
    for place, name in (("#first", first), ("#second", second)):
        (tab.select_option if tab.locator(f"select{place}").count() else tab.fill)(place, name)
    tab.fill("#texts", texts)
    tab.click("#ask")
    tab.wait_for_selector("#ask:not([aria-disabled])")


def labels(tab: Any) -> list[str]:
    """The best labels, row by row."""
    return [str(one) for one in tab.locator("#rows .row:first-child .label").all_text_contents()]


def best(answers: list[list[dict[str, Any]]]) -> list[str]:
    return [scores[0]["label"] for scores in answers]


def test_lines_are_answered_as_the_server_answers_them(opened: Any, server: Server) -> None:
    tab = opened(server.url)
    assert tab.input_value("#first") == "reviews"
    assert tab.input_value("#second") == ""
    assert tab.inner_text("#base") == "base"
    assert tab.inner_text("#count") == "4 adapters"
    texts = ["a great film", "boring", "  the plot is slow"]
    ask(tab, "\n".join(texts) + "\n\n", "topics")
    wanted = server.predict({"inputs": [[text] for text in texts], "model": "topics"})
    assert tab.locator("#rows .label").all_text_contents() == [one["label"] for scores in wanted for one in scores]
    assert tab.locator("#rows .text").all_text_contents() == texts
    assert [float(one) for one in tab.locator("#rows .score").all_inner_texts()] == pytest.approx(
        [one["score"] for scores in wanted for one in scores], abs=6e-4
    )
    assert re.fullmatch(r"3 texts in \d+ ms", tab.inner_text("#status"))
    ask(tab, "boring", "wide")
    assert tab.locator("#rows .row").count() == 4
    assert tab.inner_text("#rows .answer").endswith("and 2 more")


def test_two_adapters_stand_side_by_side_and_where_they_differ_is_marked(opened: Any, server: Server) -> None:
    texts = ["a great film", "boring", "the plot", "time to love", "sad script", "not so good", "very fast ending"]
    answers = [
        best(server.predict({"inputs": [[one] for one in texts], "model": name})) for name in ("reviews", "reviews-new")
    ]
    differing = [text for text, a, b in zip(texts, *answers, strict=True) if a != b]
    assert 0 < len(differing) < len(texts), "these adapters do not test this"
    tab = opened(server.url)
    ask(tab, "\n".join(texts), "reviews", "reviews-new")
    assert tab.locator("#head th").all_inner_texts() == ["Text", "reviews", "reviews-new"]
    assert labels(tab) == [label for pair in zip(*answers, strict=True) for label in pair]
    assert tab.locator("tr.differs .text > div").all_text_contents() == differing
    assert tab.locator("tr.differs .text").first.inner_text().endswith("they differ")  # for who does not see colours
    assert f"; they differ on {len(differing)}" in tab.inner_text("#status")
    tab.check("#only")
    assert tab.locator("#rows tr:visible").count() == len(differing)
    ask(tab, "\n".join(texts), "reviews", "topics")  # without a label in common, none is marked
    assert tab.locator("tr.differs").count() == 0
    assert "differ" not in tab.inner_text("#status")
    assert tab.locator("#only").is_hidden()
    assert tab.locator("#rows tr:visible").count() == len(texts)


@pytest.mark.skipif(shutil.which("curl") is None or os.name == "nt", reason="no curl, or no shell")
@pytest.mark.parametrize("second", ["", "topics"])
def test_the_line_for_a_terminal_gives_the_same_answer(opened: Any, server: Server, second: str) -> None:
    tab = opened(server.url, permissions=["clipboard-read", "clipboard-write"])
    texts = ['it\'s a "great" film; $HOME `ls` \\n %s !!', HOSTILE]
    ask(tab, "\n".join(texts), "reviews", second)
    tab.click("#copy")
    tab.wait_for_selector("#copy:text('Copied')")
    line = tab.evaluate("navigator.clipboard.readText()")
    assert line == tab.text_content("#curl")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    names = ["reviews", second] if second else ["reviews"]
    wanted = [one for name in names for one in server.predict({"inputs": [[text] for text in texts], "model": name})]
    assert found == [
        [{"label": one["label"], "score": pytest.approx(one["score"], abs=1e-6)} for one in row] for row in wanted
    ]
    tab.fill("#texts", "1\n2\n3\n4")
    assert '["3"]' in tab.inner_text("#curl")
    assert '["4"]' not in tab.inner_text("#curl")
    assert tab.inner_text("#curl-note") == "The first 3 texts."


def test_both_languages_and_the_choice_stays(opened: Any, server: Server) -> None:
    tab = opened(server.url)
    assert tab.inner_text("#ask") == "Classify"
    ask(tab, "boring", "topics", "reviews")
    tab.click("[data-language=zh]")
    assert tab.inner_text("#ask") == "分类"
    assert tab.evaluate("document.documentElement.lang") == "zh-Hans"
    assert "1 条文本" in tab.inner_text("#status")
    assert (tab.input_value("#first"), tab.input_value("#second")) == ("topics", "reviews")
    tab.reload()
    assert tab.inner_text("#ask") == "分类"
    chinese = opened(server.url, locale="zh-CN")
    ask(chinese, "boring", "wide", "reviews")
    words = chinese.inner_text("header, main")
    assert "结果" in chinese.inner_text("#results")
    for left in ("one", "two", "three", "four", "five", "six"):
        words = words.replace(left, "")
    assert not re.search(r"Adapter|Classif|Text|Copy|Answer|none|more|terminal", words)


def test_words_from_outside_are_shown_and_do_nothing(opened: Any, server: Server) -> None:
    tab = opened(server.url)
    ask(tab, HOSTILE, "topics", "reviews")
    assert tab.text_content("#rows .text") == HOSTILE
    assert HOSTILE in tab.locator("#rows .label").all_text_contents()
    assert tab.locator("main script, main img").count() == 0
    # What turns the direction of writing ends with its own text.
    for place in ("#rows .text > div", "#rows .label"):
        assert tab.locator(place).first.evaluate("one => getComputedStyle(one).unicodeBidi") == "isolate"
    ask(tab, "שלום עולם\nabc")
    texts = tab.locator("#rows .text > div")
    assert [texts.nth(i).evaluate("one => getComputedStyle(one).direction") for i in (0, 1)] == ["rtl", "ltr"]


def test_the_policy_of_the_page_allows_nothing_but_the_server_s_own_files(opened: Any, server: Server) -> None:
    tab = opened(server.url, refusals="Content Security Policy")
    policy = tab.request.get(server.url).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert tab.locator("script:not([src]), style, [style]").count() == 0
    tab.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert tab.evaluate("window.ran") is None
    tab.evaluate("document.body.setAttribute('style', 'opacity: 0')")
    assert tab.evaluate("getComputedStyle(document.body).opacity") == "1"


def test_an_adapter_that_is_gone_and_a_server_that_is_gone_are_told(opened: Any, own: Any, tmp_path: Path) -> None:
    server = own("--watch", "0.2", "--admin")
    tab = opened(server.url, refusals="404|ERR_")
    server.ask("DELETE", "/v1/adapters/topics")
    ask(tab, "boring", "topics")
    assert tab.inner_text("#problem").startswith('There is no adapter "topics" here.')
    tab.click("[data-language=zh]")
    assert tab.inner_text("#problem").startswith("没有这个适配器。")
    tab.click("[data-language=en]")
    ask(tab, "boring", "reviews")
    assert tab.locator("#problem").is_hidden()
    server.stop()
    ask(tab, "boring", "reviews")
    assert tab.inner_text("#problem").startswith("The server does not answer.")
    assert tab.input_value("#texts") == "boring"


def test_what_is_missing_and_answers_that_are_none_are_told(opened: Any, server: Server) -> None:
    tab = opened(server.url, refusals="502")
    tab.click("#ask")
    assert tab.inner_text("#problem") == "There is no text yet."
    assert tab.evaluate("document.activeElement.id") == "texts"
    tab.route("**/predict", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
    ask(tab, "boring")
    assert "HTTP 502" in tab.inner_text("#problem")
    assert "Bad gateway" not in tab.inner_text("#problem")


def test_a_token_is_asked_for_and_not_kept(opened: Any, own: Any, tmp_path: Path) -> None:
    (tmp_path / "tokens.toml").write_text(TOKENS, "utf-8")
    server = own("--tokens", str(tmp_path / "tokens.toml"))
    tab = opened(server.url, refusals="401")
    assert tab.inner_text("#problem").startswith("This server wants a token.")
    assert tab.inner_text("#count") == ""
    assert tab.evaluate("document.activeElement.id") == "token"
    tab.keyboard.type("not-the-right-token")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#problem:text('does not know')")
    tab.fill("#token", READER)
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#first option:text('reviews')", state="attached")
    assert tab.locator("#first option").all_inner_texts() == ["reviews", "reviews-new"]
    tab.fill("#token", ADMIN)
    tab.keyboard.press("Tab")
    tab.wait_for_selector("#first option:text('topics')", state="attached")
    assert tab.locator("#problem").is_hidden()
    ask(tab, "boring")
    assert len(labels(tab)) == 1
    kept = tab.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
    assert ADMIN not in kept + tab.content() + tab.inner_text("body")
    line = tab.text_content("#curl")
    done = subprocess.run(["sh", "-c", line], env=os.environ | {"TOKEN": ADMIN}, capture_output=True, text=True)
    assert best([json.loads(done.stdout)]) == labels(tab)
    tab.reload(wait_until="networkidle")
    assert tab.input_value("#token") == ""


def test_the_keyboard_is_enough(opened: Any, server: Server) -> None:
    tab = opened(server.url)
    reached = []
    for _ in range(5):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert reached == ["API", "中文", "English", "first", "second"]
    tab.keyboard.press("r")  # a menu goes to what begins with it
    assert tab.input_value("#second") == "reviews"
    tab.keyboard.press("Tab")
    tab.keyboard.type("boring\nslow")
    tab.keyboard.press("Control+Enter")
    tab.wait_for_selector("#rows .label")
    assert len(labels(tab)) == 4
    assert tab.evaluate("document.activeElement.id") == "texts"
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#ask:not([aria-disabled])")
    assert tab.evaluate("document.activeElement.id") == "ask"  # it keeps its place while it asks
    outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_many_lines_go_in_requests_that_the_server_takes(opened: Any, server: Server) -> None:
    tab = opened(server.url)
    texts = [f"the {word} film {i}" for i in range(100) for word in ("good", "bad")]
    posted = []
    tab.on("request", lambda request: posted.append(request.post_data_json) if request.method == "POST" else None)
    ask(tab, "\n".join(texts), "reviews", "reviews-new")
    assert [len(one["inputs"]) for one in posted] == [256, 144]
    assert tab.locator("#rows .text > div").all_text_contents() == texts
    answers = [
        best(server.predict({"inputs": [[one] for one in texts], "model": name})) for name in ("reviews", "reviews-new")
    ]
    assert labels(tab) == [label for pair in zip(*answers, strict=True) for label in pair]


def test_a_long_text_is_cut_and_the_page_says_so(opened: Any, server: Server) -> None:
    tab = opened(server.url)
    text = "the plot " * 555 + "and so"
    assert len(text) > 5_000
    ask(tab, text + "\nboring")
    assert tab.locator("#rows .text").first.text_content() == text
    assert tab.inner_text("#status").endswith("; longer texts were cut to what the adapter reads")
    assert tab.locator("#rows tr").first.bounding_box()["height"] < 300  # it scrolls in its cell
    ask(tab, "boring")
    assert "cut" not in tab.inner_text("#status")


@pytest.mark.parametrize("width", [320, 390, 800])
def test_it_never_scrolls_sideways(opened: Any, server: Server, width: int) -> None:
    tab = opened(server.url, viewport={"width": width, "height": 740})
    ask(tab, "\n".join(["x" * 5_000, HOSTILE, "boring"]), "reviews", "topics")
    assert len(labels(tab)) == 6
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing is outside, where it could not even be scrolled to.
    outside = "one => one.getBoundingClientRect().right > innerWidth"
    assert tab.evaluate(f"[...document.querySelectorAll('main *')].filter({outside}).length") == 0
    if width < 640:  # each answer says whose it is, where no column does
        name = "getComputedStyle(document.querySelectorAll('#rows .answer')[1], '::before').content"
        assert tab.evaluate(name) == '"topics"'


def test_more_adapters_than_a_menu_holds_are_found_by_typing(opened: Any, folder: Path, tmp_path: Path) -> None:
    for i in range(MANY):  # links, because copies of so many files take seconds
        shutil.copytree(folder / "adapters" / "reviews", tmp_path / "many" / f"customer-{i:05}", copy_function=os.link)
    server = start("--adapter-dir", str(tmp_path / "many"), "--watch", "0")
    try:
        tab = opened(server.url, refusals="404")
        assert tab.inner_text("#count") == "1,000 or more adapters"
        tab.fill("#first", "customer-0109")
        tab.wait_for_selector("#names option[value=customer-01099]", state="attached")
        assert tab.locator("#names option").count() == 10
        ask(tab, "boring", "customer-01099")
        assert len(labels(tab)) == 1
        ask(tab, "boring", "nobody")
        assert tab.inner_text("#problem").startswith('There is no adapter "nobody" here.')
        ask(tab, "boring", "")
        assert tab.inner_text("#problem") == "No adapter is chosen."
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible_in_both_colour_schemes(opened: Any, server: Server, scheme: str) -> None:
    from test_page_in_browser import CONTRAST

    tab = opened(server.url, color_scheme=scheme)
    ask(tab, "\n".join(["a great film", "boring", "the plot", "time to love"]), "reviews", "reviews-new")
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(253, 253, 251)"
    assert light == (scheme == "light")
    faintest = tab.evaluate(CONTRAST)
    assert faintest[0][0] >= 4.5, faintest  # WCAG 2.2, 1.4.3


def test_the_api_s_page_shows_its_routes(opened: Any, server: Server) -> None:
    tab = opened(server.url, path="/docs")
    tab.wait_for_selector(".opblock [data-path='/predict']")
    assert tab.locator(".opblock").count() > 15
