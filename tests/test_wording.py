"""The catalogue says the same in both languages, and the verdict says what the figures say."""

import re
import string
from dataclasses import replace
from pathlib import Path

import pytest
from samples import sample

import trimtab
from trimtab import wording
from trimtab.wording import CATALOGUE, LANGUAGES

PACKAGE = Path(trimtab.__file__).parent


def gaps(sentence: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name}


def test_both_languages_have_the_same_keys_and_the_same_gaps() -> None:
    english, chinese = CATALOGUE["en"], CATALOGUE["zh"]
    assert list(english) == list(chinese)
    assert {key: gaps(text) for key, text in english.items()} == {key: gaps(text) for key, text in chinese.items()}


def test_chinese_is_chinese() -> None:
    same = {key for key, text in CATALOGUE["en"].items() if CATALOGUE["zh"][key] == text}
    assert same == {"tfidf", "f1", "sums", "standing_one"}
    assert not [text for text in CATALOGUE["zh"].values() if re.search(r"[\u4e00-\u9fff][,;:!?]", text)]


def test_every_sentence_of_the_template_is_in_the_catalogue_and_none_is_left_over() -> None:
    template = (PACKAGE / "templates" / "report.html").read_text("utf-8")
    asked = set(re.findall(r'\bt\("(\w+)"', template))
    assert asked <= CATALOGUE["en"].keys()
    sources = template + "".join(
        (PACKAGE / name).read_text("utf-8") for name in ("page.py", "charts.py", "markdown.py", "findings.py")
    )
    sources += (PACKAGE / "wording.py").read_text("utf-8").partition("CATALOGUE:")[2]
    # Made from a part and an end: desc_..., the_probe, test_rows.
    made = ("the_", "about_", "_rows", "_note", "_parameters")
    whole = {key for key in CATALOGUE["en"] if not any(part in key for part in made)}
    left = {key for key in whole if not re.search(f"[\"']{key}[\"']", sources)}
    assert left <= {"train", "eval", "test"}  # roles of the data report


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_adapter_that_does_not_win_says_so(language: str) -> None:
    found = sample()
    adapter, probe, tfidf, majority = found.contenders
    lead = {"en": "does worse than", "zh": "适配器不如"}[language]
    assert lead not in wording.verdict(found, language)
    worse = replace(found, contenders=(adapter, replace(probe, verdict="worse"), tfidf, majority))
    said = wording.verdict(worse, language)
    assert said.index(lead) < said.index(wording.say("the_tfidf", language))
    assert wording.standing(worse) == "worse"
    best = replace(found, contenders=(adapter, tfidf, majority))
    lead = {"en": "The adapter beats TF-IDF and", "zh": "适配器优于词频法（TF-IDF）和"}[language]
    assert wording.verdict(best, language).startswith(lead)
    assert wording.standing(best) == "better"


def test_without_a_baseline_the_verdict_is_the_score() -> None:
    found = sample()
    alone = replace(found, contenders=found.contenders[:1])
    assert wording.verdict(alone, "en").startswith("Accuracy 0.")
    assert wording.standing(alone) == ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_baselines_that_were_not_computed_are_missed(language: str) -> None:
    found = sample()
    alone = replace(found, contenders=(found.contenders[0], found.contenders[-1]))
    missed = wording.say("no_baselines_note", language)
    assert missed in wording.notes(alone, language)
    assert missed not in wording.notes(found, language)


def test_durations() -> None:
    assert [wording.duration(s) for s in (0.4, 59.4, 200, 7_500)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]
