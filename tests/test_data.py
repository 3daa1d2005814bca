import csv
import gzip
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import data
from trimtab.data import Example, Reject, Rows
from trimtab.errors import DataError


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def parquet(name: str, **columns: object) -> str:
    pq.write_table(pa.table(columns), name)
    return name


def refusal(
    *paths: str,
    text: str = "auto",
    label: str = "auto",
    skip_bad: bool = False,
    known_labels: tuple[str, ...] | None = None,
) -> DataError:
    with pytest.raises(DataError) as caught:
        data.read_rows(paths, text=text, label=label, skip_bad=skip_bad, known_labels=known_labels)
    assert caught.value.exit_code == 3
    assert caught.value.mend
    return caught.value


def pairs(rows: Rows) -> list[tuple[str, str]]:
    return [(example.text, example.label) for example in rows.examples]


def places(rows: Rows) -> list[tuple[int, str]]:
    return [(reject.line, reject.reason) for reject in rows.rejects]


# -- formats and encodings -------------------------------------------------------------------------------------

REVIEWS = [("这部电影很好看，推荐", "好评"), ("剧情无聊", "差评"), ('two\nlines, "a" comma', "差评"), ("a;b|c", "好评")]
LINES = [2, 3, 4, 6]  # the third text stands on two lines


def as_csv(delimiter: str = ",", end: str = "\n") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows([("text", "label"), *REVIEWS])
    return out.getvalue()


def as_jsonl() -> str:
    return "\n".join(json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in REVIEWS) + "\n\n"


@pytest.mark.parametrize(
    ("name", "content", "encoding", "lines"),
    [
        ("a.csv", as_csv().encode(), "UTF-8", LINES),
        ("A.CSV", as_csv(";").encode(), "UTF-8", LINES),
        ("a.b.csv", as_csv("|").encode(), "UTF-8", LINES),
        ("a.tsv", as_csv("\t").encode(), "UTF-8", LINES),
        ("tab.csv", as_csv("\t").encode(), "UTF-8", LINES),
        ("crlf.csv", as_csv(end="\r\n").encode(), "UTF-8", LINES),
        ("cr.csv", as_csv(end="\r").encode(), "UTF-8", LINES),
        ("cr-tab.csv", as_csv("\t", "\r").replace("推荐", "a,b,c,d").encode(), "UTF-8", LINES),
        ("blank.csv", b"\n" + as_csv().encode() + b"\n\n", "UTF-8", [3, 4, 5, 7]),
        ("bom.csv", as_csv().encode("utf-8-sig"), "UTF-8 with BOM", LINES),
        ("le.csv", b"\xff\xfe" + as_csv().encode("utf-16-le"), "UTF-16", LINES),
        ("be.csv", b"\xfe\xff" + as_csv().encode("utf-16-be"), "UTF-16", LINES),
        ("gb.csv", as_csv().encode("gb18030"), "GB18030", LINES),
        ("a.csv.gz", gzip.compress(as_csv().encode()), "UTF-8", LINES),
        ("packed.csv", gzip.compress(as_csv().encode("gb18030")), "GB18030", LINES),
        ("a.jsonl", as_jsonl().encode(), "UTF-8", [1, 2, 3, 4]),
        ("a.ndjson", as_jsonl().encode("utf-8-sig"), "UTF-8 with BOM", [1, 2, 3, 4]),
        ("a.jsonl.gz", gzip.compress(as_jsonl().encode()), "UTF-8", [1, 2, 3, 4]),
        ("a.json", json.dumps([{"text": t, "label": v} for t, v in REVIEWS]).encode(), "UTF-8", [1, 2, 3, 4]),
    ],
)
def test_text_formats(name: str, content: bytes, encoding: str, lines: list[int]) -> None:
    rows = data.read_rows([write(name, content)])
    assert [(text.replace("\r", "\n").replace("a,b,c,d", "推荐"), label) for text, label in pairs(rows)] == REVIEWS
    assert [example.line for example in rows.examples] == lines
    assert {Path(example.file).name for example in rows.examples} == {name}
    assert [(file["encoding"], file["rows"]) for file in rows.files] == [(encoding, 4)]
    assert data.read_table(Path(name)).encoding == encoding


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("text,label\nnice,好\nawful,差\n", "gb18030"),
        ("text,label\n這個電影很好看，我們都喜歡,1\n服務態度太差了，還等了一個小時,0\n", "gbk"),
        ("text,label\n味道不错,1\n送得慢,0\n", "gb2312"),
    ],
)
def test_chinese_of_every_kind_is_read(text: str, encoding: str) -> None:
    assert data.decode(Path("a.csv"), text.encode(encoding)) == (text, "GB18030")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("이 영화는 정말 재미있어요 배우들의 연기도 훌륭합니다", "euc-kr"),
        ("Отличный фильм, рекомендую всем посмотреть", "cp1251"),
        ("La soirée était très réussie, à refaire", "latin-1"),
        ("とても面白い映画でした。また観たいです", "shift_jis"),
        ("這個電影很好看，我們都喜歡", "big5"),
    ],
)
def test_what_only_happens_to_decode_as_gb18030_is_refused(text: str, encoding: str) -> None:
    with pytest.raises(DataError, match="no UTF-8, and no GB18030 that reads as Chinese"):
        data.decode(Path("a.csv"), text.encode(encoding))


