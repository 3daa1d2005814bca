"""Texts from files and answers to files, without a model."""

import datetime
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab import files
from trimtab.classification import Labels
from trimtab.errors import DataError
from trimtab.files import TextTable
from trimtab.predict import Prediction


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "_ROWS", 3)


def parquet(name: str, rows: int, start: int = 0) -> str:
    when = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "id": pa.array(range(start, start + rows), pa.int16()),
            "text": pa.array([f"text {i}" for i in range(start, start + rows)], pa.string()),
            "when": pa.array([when] * rows, pa.timestamp("ns", "UTC")),
            "note": pa.array([None] * max(0, rows - 1) + ["last"] * min(1, rows), pa.string()),
        }
    )
    pq.write_table(table, name)
    return name


def answer(table: TextTable) -> list[Prediction]:
    return [Prediction(text, text[-1], 0.5, {}, truncated=False) for text in table.texts]


def label(tables: Iterator[TextTable], out: str) -> int:
    parts = 0
    with files.writing(out) as append:
        for table in tables:
            append(table, answer(table))
            parts += 1
    return parts


@pytest.mark.parametrize("rows", [0, 1, 3, 10])
def test_parquet_goes_through_in_parts_and_keeps_rows_order_and_types(rows: int) -> None:
    parts = label(files.read([parquet("in.parquet", rows), parquet("in2.parquet", 4, rows)], "auto"), "out.parquet")
    assert parts == max(1, -(-rows // 3)) + 2
    before = pa.concat_tables([pq.read_table("in.parquet"), pq.read_table("in2.parquet")])
    after = pq.read_table("out.parquet")
    assert after.select(before.column_names).equals(before)
    assert after["predicted_label"].to_pylist() == [str(i)[-1] for i in range(rows + 4)]
    assert after["predicted_score"].to_pylist() == [0.5] * (rows + 4)


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_parts_make_one_text_file(ending: str) -> None:
    label(files.read([parquet("in.parquet", 7)], "auto"), f"out.{ending}")
    (table,) = files.read([f"out.{ending}"], "text")
    assert table.texts == [f"text {i}" for i in range(7)]
    assert [str(i) for i in table.columns["id"]] == [str(i) for i in range(7)]
    assert table.columns["predicted_label"] == [str(i) for i in range(7)]


def test_answers_given_again_take_the_place_of_the_old() -> None:
    label(files.read([parquet("in.parquet", 4)], "auto"), "once.parquet")
    label(files.read(["once.parquet"], "text"), "twice.parquet")
    assert pq.read_table("twice.parquet").equals(pq.read_table("once.parquet"))


def test_a_bad_row_in_the_last_part_is_found_before_the_first_is_given() -> None:
    pq.write_table(pa.table({"text": ["a", "b", "c", "d", None]}), "in.parquet")
    with pytest.raises(DataError, match=r"1 rows hold no text.*in.parquet line 5"):
        files.read(["in.parquet"], "auto")


def test_parquet_files_of_different_types_are_refused() -> None:
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), "a.parquet")
    pq.write_table(pa.table({"text": ["a"], "id": ["1"]}), "b.parquet")
    with pytest.raises(DataError, match=r"id \(int64\); text \(string\), id \(string\)"):
        files.read(["a.parquet", "b.parquet"], "auto")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_what_fails_in_the_middle_leaves_nothing_and_keeps_the_old_file(ending: str) -> None:
    out = Path(f"out.{ending}")
    out.write_text("old")

    def fail() -> None:
        with files.writing(str(out)) as append:
            append(files.as_table(["a"]), answer(files.as_table(["a"])))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in Path().iterdir()] == [out.name]
    assert out.read_text() == "old"


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_carriage_return_within_a_text_ends_no_row(ending: str) -> None:
    texts = ["one\rtwo", "three", "four\r\nfive"]
    with files.writing(f"out.{ending}") as append:
        append(files.as_table(texts), answer(files.as_table(texts)))
    (table,) = files.read([f"out.{ending}"], "text")
    assert table.texts == texts


def test_a_terminal_obeys_no_text() -> None:
    told = [Prediction("so\x1b[31m red \u202e\n" + "long " * 40, "0", 0.5, {}, truncated=False)]
    (line,) = files.table_lines(told, Labels(("0", "1"), ()), "")
    assert line.isprintable()
    assert line.endswith("...")
    assert "red" in line


def test_times_of_a_column_have_one_form_whatever_python_can_hold(tmp_path: Path) -> None:
    times = pa.array([0, 10**15, 10**18, 0], pa.timestamp("us"))
    days = pa.array([0, 1, 2, 3 * 10**6], pa.date32())
    pq.write_table(pa.table({"text": ["a b"] * 4, "at": times, "day": days}), "a.parquet")
    label(files.read(["a.parquet"], text="text"), "out.csv")
    header, *rows = Path("out.csv").read_text("utf-8").splitlines()
    assert header.startswith("text,at,day,")
    assert [row.split(",")[1][4:8] for row in rows[:2]] == ["-01-", "-09-"]
    assert not any(cell.isdecimal() for row in rows for cell in row.split(",")[1:3])  # 10**18 is no year of Python's


def test_a_comma_that_splits_a_text_is_told_with_its_mend() -> None:
    Path("a.csv").write_text("text\nHello\nHello, my friend\n", "utf-8")
    with pytest.raises(DataError, match=r"a\.csv line 3 \(ragged\)") as caught:
        files.read(["a.csv"], text="text")
    assert 'needs "..." around it' in caught.value.mend


def test_what_json_has_no_word_for_is_null() -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "score": [float("nan"), 0.5]}), "a.parquet")
    label(files.read(["a.parquet"], text="text"), "out.jsonl")
    assert "NaN" not in Path("out.jsonl").read_text("utf-8")
    (table,) = files.read(["out.jsonl"], "text")
    assert table.columns["score"] == [None, 0.5]


def test_a_column_of_several_kinds_is_no_parquet() -> None:
    table = TextTable({"text": ["a", "b"], "id": [1, "x"]}, "text")
    with pytest.raises(DataError, match="no one type"), files.writing("out.parquet") as append:
        append(table, answer(table))
    assert list(Path().iterdir()) == []


def test_lines_that_are_all_broken_are_named() -> None:
    Path("in.jsonl").write_text("{text\n{text\n")
    with pytest.raises(DataError, match=r"2 rows hold no text.*in.jsonl line 1 \(not JSON\)"):
        files.read(["in.jsonl"], "auto")


def test_a_byte_of_no_encoding_is_found_before_the_first_answer() -> None:
    """Also in a column that is only passed on: what cannot be written must not be found at the end."""
    Path("a.csv").write_bytes(b"text,note\nfine,ok\nfine,caf\xe9 \nfine,ok\n")
    with pytest.raises(DataError, match=r"Line 3 .*byte 0xe9"):
        list(files.read(["a.csv"], "auto"))
