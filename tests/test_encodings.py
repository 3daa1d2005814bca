"""Real texts in every encoding, with rows spoilt in every way: what is read is what was written, or is told."""

import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from conftest import FIGURES, tiers

from trimtab import data, demo
from trimtab.errors import DataError

Row = tuple[str, str]


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Sentences of reviews, and the Chinese ones of the README."""
    table = data.read_table(demo.reviews_csv())
    sources = zip(table.columns["text"], table.columns["source"], strict=True)
    english = [text for text, source in sources if source == "rotten_tomatoes"]
    page = Path(__file__).parents[1] / "README.zh-CN.md"
    chinese = [line.strip() for line in page.read_text("utf-8").splitlines()]
    return {
        "plain": [text for text in english if text.isascii()],
        "accents": list(islice((text for text in english if not text.isascii()), 200)),
        "chinese": [line for line in chinese if sum("一" <= char <= "鿿" for char in line) > 8],
    }


def csv_row(row: Row, delimiter: str) -> str:
    return delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row)


def json_row(row: Row, delimiter: str) -> str:
    return json.dumps({"text": row[0], "label": row[1]}, ensure_ascii=False)


def spoilt(line: str, row: Row, delimiter: str, kind: str, rng: random.Random) -> str:
    """A line that cannot be used, of a CSV (with its delimiter) or of a JSONL (without)."""
    text, label = row
    if delimiter:
        return {
            "empty": csv_row(("", label), delimiter),
            "blank": csv_row((" \t ", label), delimiter),
            "no label": csv_row((text, ""), delimiter),
            "a cell more": line + delimiter + "more",
            "a cell less": line.rpartition(delimiter)[0],
            "a foreign byte": put_byte(line, rng),
        }[kind]
    return {
        "empty": json_row(("", label), ""),
        "blank": json_row(("  ", label), ""),
        "no label": json.dumps({"text": text}),
        "a cell more": json.dumps([text, label]),
        "a cell less": line[:-1],
        "a foreign byte": put_byte(line, rng),
    }[kind]


KINDS = ("empty", "blank", "no label", "a cell more", "a cell less", "a foreign byte")


def put_byte(line: str, rng: random.Random) -> str:
    """A byte that neither UTF-8 nor GB18030 has anywhere, within a word, as surrogateescape writes it."""
    at = rng.choice([i for i in range(1, len(line)) if line[i - 1].isalnum() and line[i].isalnum()])
    return line[:at] + "\udcff" + line[at:]


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "gb18030", "latin-1")


@pytest.mark.parametrize("trial", tiers(300, 6_000))
def test_what_is_read_is_what_was_written(texts: dict[str, list[str]], tmp_path: Path, trial: int) -> None:
    rng = random.Random(trial)
    encoding = ENCODINGS[trial % len(ENCODINGS)]
    delimiter = rng.choice([",", ";", "\t", "|", ""])
    kinds = {"gb18030": ["chinese"], "latin-1": ["plain", "accents"]}.get(encoding, ["plain", "accents", "chinese"])
    rows = [
        (one_text(texts[rng.choice(kinds)], rng), rng.choice(["0", "1", "2"])) for _ in range(rng.randrange(12, 60))
    ]
    rows = [row for row in rows if encoding != "latin-1" or is_latin(row[0])]
    write_row: Callable[[Row, str], str] = csv_row if delimiter else json_row
    bad = {} if encoding == "utf-16" else {i: rng.choice(KINDS) for i in rng.sample(range(len(rows)), rng.randrange(4))}
    if encoding == "utf-16":  # no single bytes there
        bad = {i: rng.choice(KINDS[:-1]) for i in rng.sample(range(len(rows)), rng.randrange(4))}
    lines = [write_row(row, delimiter) for row in rows]
    lines = [spoilt(line, rows[i], delimiter, bad[i], rng) if i in bad else line for i, line in enumerate(lines)]
    if encoding == "latin-1":
        bad |= {i: "a foreign byte" for i, line in enumerate(lines) if i not in bad and not line.isascii()}
    end = rng.choice(["\n", "\r\n"])
    header = [delimiter.join(("text", "label"))] if delimiter else []
    file = tmp_path / ("rows.csv" if delimiter else "rows.jsonl")
    file.write_bytes((end.join([*header, *lines]) + end).encode(encoding, "surrogateescape"))

    FIGURES["files in an encoding, with spoilt rows"] += 1
    found = read(file, may_be_refused=encoding == "latin-1")
    if found is None:
        return
    assert [(example.text, example.label) for example in found.examples] == [
        row for i, row in enumerate(rows) if i not in bad
    ]
    assert found.rows_in == len(found.examples) + len(found.rejects) == len(rows)
    assert len(found.rejects) == len(bad)


def read(file: Path, *, may_be_refused: bool) -> data.Rows | None:
    """The rows of a file; None where it was refused as a whole, with the reason that it has another encoding."""
    try:
        return data.read_rows([str(file)], skip_bad=True)
    except DataError as refused:
        FIGURES["of them refused whole"] += 1
        if not may_be_refused or refused.code != "data.encoding":
            raise
    return None


def one_text(of: list[str], rng: random.Random) -> str:
    text = rng.choice(of)
    return rng.choice([text, text, text, rng.choice(["None", "NA", "null", "nan", "NULL"]), f'so "{text}", he said'])


def is_latin(text: str) -> bool:
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True