def test_parquet() -> None:
    texts, labels = zip(*REVIEWS, strict=True)
    path = parquet("a.parquet", text=texts, id=[1, 2, 3, 4], label=pa.array(labels).dictionary_encode())
    rows = data.read_rows([path])
    assert pairs(rows) == REVIEWS
    assert [example.line for example in rows.examples] == [1, 2, 3, 4]
    assert rows.files[0]["rows"] == 4


def test_a_line_separator_within_a_text_ends_no_line() -> None:
    text = "a\u2028b\x85c\x0bd"
    for path in (
        write("a.csv", f"text,label\n{text},1\nb,0\n"),
        write(
            "a.jsonl", json.dumps({"text": text, "label": "1"}, ensure_ascii=False) + '\n{"text": "b", "label": "0"}'
        ),
    ):
        assert pairs(data.read_rows([path])) == [(text, "1"), ("b", "0")]


def test_several_files_and_globs_follow_one_another_in_order() -> None:
    for name in ("b2", "b1", "a"):
        write(f"{name}.csv", f"text,label\n{name},1\n")
    write("c.jsonl", '{"review": "c", "target": "0"}')
    rows = data.read_rows(["c.jsonl", "b*.csv", "a.csv"])
    assert pairs(rows) == [("c", "0"), ("b1", "1"), ("b2", "1"), ("a", "1")]
    assert [Path(file["path"]).name for file in rows.files] == ["c.jsonl", "b1.csv", "b2.csv", "a.csv"]
    assert all(Path(file["path"]).is_absolute() and len(file["sha256"]) == 64 for file in rows.files)


def test_words_that_others_take_for_a_missing_value_stay_words() -> None:
    words = ["None", "NA", "null", "nan", "N/A", "NULL", "true"]
    path = write("a.csv", "text,label\n" + "".join(f"{word},{word}\n" for word in words))
    assert pairs(data.read_rows([path])) == [(word, word) for word in words]


# -- labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "labels"),
    [
        ([1, 0, 1], ["1", "0", "1"]),
        ([-1, 10**12], ["-1", "1000000000000"]),
        ([1.0, 0.0], ["1", "0"]),
        ([1, 0.5], ["1", "0.5"]),
        ([True, False], ["true", "false"]),
        (["True", "no"], ["True", "no"]),
        (["01", "1", "1.0"], ["01", "1", "1.0"]),
    ],
)
def test_labels_are_the_strings_of_what_is_in_the_file(raw: list[object], labels: list[str]) -> None:
    path = write("a.jsonl", "\n".join(json.dumps({"text": "a", "label": label}) for label in raw))
    assert [label for _, label in pairs(data.read_rows([path]))] == labels


@pytest.mark.parametrize(
    "labels",
    [
        ("0", "1"),
        ("-1", "0", "1.5", "2", "10"),
        ("01", "1", "02", "2"),
        ("neg", "neutral", "pos"),
        ("10", "9", "a"),
        ("B", "a", "好评", "差评"),
        ("10", "11", "9", "nan"),
        ("1_0", "2"),
        tuple(map(str, range(150))),
    ],
)
def test_the_order_of_labels_is_theirs_whatever_the_rows(labels: tuple[str, ...]) -> None:
    for seed in range(5):
        rows = [*labels, *labels]
        random.Random(seed).shuffle(rows)
        assert data.sorted_labels(rows) == labels


