"""What the Markdown of a report becomes where it is read: tables that hold, and nothing of the data that acts."""

import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from samples import HOSTILE, all_metrics, sample, scored

from trimtab import findings, markdown, page

READER = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])


def flat(text: str) -> list[Token]:
    return [one for token in READER.parse(text) for one in (token, *(token.children or []))]


@pytest.mark.parametrize("text", [HOSTILE, "a|b", "a\\|b", "`", "``a`", "ends in \\", "| |", "<!--", "  ", "***"])
def test_a_code_span_shows_the_text_and_nothing_else(text: str) -> None:
    shown = findings.shown(text, 1_000)
    assert not re.search(r"\\\\\|", markdown.code(shown)), "readers differ on a pipe behind two backslashes"
    tokens = flat(f"| a | b |\n|---|---|\n| {markdown.code(shown)} | x |\n")
    cells = [token for token in tokens if token.type == "inline"][2:]
    assert len(cells) == 2
    assert [token.type for token in cells[0].children or []] == ([] if not shown else ["code_inline"])
    if shown:
        assert (cells[0].children or [])[0].content.replace("\\ |", "\\|") == shown


@pytest.mark.parametrize("language", ["en", "zh"])
def test_hostile_rows_and_labels_leave_the_report_whole(language: str) -> None:
    tame = flat(markdown.report(sample(400, 5), language))
    wild = flat(markdown.report(sample(400, 5, text=HOSTILE, label=HOSTILE), language))
    kinds = [[token.type for token in tokens if token.nesting >= 0] for tokens in (tame, wild)]
    assert kinds[0] == kinds[1]
    assert not {"html_block", "html_inline", "link_open", "image", "s_open"} & set(kinds[1])
    assert "\x1b" not in markdown.report(sample(400, 5, text=HOSTILE, label=HOSTILE), language)


@pytest.mark.parametrize("classes", [2, 3, 77])
def test_tables_have_as_many_cells_in_every_row(classes: int) -> None:
    widths: list[set[int]] = []
    for token in flat(markdown.report(sample(400, classes))):
        if token.type == "table_open":
            widths.append(set())
        elif token.type == "tr_open":
            cells = 0
        elif token.type in ("th_open", "td_open"):
            cells += 1
        elif token.type == "tr_close":
            widths[-1].add(cells)
    assert len(widths) >= 8
    assert all(len(found) == 1 for found in widths)


@pytest.mark.parametrize(
    ("language", "said"), [("en", "few rows differ, McNemar p 0.062"), ("zh", "McNemar p = 0.062")]
)
def test_a_verdict_that_the_interval_alone_does_not_give_says_why(language: str, said: str) -> None:
    metrics = all_metrics(scored(300, 2, temperature=1.3), ["0", "1"])
    assert said not in markdown.report(sample(metrics=metrics), language)
    metrics["baselines"]["probe"] |= {"difference_ci95": [0.001, 0.02], "difference_p": 0.0625}
    found = sample(metrics=metrics)
    assert said in markdown.report(found, language)
    assert said in page.render(found)


def test_doubts_that_are_the_worst_mistakes_are_not_shown_twice() -> None:
    found = sample()
    assert found.doubts_are_mistakes
    apart = replace(found, mistakes=found.mistakes[1:])
    for render in (markdown.report, page.render):
        assert "worst mistakes above" in render(found)
        assert "threshold" not in render(found)
        assert "worst mistakes above" not in render(apart)
        assert "threshold" in render(apart)


def test_a_run_with_little_to_tell_has_no_empty_section() -> None:
    text = markdown.report(
        sample(6, 2, epochs=1, temperature=0.0, baselines=False, data_report={}, environment={}, steps=())
    )
    lines = [line for line in text.splitlines() if line]
    for line, following in zip(lines, [*lines[1:], "#"], strict=True):
        assert not (line.startswith("#") and following.startswith("#")), line
    for heading in ("Data", "Likely label errors"):
        assert f"## {heading}" not in text


def test_the_card_says_how_good_and_how_to_use_it_and_no_more() -> None:
    text = markdown.card(sample(400, 2))
    assert text.startswith("---\nlibrary_name: peft\nbase_model: sentence-transformers/all-MiniLM-L6-v2\n")
    assert 'classifier = trimtab.load("PATH/TO/THIS/FOLDER")' in text
    assert "| `0`   | `差评` | `negative` |" in text
    for told in ("seconds", " min ", "GB", "tokens/s", "20261124", "/home", "/data", "a processor", "2026"):
        assert told not in text, told


def test_the_longest_name_of_a_base_is_whole_in_the_front_matter() -> None:
    name = "an-organisation/" + "a" * 80  # hub ids have up to 96 characters
    assert f"\nbase_model: {name}\n" in markdown.card(sample(base=name))


@pytest.mark.parametrize(
    ("name", "shown"),
    [("roberta-base", "roberta-base"), ("no", '"no"'), ("a: b", '"a: b"'), ('q"\\', '"q\\"\\\\"'), ("1.0", '"1.0"')],
)
def test_the_front_matter_is_yaml_whatever_the_base_is_called(name: str, shown: str) -> None:
    assert markdown.yaml(name) == shown
