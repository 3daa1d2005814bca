"""Findings to report.html: one file that asks for nothing else, in both languages, for both colour schemes and paper.

The template escapes whatever is put in; charts are the only markup that comes from elsewhere, and hold no data but
numbers. The page forbids itself every source but its own text, so that a browser would not fetch even what slipped in.
"""

import base64
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from trimtab import __version__, charts, wording
from trimtab.findings import Bin, Findings, Label
from trimtab.wording import CATALOGUE, LANGUAGES

_TAGS = {"en": "en", "zh": "zh-Hans"}  # BCP 47, by which browsers choose the glyphs that Chinese shares with others

# Chinese where the browser's first language is; and what a screen reader or a translator takes for the page's language.
_SCRIPT = """
const zh = document.getElementById("zh"), en = document.getElementById("en");
const tell = () => { document.documentElement.lang = zh.checked ? "zh-Hans" : "en"; };
if ((navigator.language || "").startsWith("zh")) zh.checked = true;
for (const one of [zh, en]) one.addEventListener("change", tell);
tell();
"""


def render(found: Findings) -> str:
    """The whole page."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    return (
        _environment()
        .get_template("report.html")
        .render(
            found=found,
            version=__version__,
            script=Markup(_SCRIPT),
            script_sha256=digest,
            standing=wording.standing(found),
            verdict=_both(*(wording.verdict(found, language) for language in LANGUAGES)),
            about=[_say(f"about_{one.name}") for one in found.contenders[1:]],
            judged=[_both(*(wording.judged(one, language) for language in LANGUAGES)) for one in found.contenders],
            notes=zip(*(wording.notes(found, language) for language in LANGUAGES), strict=True),
            names=[_label(label) for label in found.labels],
            profile=wording.profile(found),
            costs=zip(*(wording.costs(found, language) for language in LANGUAGES), strict=True),
            started=time.strftime("%Y-%m-%d %H:%M", time.localtime(found.started)) if found.started else "",
        )
    )


@cache
def _environment() -> Environment:
    # autoescape for every template, whatever its name: nothing that is put in is markup unless it says so.
    environment = Environment(
        loader=PackageLoader("trimtab"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"t": _say, "both": _both, "chart": _chart, "charts": charts, "reliability": _reliability}
    environment.filters |= {
        "score": wording.score,
        "percent": wording.percent,
        "signed": wording.signed,
        "count": wording.count,
        "size": wording.size,
        "duration": wording.duration,
    }
    return environment


def _twice(make: Callable[[str], Markup], tag: str = "span") -> Markup:
    """What `make` gives for each language, in an element of its own; the stylesheet shows one of them."""
    made = {language: make(language) for language in LANGUAGES}
    if len(set(made.values())) == 1 and tag == "span":
        return made[LANGUAGES[0]]
    return Markup("").join(
        Markup('<{0} lang="{1}">{2}</{0}>').format(tag, _TAGS[language], text) for language, text in made.items()
    )


def _say(key: str, **values: Any) -> Markup:
    """A sentence of the catalogue in both languages; values that are data are escaped."""
    return _twice(lambda language: _set(escape(CATALOGUE[language][key]).format(**values)))


def _both(en: str, zh: str) -> Markup:
    """A text that has been put into words already."""
    return _twice(lambda language: _set(escape({"en": en, "zh": zh}[language])))


def _set(text: Markup) -> Markup:
    """A number and its unit stay on one line."""
    return Markup(re.sub(r"(?<=\d) (?=%|(s|min|h|kB|MB|GB)\b)", "\u00a0", text))


def _label(label: Label) -> Markup:
    """A label by its display name, which is kept apart from the direction of the text around it."""
    return Markup("<bdi>{}</bdi>").format(_both(label.en, label.zh))


def _chart(draw: Callable[..., str], *values: Any) -> Markup:
    """A chart in both languages; empty where there is nothing to draw."""
    drawn = {language: draw(*values, language) for language in LANGUAGES}
    if not any(drawn.values()):
        return Markup("")
    return _twice(lambda language: Markup(drawn[language]), "div")


def _reliability(bins: Sequence[Bin], error: float, key: str, **values: Any) -> Markup:
    """A calibration diagram with its caption from the catalogue."""
    return _chart(lambda language: charts.reliability(bins, error, wording.say(key, language, **values), language))