def test_one_class_is_none() -> None:
    with pytest.raises(DataError, match=r'All 2 rows have the label "1"[^$]*a\.csv[^$]*--label') as caught:
        data.check_classes(data.read_rows([write("a.csv", "text,label\na,1\nb,1\n")]).examples)
    assert caught.value.code == "data.one_class"
    assert data.check_classes([Example("a", "9", "", 1), Example("b", "10", "", 2)]) == ("9", "10")


def test_kinds_of_labels_are_not_mixed_where_the_format_has_kinds() -> None:
    labels = [1, "1", True, 0, None]
    path = write("a.jsonl", "\n".join(json.dumps({"text": "a", "label": label}) for label in labels))
    error = refusal(path)
    assert "3 of 5 rows" in str(error)
    assert "mixed kinds: 2, at line 2" in str(error)
    assert all(kind in str(error) for kind in ("string", "true/false", "number"))
    rows = data.read_rows([path], skip_bad=True)
    assert pairs(rows) == [("a", "1"), ("a", "0")]
    assert places(rows) == [(2, "mixed kinds"), (3, "mixed kinds"), (5, "null")]


def test_a_csv_has_no_kinds_so_its_labels_go_with_any() -> None:
    write("a.csv", "text,label\na,1\nb,0\n")
    write("b.jsonl", '{"text": "c", "label": 1}')
    assert [label for _, label in pairs(data.read_rows(["a.csv", "b.jsonl"]))] == ["1", "0", "1"]


def test_a_label_that_training_never_saw() -> None:
    path = write("eval.csv", "text,label\na,pos\nb,neutral\nc,neg\n")
    message = str(refusal(path, known_labels=("neg", "pos")))
    assert all(
        part in message
        for part in ("eval.csv", 'unknown label in column "label": 1, at line 3 ("neutral")', "neg, pos")
    )
    rows = data.read_rows([path], known_labels=("neg", "pos"), skip_bad=True)
    assert (pairs(rows), places(rows)) == ([("a", "pos"), ("c", "neg")], [(3, "unknown label")])


# -- columns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "given", "found"),
    [
        ("text,label", {}, ("text", "label")),
        ("id, Review ,Sentiment", {}, (" Review ", "Sentiment")),
        ("标题,评论,标签", {}, ("评论", "标签")),
        ("text,body,label,class", {}, ("text", "label")),
        ("words,label", {}, ("words", "label")),
        ("text,stars", {}, ("text", "stars")),
        ("text,a,b", {"label": "b"}, ("text", "b")),
        ("text,a,label", {"text": "a"}, ("a", "label")),
        ("text,label", {"text": "label", "label": "text"}, ("label", "text")),
        (",text,label", {}, ("text", "label")),
        ('"a;b;c",text,label', {}, ("text", "label")),
    ],
)
def test_columns_are_found(header: str, given: dict[str, str], found: tuple[str, str]) -> None:
    path = write("a.csv", f"{header}\n{','.join('x' for _ in header.split(','))}\n")
    rows = data.read_rows([path], **given)  # type: ignore[arg-type]
    assert (rows.text_column, rows.label_column) == found


@pytest.mark.parametrize(
    ("header", "given", "code", "words"),
    [
        ("text,label", {"text": "txt"}, "data.missing_column", ['"txt"', "text, label", 'mean "text"', "--text"]),
        ("text,label", {"label": "Lable"}, "data.missing_column", ['"Lable"', 'mean "label"', "--label"]),
        ("good film,1", {}, "data.missing_column", ["No text column", "good film, 1", "header"]),
        ("text,a,b", {}, "data.missing_column", ["No label column", "text, a, b", "--label"]),
        ("review,comment,label", {}, "data.ambiguous_column", ["review, comment", "--text review"]),
        ("text,class,target", {}, "data.ambiguous_column", ["class, target", "--label class"]),
        ("text,a,text", {}, "data.header", ['"text"', "line 1"]),
        ("text,label", {"text": "text", "label": "text"}, "data.same_column", ['"text"']),
    ],
)
def test_columns_are_not_found(header: str, given: dict[str, str], code: str, words: list[str]) -> None:
    path = write("a.csv", f"{header}\n{','.join('x' for _ in header.split(','))}\n")
    error = refusal(path, **given)  # type: ignore[arg-type]
    assert [word for word in ["a.csv", *words] if word not in str(error)] == []
    assert error.code == code


# -- files that are none ---------------------------------------------------------------------------------------

PACKED = gzip.compress(as_csv().encode(), mtime=0)
WHOLE = io.BytesIO()
pq.write_table(pa.table({"text": ["a", "b"], "label": [0, 1]}), WHOLE)


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("a.csv", "", "data.empty", ["empty"]),
        ("a.csv", " \n\n", "data.empty", ["empty"]),
        ("a.csv", b"\xef\xbb\xbf", "data.empty", ["empty"]),
        ("a.jsonl", "\n", "data.empty", ["empty"]),
        ("a.json", "[]", "data.empty", []),
        ("a.csv.gz", gzip.compress(b"", mtime=0), "data.empty", ["empty"]),
        ("a.csv", "text,label\n", "data.empty", ["header and no rows"]),
        ("a.csv", 'text,label\nok,0\n"never closed,1\nb,0\n', "data.csv", ["line 3", "quote"]),
        ("a.csv", 'text,label\nok,0\n"he" said,1\n', "data.csv", ["line 3", "quote"]),
        ("a.csv", "text,label\nok,0\na\0b,1\n", "data.nul", ["line 3", "NUL"]),
        ("a.csv", "text,label\na,1\n".encode("utf-16-le"), "data.nul", ["line 1", "UTF-16"]),
        ("a.csv", b"\xff\xfea", "data.encoding", ["UTF-16"]),
        ("a.csv", b"text,label\nok,0\n\xff\xfe,1\n", "data.bad_rows", ["undecodable", "line 3", "0xff", "iconv"]),
        ("a.csv", b"\xef\xbb\xbftext,label\nab\xe9 c,1\n", "data.encoding", ["line 2", "0xe9"]),
        ("a.jsonl", b'{"text": "caf\xe9 "}', "data.encoding", ["line 1", "0xe9"]),
        ("a.json", '[{"text": "a", "label": 1}, {"text"', "data.json", ["array"]),
        ("a.jsonl", "{'text': 'a', 'label': 1}", "data.bad_rows", ["not JSON", "line 1"]),
        ("a.jsonl", '{"text": "a"', "data.bad_rows", ["not JSON", "line 1"]),
        ("a.parquet", "text,label\na,1\n", "data.parquet", ["not a", "CSV"]),
        ("a.parquet", "", "data.parquet", ["0 bytes"]),
        ("a.parquet", WHOLE.getvalue()[:-9], "data.parquet", []),
        ("a.csv.gz", PACKED[:-9], "data.gzip", ["damaged"]),
        ("a.csv.gz", PACKED[:15] + b"\xff\xff\xff" + PACKED[18:], "data.gzip", ["damaged"]),
        ("a.csv.gz", PACKED[:5], "data.gzip", ["damaged"]),
        ("a.xlsx", "PK", "data.format", [".xlsx", "CSV"]),
        ("a.gz", PACKED, "data.format", ["CSV"]),
        ("words", "text,label\na,1\n", "data.format", ["CSV"]),
    ],
)
def test_a_file_that_cannot_be_read(name: str, content: str | bytes, code: str, words: list[str]) -> None:
    error = refusal(write(name, content))
    assert [word for word in [name, *words] if word.casefold() not in str(error).casefold()] == []
    assert error.code == code


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("reviws.csv", ['"reviews.csv"']),
        ("nowhere/reviews.csv", ["nowhere/reviews.csv"]),
        ("*.tsv", ["*.tsv"]),
        ("~nobody-of-that-name/a.csv", ["~nobody-of-that-name/a.csv"]),
        ("a good film " * 30, ["a good film"]),
    ],
)
def test_a_missing_file(path: str, words: list[str]) -> None:
    write("reviews.csv", "text,label\na,1\n")
    error = refusal(path)
    assert error.code == "data.missing_file"
    assert [word for word in words if word not in str(error)] == []


def test_a_folder_is_no_file() -> None:
    Path("folder").mkdir()
    assert refusal("folder").code == "data.folder"


@pytest.mark.parametrize(
    "text",
    [
        "une très belle fête", "la version créée", "schöne Grüße", "El niño comió piñas", "não é tão bom", "blåbærgrød",
        "voilà", "ÉÉ", "it cost ££", "½ price", "naïve café, déjà vu", "À bientôt, Zoë",
    ],
)  # fmt: skip
def test_latin_1_is_refused_and_never_becomes_other_letters(text: str) -> None:
    error = refusal(write("a.csv", f"text,label\nfine,0\nmore words before {text},1\n".encode("latin-1")))
    assert error.code == "data.bad_rows"
    assert "undecodable" in str(error)
    assert "line 3" in str(error)


def test_bytes_that_are_no_text_are_set_aside_row_by_row() -> None:
    rows = [f"a film of {i} words,{i % 2}" for i in range(20)]
    raw = "\n".join(["text,label", *rows]).encode() + b"\ncaf\xe9,1\nfine,\xff0\n"
    found = data.read_rows([write("a.csv", raw)], skip_bad=True)
    assert [(r.line, r.reason, r.value, r.column) for r in found.rejects] == [
        (22, "undecodable", "byte 0xe9", "text"),
        (23, "undecodable", "byte 0xff", "label"),
    ]
    assert found.rows_in == len(found.examples) + 2 == 22
    chinese = "\n".join(["text,label", *(f"味道不错，就是送得太慢了{i},{i % 2}" for i in range(9))]).encode("gb18030")
    found = data.read_rows([write("b.csv", chinese + b"\n\xff\xff,1\n")], skip_bad=True)
    assert [reject.line for reject in found.rejects] == [11]
    assert found.examples[0].text == "味道不错，就是送得太慢了0"


def test_a_parquet_with_two_columns_of_one_name() -> None:
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"]), pa.array([1])], ["text", "text", "label"]), "a.parquet")
    error = refusal("a.parquet")
    assert (error.code, '"text"' in str(error)) == ("data.header", True)


def test_a_column_that_nobody_asked_for_is_not_in_the_way() -> None:
    times = pa.array([1, 2], pa.timestamp("us", "Mars/Olympus"))
    assert pairs(data.read_rows([parquet("a.parquet", text=["a", "b"], label=[0, 1], at=times)])) == [
        ("a", "0"),
        ("b", "1"),
    ]


def test_a_column_that_cannot_be_read_is_named() -> None:
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    error = refusal(parquet("a.parquet", text=["a"], label=[0], note=bad))
    assert (error.code, '"note"' in error.what) == ("data.parquet", True)


def test_files_may_name_their_columns_differently_and_are_read_again_so() -> None:
    write("a.csv", "text,label\ngood,1\n")
    write("b.csv", "review,label\nbad,0\n")
    rows = data.read_rows(["a.csv", "b.csv"])
    assert (rows.text_column, rows.label_column) == ("auto", "label")
    again = data.read_rows(["a.csv", "b.csv"], text=rows.text_column, label=rows.label_column)
    assert pairs(again) == pairs(rows) == [("good", "1"), ("bad", "0")]


def test_a_link_is_of_the_format_that_its_own_name_says() -> None:
    Path("blobs").mkdir()
    Path(parquet("blobs/0a1b2c", text=["a"], label=[0]))
    Path("train.parquet").symlink_to("blobs/0a1b2c")
    rows = data.read_rows(["train.parquet"])
    assert pairs(rows) == [("a", "0")]
    assert Path(rows.files[0]["path"]) == Path.cwd() / "train.parquet"


def test_reading_a_parquet_brings_no_pandas_into_memory() -> None:
    pytest.importorskip("pandas")
    program = (
        "import sys; from pathlib import Path; from trimtab import data\n"
        "print(list(data.read_table(Path(sys.argv[1])).columns), 'pandas' in sys.modules)"
    )
    command = [sys.executable, "-c", program, parquet("a.parquet", text=["a"], label=[0])]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "['text', 'label'] False\n"


def test_a_parquet_whose_strings_are_no_utf_8() -> None:
    texts = pa.array([b"a", b"\xff\xfe"], pa.binary()).view(pa.string())
    assert refusal(parquet("a.parquet", text=texts, label=[0, 1])).code == "data.parquet"


# -- rows that cannot be used ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason", "column", "value"),
    [
        ({"text": None, "label": "a"}, "null", "text", ""),
        ({"label": "a"}, "null", "text", ""),
        ({"text": "x"}, "null", "label", ""),
        ({"text": "x", "label": math.nan}, "null", "label", ""),
        ({"text": "x", "label": math.inf}, "not a label", "label", "inf"),
        ({"text": " \n", "label": "a"}, "empty", "text", ""),
        ({"text": "x", "label": " "}, "empty", "label", ""),
        ({"text": 3, "label": "a"}, "not text", "text", "3"),
        ({"text": ["x"], "label": "a"}, "not text", "text", "['x']"),
        ({"text": "x", "label": [1, 2]}, "not a label", "label", "[1, 2]"),
        ({"text": "x", "label": {"b": 1}}, "not a label", "label", "{'b': 1}"),
        ({"text": "cut \ud83d", "label": "a"}, "half a character", "text", ""),
        ({"text": "x", "label": "\ud83d"}, "half a character", "label", ""),
        (["x", "a"], "not an object", "", '["x", "a"]'),
    ],
)
def test_a_bad_row(row: object, reason: str, column: str, value: str) -> None:
    rows = [{"text": "fine", "label": "a"}, row, {"text": "fine", "label": "b"}]
    path = write("a.jsonl", "\n".join(json.dumps(row) for row in rows))
    message = str(refusal(path))
    found = f'{reason} in column "{column}": 1, at line 2' if column else f"{reason}: 1, at line 2"
    assert all(part in message for part in ("1 of 3 rows", found, value, "a.jsonl", "--bad-rows"))
    used = data.read_rows([path], skip_bad=True)
    assert (len(used.examples), places(used), used.rows_in) == (2, [(2, reason)], 3)


def test_a_number_that_is_too_long_is_a_bad_row() -> None:
    path = write("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": ' + "1" * 5_000 + "}\n")
    assert "at line 2" in str(refusal(path))


def test_all_bad_rows_are_counted_and_the_first_five_named() -> None:
    lines = ["text,label", *(["a,b,1"] * 7), ",1", "fine,0"]
    message = str(refusal(write("a.csv", "\n".join(lines))))
    assert "8 of 9 rows" in message
    assert "ragged: 7, at line 2 (" in message
    assert "3 cells under 2 columns: a,b,1" in message
    assert "and 2 more" in message
    assert 'empty in column "text": 1, at line 9' in message
    assert 'needs "..." around the cell' in message


def test_where_no_row_is_left_the_reasons_are_told() -> None:
    message = str(refusal(write("a.csv", "text,label\n,1\na,b,1\n"), skip_bad=True))
    assert "a.csv" in message
    assert all(reason in message for reason in ("empty", "ragged"))
    assert "--bad-rows" not in message, "which would leave none"


LINE = st.text("ab好 ,", max_size=6)


@settings(deadline=None)
@given(lines=st.lists(LINE, min_size=1, max_size=12))
def test_rows_in_are_rows_used_and_rows_set_aside(lines: list[str]) -> None:
    path = write("a.csv", "\n".join(["text,label", *lines]))
    rows = [(number, line.split(",")) for number, line in enumerate(lines, start=2) if line]
    good = [(n, cells) for n, cells in rows if len(cells) == 2 and all(cell.strip() for cell in cells)]
    if not good:
        refusal(path, skip_bad=True)
        return
    read = data.read_rows([path], skip_bad=True)
    assert [(example.line, [example.text, example.label]) for example in read.examples] == good
    assert [reject.line for reject in read.rejects] == [number for number, _ in rows if number not in dict(good)]
    assert read.rows_in == len(rows) == read.files[0]["rows"] == len(read.examples) + len(read.rejects)
    assert all(isinstance(reject, Reject) and reject.reason in ("ragged", "empty") for reject in read.rejects)
    if read.rejects:
        assert f"{len(read.rejects)} of {len(rows)} rows" in str(refusal(path))


PIECES = st.sampled_from([b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"\xc4\xe3", b"{", b"}", b"[", b"1", b"\\", b""])


@settings(deadline=None)
@given(
    file=st.sampled_from(
        [("a.csv", as_csv().encode()), ("a.jsonl", as_jsonl().encode()), ("a.parquet", WHOLE.getvalue())]
    ),
    edits=st.lists(st.tuples(st.integers(0, 10**6), PIECES), min_size=1, max_size=4),
)
def test_whatever_happens_to_a_file_the_rows_add_up_or_it_is_refused(
    file: tuple[str, bytes], edits: list[tuple[int, bytes]]
) -> None:
    name, content = file
    for place, piece in edits:
        at = place % len(content)
        content = content[:at] + piece + content[at + 1 :]
    path = write(name, content)
    try:
        read = data.read_rows([path], skip_bad=True)
    except DataError:
        assert name in str(refusal(path, skip_bad=True))
    else:
        assert read.rows_in == read.files[0]["rows"] == len(read.examples) + len(read.rejects)


# -- drawing and splitting -------------------------------------------------------------------------------------


def numbered(labels: list[str]) -> list[Example]:
    return [Example(str(i), label, "a.csv", i + 2) for i, label in enumerate(labels)]


@pytest.mark.parametrize("limit", [1, 7, 20, 50])
def test_rows_are_drawn_as_numpy_permutes(limit: int) -> None:
    rows = numbered(["a"] * 20)
    expected = np.random.default_rng(42).permutation(20)[:limit]
    assert [int(row.text) for row in data.draw(rows, limit, 42)] == expected.tolist()
    assert data.draw(rows, limit, 42) != data.draw(rows, limit, 43)
    assert data.draw(rows, 0, 42) == rows


@settings(deadline=None)
@given(
    labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_split(labels: list[str], fraction: float, seed: int) -> None:
    rows = numbered(labels)
    train, evaluation = data.split(rows, fraction, seed)
    assert (train, evaluation) == data.split(rows, fraction, seed)
    assert sorted(train + evaluation, key=lambda row: row.line) == rows
    for part in (train, evaluation):
        assert part == sorted(part, key=lambda row: row.line)
    total, held = Counter(labels), Counter(row.label for row in evaluation)
    for label, count in total.items():
        assert held[label] < count
        assert held[label] == 0 if count == 1 else held[label] >= 1
        assert abs(held[label] - count * fraction) <= 1


def test_split_is_seeded() -> None:
    rows = numbered(["a", "b"] * 20)
    assert len({tuple(data.split(rows, 0.2, seed)[1]) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("labels", "blocks"),
    [("aaabbb", True), ("aaabbbccc", True), ("ababab", False), ("aabbab", False), ("ab", False), ("aaaaaa", True)],
)
def test_sorted_by_label(labels: str, blocks: bool) -> None:
    assert data.is_sorted_by_label(numbered(list(labels))) == blocks


def test_a_reject_names_its_file() -> None:
    write("a.csv", "text,label\na,1\n,0\n")
    write("b.csv", "text,label\nb,0\nb,1\n,0\n")
    rows = data.read_rows(["a.csv", "b.csv"], skip_bad=True)
    assert [(Path(reject.file).name, reject.line) for reject in rows.rejects] == [("a.csv", 3), ("b.csv", 4)]
    assert re.search(r"a\.csv\D*3.*b\.csv\D*4", str(refusal("a.csv", "b.csv")), re.DOTALL)


def test_a_name_that_is_no_utf8_is_refused() -> None:
    name = os.fsdecode(b"rows\xff.csv")
    Path(name).write_text("text,label\na,1\n")
    error = refusal(name)
    assert error.code == "data.name"
    str(error).encode("utf-8")


def test_the_last_ending_tells_the_format() -> None:
    assert [data.file_kind(Path(name)) for name in ("a.csv", "a.tsv.GZ", "a.csv.bak", "a.parquet")] == [
        ",",
        "\t",
        None,
        "parquet",
    ]


def test_a_header_of_another_encoding_is_told_as_that() -> None:
    error = refusal(write("a.csv", "texte,catégorie\nbien,a\nmal,b\n".encode("latin-1")))
    assert (error.code, "Line 1" in str(error), "iconv" in str(error)) == ("data.encoding", True, True)


def test_a_line_of_json_with_half_a_name_is_a_row_that_cannot_be_used() -> None:
    file = write("a.jsonl", b'{"text": "a", "label": "x"}\n{"te\\ud83dxt": "b", "label": "y"}\n')
    found = data.read_rows([file], skip_bad=True)
    assert [(reject.line, reject.reason) for reject in found.rejects] == [(2, "half a character")]


def test_a_pipe_is_refused_and_not_waited_for() -> None:
    os.mkfifo("p.csv")
    assert refusal("p.csv").code == "data.pipe"


def test_a_list_in_the_first_line_does_not_make_a_file_an_array() -> None:
    file = write("a.jsonl", b'["a", "x"]\n{"text": "b", "label": "y"}\n')
    assert [reject.reason for reject in data.read_rows([file], skip_bad=True).rejects] == ["not an object"]
