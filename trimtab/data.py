"""Labelled files -> examples. Every problem of format or content ends here, with file, line, value and mend.

Reads parquet, CSV, TSV and JSONL (also gzipped), several files, globs and hf:// addresses; finds the text and
the label column; checks every row; draws and splits rows. Knows nothing of tokens or torch.
"""

import csv
import glob
import gzip
import io
import json
import math
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trimtab.errors import DataError, did_you_mean, quoted, some
from trimtab.hub import fetch_data_file, file_sha256

TEXT_COLUMNS = (
    *("text", "review", "sentence", "content", "comment", "body", "message", "question", "utterance"),
    *("文本", "内容", "评论", "句子", "正文"),
)
LABEL_COLUMNS = (
    *("label", "labels", "target", "class", "category", "intent", "sentiment", "y"),
    *("标签", "类别", "情感", "分类", "意图"),
)

_SUFFIXES = {
    ".csv": ",",
    ".tsv": "\t",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_COMMON_CHINESE = frozenset(
    "，。！？、：；（）“”《》的一是在不了有和人这這中大为為上个個国國我以要他时時来來用们們生到作地于於出就分对對成会會可主发發年动動"
    "同工也能下过過子说說产產种種面而方后後多定行学學法所民得经經三之进進着等部度家电電力里裡如水化高自二理起小现現实實加量都两兩"
    "好差评評很没沒味送吃服务務快慢点點还還客货貨退订單单看片影真太给給又去天想看你她吗嗎吧什么麼把被那最喜欢歡正负負面"
)
_HALF = re.compile("[\ud800-\udfff]")  # JSON's \ud83d without its other half: no file and no tokenizer takes it
_BYTE = re.compile("[\udc80-\udcff]")  # a byte that no encoding took, as Python's surrogateescape keeps it
_TORN = ", with bytes that are not"  # what the name of an encoding ends with where a file has such bytes
_MENDS = {
    "undecodable": "save the file as UTF-8, e.g.: iconv -f LATIN1 -t UTF-8 FILE > utf8-FILE",
    "half a character": r"an escape such as \ud83d has lost its other half: write the text again",
    "ragged": 'quote the text: a comma inside it needs "..." around the cell',
    "null": "fill the cell",
    "empty": "fill the cell",
    "not text": "the text column must hold strings: --text COLUMN",
    "not a label": "a label is a string, a whole number or true/false",
    "not JSON": 'one object a line: {"text": ..., "label": ...}',
    "not an object": 'a line of JSONL is one object: {"text": ..., "label": ...}',
    "unknown label": "correct the label, or add such rows to the training file",
    "mixed kinds": "write all labels as one kind",
}


class Example(NamedTuple):
    """One labelled text, and where it stands."""

    text: str
    label: str
    file: str
    line: int
    """Line of a CSV or JSONL file, row of a parquet file; from 1."""


class Reject(NamedTuple):
    """A row that cannot be used."""

    file: str
    line: int
    reason: str
    value: str
    column: str = ""
    """The column of the cell at fault; empty where the whole row is."""


@dataclass(frozen=True)
class Table:
    """A file as columns of plain values."""

    path: Path
    columns: dict[str, list[Any]]
    lines: list[int]
    """Where each row stands: line of a text file (the first, where a cell has several), row of a parquet."""
    ragged: list[Reject] = field(default_factory=list)
    encoding: str = "UTF-8"
    delimiter: str = ""

    @property
    def is_torn(self) -> bool:
        """Whether some of its bytes belong to no encoding; they stand in the cells as lone surrogates."""
        return self.encoding.endswith(_TORN)


@dataclass(frozen=True)
class Rows:
    """The usable rows of one role (training, evaluation or test), and what was found on the way."""

    examples: list[Example]
    rejects: list[Reject]
    text_column: str
    """`auto` where the files name it differently; so is `label_column`."""
    label_column: str
    files: list[dict[str, Any]]
    """For each file: path, sha256, rows, encoding, delimiter."""

    @property
    def rows_in(self) -> int:
        """Rows found in the files, usable or not."""
        return len(self.examples) + len(self.rejects)


def read_rows(
    paths: Sequence[str],
    *,
    text: str = "auto",
    label: str = "auto",
    skip_bad: bool = False,
    known_labels: Sequence[str] | None = None,
) -> Rows:
    """Reads labelled files and checks every row.

    Args:
        paths: Files, globs or hf:// addresses; their rows follow one another.
        text: Name of the text column, or `auto`.
        label: Name of the label column, or `auto`.
        skip_bad: Set rows that cannot be used aside instead of raising.
        known_labels: The labels of the training rows; a row with another label cannot be used.

    Raises:
        DataError: a file or column is missing or unreadable, or rows cannot be used (all of them are counted, the
            first five named).
        BaseModelError: an hf:// address could not be fetched.
    """
    examples: list[Example] = []
    rejects: list[Reject] = []
    kinds: list[str] = []
    files = []
    text_column = label_column = ""
    columns: list[tuple[str, str]] = []
    for path in expand(paths):
        table = read_table(path)
        name = str(table.path)
        rejects += table.ragged
        if table.lines or not table.ragged:
            text_column, label_column = find_columns(table, text, label)
            columns.append((text_column, label_column))
        cells = zip(table.lines, table.columns.get(text_column, []), table.columns.get(label_column, []), strict=True)
        for line, cell, raw in cells if table.lines else ():
            value, kind, problem = _label(raw)
            column, at_fault = label_column, raw
            if not problem and known_labels is not None and value not in known_labels:
                problem = "unknown label"
            if of_text := text_problem(cell):
                problem, column, at_fault = of_text, text_column, cell
            if problem:
                shown = at_fault if problem in ("not text", "not a label", "unknown label") else ""
                if problem == "half a character" and table.is_torn and (byte := _foreign_byte(str(at_fault))):
                    problem, shown = "undecodable", byte
                rejects.append(Reject(name, line, problem, str(shown)[:80], column))
            else:
                examples.append(Example(cell, value, name, line))
                kinds.append("" if table.delimiter else kind)  # a CSV has no kinds
        files.append(
            {
                "path": name,
                "sha256": file_sha256(table.path),
                "rows": len(table.lines) + len(table.ragged),
                "encoding": table.encoding,
                "delimiter": table.delimiter,
            }
        )
    mixed = _of_rarer_kinds(examples, kinds)
    if mixed:
        gone = {(reject.file, reject.line) for reject in mixed}
        examples = [example for example in examples if (example.file, example.line) not in gone]
        rejects += mixed
    if rejects and not (skip_bad and examples):
        raise _bad_rows(rejects, len(examples) + len(rejects), known_labels)
    if not examples:
        raise DataError(
            "data.empty",
            "There is no usable row.",
            where=some(paths),
            mend="a file with one row a text, under a header",
        )
    text_column, label_column = (names[0] if len(set(names)) == 1 else "auto" for names in zip(*columns, strict=True))
    return Rows(examples, sorted(rejects), text_column, label_column, files)


def sorted_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """The distinct labels in their one order, whatever the rows': numbers by value, else by code point."""
    distinct = set(labels)
    if all(_NUMBER.fullmatch(label) for label in distinct):  # float() takes nan and 1_0 too; nan has no order
        return tuple(sorted(distinct, key=lambda label: (float(label), label)))
    return tuple(sorted(distinct))


def check_classes(examples: Sequence[Example]) -> tuple[str, ...]:
    """The labels of the training rows in their order.

    Raises:
        DataError: there is one class only.
    """
    labels = sorted_labels([example.label for example in examples])
    if len(labels) < 2:
        raise DataError(
            "data.one_class",
            f'All {len(examples):,} rows have the label "{labels[0]}"; a classifier needs at least two classes.',
            where=examples[0].file,
            mend="was the file cut while it was sorted by label? Or is another column the label? --label COLUMN",
        )
    return labels


def draw(examples: list[Example], limit: int, seed: int) -> list[Example]:
    """At most `limit` rows, drawn as `default_rng(seed).permutation(n)[:limit]`; 0: all, in their order."""
    if limit == 0:
        return examples
    return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:limit]]


def split(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Splits off an evaluation part, stratified: each class gives `fraction` of its rows, at least one of two.

    Both parts keep the order of the file. Texts that are the same (`reduced`) go together, with the class of the first
    of them, so that nothing is judged that was trained on. A class with a single text stays in the training part.
    """
    first: dict[str, int] = {}
    repeats: dict[int, list[int]] = {}
    for row, example in enumerate(examples):
        repeats.setdefault(first.setdefault(reduced(example.text), row), []).append(row)
    texts_of: dict[str, list[int]] = {}
    for row in repeats:
        texts_of.setdefault(examples[row].label, []).append(row)
    rng = np.random.default_rng(seed)
    chosen: set[int] = set()
    for label in sorted(texts_of):
        texts = [int(row) for row in rng.permutation(texts_of[label])]
        rows = sum(len(repeats[row]) for row in texts)
        wanted, taken = max(1, round(rows * fraction)), 0
        for row in sorted(texts, key=lambda row: len(repeats[row]) > wanted)[:-1]:  # what is too large only if need be
            if taken == 0 or taken + len(repeats[row]) <= wanted:
                chosen.update(repeats[row])
                taken += len(repeats[row])
    return (
        [example for row, example in enumerate(examples) if row not in chosen],
        [example for row, example in enumerate(examples) if row in chosen],
    )


_BETWEEN_LETTERS = re.compile(r"[\W_]+")


def reduced(text: str) -> str:
    """A text as its casefolded letters and digits, with nothing between them: texts of one such form are the same.

    Spaces, punctuation and case make no second text. One without letters and digits stays as it is.
    """
    folded = text.casefold()
    if not folded.isascii():
        folded = folded.replace("i\u0307", "i")  # Turkish's dotted capital
        return _BETWEEN_LETTERS.sub(_marks_alone, folded) or text.strip()
    return _BETWEEN_LETTERS.sub("", folded) or text.strip()


def _marks_alone(between: re.Match[str]) -> str:
    """What stays of the signs between letters: the vowels of Hindi, Thai and their kin, to Unicode no letters.

    Variation selectors (U+FE00 to U+FE0F) are marks too, and part of an emoji. A pattern with all marks in it took
    27 s over the demo's 20,000 reviews, this way takes 1.3 (read once, by hand).
    """
    signs = between.group()
    if signs.isascii():
        return ""
    return "".join(
        sign for sign in signs if unicodedata.category(sign) in ("Mn", "Mc") and not "\ufe00" <= sign <= "\ufe0f"
    )


def is_sorted_by_label(examples: Sequence[Example]) -> bool:
    """Whether each class is one block, so that the first rows of the file would hold one class only."""
    changes = sum(a.label != b.label for a, b in pairwise(examples))
    return changes == len({example.label for example in examples}) - 1 and len(examples) > 2 * (changes + 1)


# -- columns ---------------------------------------------------------------------------------------------------


def find_columns(table: Table, text: str, label: str) -> tuple[str, str]:
    """Names of the text and the label column: as given, else by the usual names, else the other one of two."""
    label_column = "" if label == "auto" else _given(table, label, "--label")
    text_column = find_text_column(table, text, other_than=label_column)
    if not label_column:
        label_column = _by_name(table, LABEL_COLUMNS, "label", other_than=text_column) or _other_of_two(
            table, text_column
        )
    text_column = text_column or _other_of_two(table, label_column)
    if text_column and text_column == label_column:
        raise DataError(
            "data.same_column",
            f'"{text_column}" cannot be both the text and the label.',
            where=str(table.path),
            mend="--text COLUMN --label COLUMN, two different ones",
        )
    if not text_column or not label_column:
        missing = "text" if not text_column else "label"
        raise DataError(
            "data.missing_column",
            f"No {missing} column was recognised. Columns: {some(table.columns, 20)}.",
            where=str(table.path),
            mend="name the columns: --text COLUMN --label COLUMN; the first line must be a header. Known by name: "
            f"text {some(TEXT_COLUMNS, 4)}; label {some(LABEL_COLUMNS, 4)}",
        )
    return text_column, label_column


def find_text_column(table: Table, text: str, *, other_than: str = "") -> str:
    """Name of the text column; empty where no name says it."""
    return (
        _given(table, text, "--text")
        if text != "auto"
        else _by_name(table, TEXT_COLUMNS, "text", other_than=other_than)
    )


def _given(table: Table, name: str, flag: str) -> str:
    if name not in table.columns:
        raise DataError(
            "data.missing_column",
            f'There is no column "{name}". Columns: {some(table.columns, 20)}.{did_you_mean(name, table.columns)}',
            where=str(table.path),
            mend=f"{flag} COLUMN",
        )
    return name


def _by_name(table: Table, usual: Sequence[str], role: str, *, other_than: str) -> str:
    found = [column for column in table.columns if column.strip().casefold() in usual and column != other_than]
    exact = [column for column in found if column.strip().casefold() == role]
    if len(exact) == 1:
        return exact[0]
    if len(found) > 1:
        raise DataError(
            "data.ambiguous_column",
            f"Several columns could be the {role}: {some(found)}.",
            where=str(table.path),
            mend=f"--{role} {found[0]}",
        )
    return found[0] if found else ""


def _other_of_two(table: Table, known: str) -> str:
    others = [column for column in table.columns if column != known]
    return others[0] if known and len(others) == 1 else ""


# -- cells -----------------------------------------------------------------------------------------------------


def has_half_character(text: str) -> bool:
    """Whether a text holds one half of a surrogate pair, which is no character and cannot be written as UTF-8."""
    return _HALF.search(text) is not None


def text_problem(cell: object) -> str:
    """Why a cell cannot be a text: null, not text, half a character or empty; an empty string where it can."""
    if cell is None:
        return "null"
    if not isinstance(cell, str):
        return "not text"
    if has_half_character(cell):
        return "half a character"
    return "" if cell.strip() else "empty"


def _label(raw: object) -> tuple[str, str, str]:
    """A raw label as (label, kind, problem); the label is the string that stands in every file of ours."""
    if isinstance(raw, str) and _HALF.search(raw):
        return "", "", "half a character"
    if isinstance(raw, str):
        return (raw, "string", "") if raw.strip() else ("", "", "empty")
    if isinstance(raw, bool):
        return str(raw).lower(), "true/false", ""
    if isinstance(raw, int):
        return str(raw), "number", ""
    if isinstance(raw, float) and math.isfinite(raw):
        return str(int(raw) if raw.is_integer() else raw), "number", ""
    is_null = raw is None or (isinstance(raw, float) and math.isnan(raw))
    return "", "", "null" if is_null else "not a label"


def _of_rarer_kinds(examples: Sequence[Example], kinds: Sequence[str]) -> list[Reject]:
    """Where labels are of several kinds (true beside 1 beside "1"), the rows of all but the commonest kind."""
    count = Counter(kind for kind in kinds if kind)
    if len(count) < 2:
        return []
    commonest = count.most_common(1)[0][0]
    return [
        Reject(
            example.file,
            example.line,
            "mixed kinds",
            f"{example.label} ({kind}; most labels here: {commonest})",
        )
        for example, kind in zip(examples, kinds, strict=True)
        if kind not in ("", commonest)
    ]


def _bad_rows(rejects: list[Reject], rows: int, known_labels: Sequence[str] | None) -> DataError:
    """One error for all rows that cannot be used, by reason."""
    by_reason: dict[tuple[str, str], list[Reject]] = {}
    for reject in rejects:
        by_reason.setdefault((reject.reason, reject.column), []).append(reject)
    several = len({reject.file for reject in rejects}) > 1
    parts = []
    for (reason, column), found in by_reason.items():
        places = some(
            (f"{Path(reject.file).name}:" if several else "")
            + (f'{reject.line} ("{reject.value}")' if reject.value else str(reject.line))
            for reject in found
        )
        in_column = f' in column "{column}"' if column else ""
        parts.append(f"{reason}{in_column}: {len(found):,}, at line {places}")
    reasons = [reason for reason, _ in by_reason]
    expected = (
        f" The training rows have: {some(known_labels, 10)}." if "unknown label" in reasons and known_labels else ""
    )
    mends = list(dict.fromkeys(_MENDS[reason] for reason in reasons))
    if len(rejects) < rows:  # else none would be left
        mends.append("or set such rows aside: --bad-rows skip")
    return DataError(
        "data.bad_rows",
        f"{len(rejects):,} of {rows:,} rows cannot be used. " + "; ".join(parts) + "." + expected,
        where=some(dict.fromkeys(reject.file for reject in rejects)),
        mend="\n         ".join(mends),
    )


# -- files -----------------------------------------------------------------------------------------------------


def expand(paths: Sequence[str]) -> list[Path]:
    """Files, globs and hf:// addresses as the files they stand for, in order.

    Raises:
        DataError: a file does not exist or a glob matches nothing.
    """
    files: list[Path] = []
    for path in paths:
        if path.startswith("hf://"):
            files.append(fetch_data_file(path))
            continue
        here = Path(os.path.expanduser(path))
        # os.path and not Path: it raises for neither an unknown ~user nor a name that is too long
        matches = (
            [here]
            if os.path.exists(here)
            else [Path(match) for match in sorted(glob.glob(str(here), recursive=True)) if os.path.exists(match)]
        )
        if not matches:
            siblings = [item.name for item in here.parent.iterdir()] if os.path.isdir(here.parent) else []
            raise DataError(
                "data.missing_file",
                f"There is no file {path}.{did_you_mean(here.name, siblings)}",
                where=f"looked from {Path.cwd()}",
                mend="check the path; trimtab demo needs no file of yours",
            )
        if pipes := [match for match in matches if match.is_fifo()]:
            raise DataError(
                "data.pipe",
                "This is a pipe, which can be read only once.",
                where=str(pipes[0]),
                mend=f"save it first: cat {quoted(pipes[0])} > rows.csv",
            )
        # A link keeps its own name, whose ending tells the format: in the hub's cache its target's is a checksum.
        files += [match.parent.resolve() / match.name for match in matches]
    for file in files:
        if _HALF.search(str(file)):
            raise DataError(
                "data.name",
                "The name of this file is no UTF-8, so no recipe could hold it.",
                where=str(file).encode("utf-8", "backslashreplace").decode(),
                mend="rename it",
            )
    folders = [file for file in files if file.is_dir()]
    if folders:
        raise DataError(
            "data.folder",
            "This is a folder, not a file.",
            where=str(folders[0]),
            mend=f"'{folders[0]}/*.parquet'",
        )
    return files


def file_kind(path: Path) -> str | None:
    """What the name of a file says: `parquet`, `json`, or the delimiter of a text file; None: none that is read."""
    name = path.name.lower().removesuffix(".gz")
    return _SUFFIXES.get(Path(name).suffix)


def read_table(path: Path) -> Table:
    """Reads one file; its format is told by its name, its compression by its first bytes.

    Raises:
        DataError: empty, of no format or encoding that is read, or damaged.
    """
    kind = file_kind(path)
    if kind is None:
        raise DataError(
            "data.format",
            f'A file "{path.suffix or path.name}" is none that trimtab reads.',
            where=str(path),
            mend="parquet, CSV, TSV or JSONL, told by the ending of the name; an Excel sheet: save it as CSV UTF-8",
        )
    try:
        return _read_parquet(path) if kind == "parquet" else _read_text(path, kind)
    except PermissionError:
        raise _forbidden(path) from None


def _forbidden(path: Path) -> DataError:
    return DataError("data.permission", "This file may not be read.", where=str(path), mend=f"chmod u+r {path}")


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet as pq

    # pq.read_table would import pandas where there is one: 41 MB that a run keeps
    with _parquet_errors(path), pq.ParquetFile(path) as file:
        _check_header(path, file.schema_arrow.names)
        table = file.read()
        columns = {name: _values(path, name, table.column(name)) for name in table.column_names}
    return Table(path, columns, list(range(1, table.num_rows + 1)), encoding="parquet")


def refuse_torn(table: Table) -> None:
    """For whom no row may be set aside.

    Raises:
        DataError: some bytes of the file belong to no encoding; the first is named.
    """
    if table.is_torn:
        decode(table.path, _bytes(table.path))


def read_parquet_in_parts(path: Path, rows: int) -> Iterator[tuple[Table, Any]]:
    """A parquet file as tables of at most `rows` rows, each with pyarrow's own RecordBatch, which keeps its types.

    A file without rows is one table without rows.

    Raises:
        DataError: this is not a whole parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _parquet_errors(path), pq.ParquetFile(path) as file:
        _check_header(path, file.schema_arrow.names)
        row = 1
        nothing = pa.RecordBatch.from_pylist([], file.schema_arrow)
        for batch in file.iter_batches(rows) if file.metadata.num_rows else (nothing,):
            columns = {name: _values(path, name, batch.column(name)) for name in batch.schema.names}
            yield Table(path, columns, list(range(row, row + len(batch))), encoding="parquet"), batch
            row += len(batch)


def _values(path: Path, name: str, column: Any) -> list[Any]:
    """The cells of a column; times as pyarrow writes them, for Python has no nanoseconds and no year 10000.

    Raises:
        DataError: a cell is nothing that Python can hold.
    """
    import pyarrow as pa

    try:
        if not pa.types.is_temporal(column.type):
            return column.to_pylist()  # type: ignore[no-any-return]
        try:
            return column.cast(pa.string()).to_pylist()  # type: ignore[no-any-return]
        except pa.ArrowException:  # an unknown zone: the number that is kept
            return column.cast(pa.int64()).to_pylist()  # type: ignore[no-any-return]
    except (pa.ArrowException, ValueError, OverflowError) as error:  # bytes that are no UTF-8, nanoseconds in a list
        raise DataError(
            "data.parquet",
            f'The column "{name}", {column.type}, cannot be read: {str(error).splitlines()[0]}',
            where=str(path),
            mend="write that column again, or leave it out of the file",
        ) from None


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except PermissionError:
        raise _forbidden(path) from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            "data.parquet",
            f"This is not a whole parquet file: {str(error).splitlines()[0]}",
            where=str(path),
            mend="was it cut while it was copied, or is it a CSV with a wrong name? Fetch or export it again",
        ) from None


def _read_text(path: Path, kind: str) -> Table:
    text, encoding = _decode_rows(path, _bytes(path), has_header=kind != "json")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            "data.nul",
            f"Line {line:,} holds a NUL byte.",
            where=f"{path}, line {line}",
            mend="is this UTF-16 without its byte order mark, or no text at all? Save it as UTF-8",
        )
    if not text.strip():
        raise DataError("data.empty", "This file is empty.", where=str(path), mend="a header line, then one row a text")
    if kind == "json":
        return _read_json(path, text, encoding)
    return _read_csv(path, text, encoding, "\t" if kind == "\t" else _delimiter(text))


def _bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            "data.gzip", f"This gzip file is damaged: {error}", where=str(path), mend="fetch or pack it again"
        ) from None


def decode(path: Path, raw: bytes) -> tuple[str, str]:
    """Strict UTF-8 first, then GB18030 where the result reads as Chinese; never a replacement character.

    GB18030 must not come first: most UTF-8 lines decode under it, to nonsense. It takes Latin-1, Cyrillic and Korean
    files too, to characters at random: under 1 in 10 of them is a common one, 6 in 10 of real Chinese are.
    """
    for mark, encoding, name in (
        (b"\xef\xbb\xbf", "utf-8", "UTF-8 with BOM"),
        (b"\xff\xfe", "utf-16", "UTF-16"),
        (b"\xfe\xff", "utf-16", "UTF-16"),
    ):
        if raw.startswith(mark):
            try:
                return raw.decode(encoding).removeprefix("\ufeff"), name
            except UnicodeDecodeError as error:
                raise _undecodable(path, raw, error, f"not {name}") from None
    try:
        return raw.decode("utf-8"), "UTF-8"
    except UnicodeDecodeError as error:
        first = error
    try:
        text = raw.decode("gb18030")
    except UnicodeDecodeError:
        raise _undecodable(path, raw, first) from None
    if not _reads_as_chinese(text):
        raise _undecodable(path, raw, first)
    return text, "GB18030"


def _decode_rows(path: Path, raw: bytes, *, has_header: bool) -> tuple[str, str]:
    """As `decode`; where only some lines are at fault, their bytes become lone surrogates.

    A file with more bad lines than good ones has another encoding, and is refused as a whole, and so is one whose
    header is at fault.
    """
    try:
        return decode(path, raw)
    except DataError as error:
        refused = error
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise refused
    readings = {name: raw.decode(name, "surrogateescape").removeprefix("\ufeff") for name in ("UTF-8", "GB18030")}
    if not _reads_as_chinese(readings["GB18030"]):
        del readings["GB18030"]
    shares = {}
    for name, text in readings.items():
        lines = [line for line in text.split("\n") if line.strip()]
        bad = sum(bool(_BYTE.search(line)) for line in lines)
        shares[name] = bad / max(1, len(lines) - 1)  # the first is the header
    name = min(shares, key=lambda name: shares[name])
    header = next((line for line in readings[name].splitlines() if line.strip()), "")
    if shares[name] > 0.5 or (has_header and _BYTE.search(header)):
        raise refused
    return readings[name], name + _TORN


def _foreign_byte(text: str) -> str:
    """The first byte of a text that belongs to no encoding; an empty string where there is none."""
    found = _BYTE.search(text)
    return f"byte 0x{ord(found.group()) - 0xDC00:02x}" if found else ""


def _reads_as_chinese(text: str) -> bool:
    foreign = [char for char in text if ord(char) > 127]
    return sum(char in _COMMON_CHINESE for char in foreign) >= 0.15 * len(foreign)


def _undecodable(
    path: Path, raw: bytes, error: UnicodeDecodeError, what: str = "no UTF-8, and no GB18030 that reads as Chinese"
) -> DataError:
    line = raw.count(b"\n", 0, error.start) + 1
    was = "UTF-16 -c" if what == "not UTF-16" else "LATIN1"
    return DataError(
        "data.encoding",
        f"Line {line:,} is {what}: byte 0x{raw[error.start]:02x} at {error.start:,}.",
        where=f"{path}, line {line}",
        mend=f"save the file as UTF-8, e.g.: iconv -f {was} -t UTF-8 {quoted(path.name)} > "
        + quoted(f"utf8-{path.name}"),
    )


def _delimiter(text: str) -> str:
    """The delimiter of the header line: the commonest of comma, tab, semicolon and bar outside quotes."""
    header = re.split(r"[\r\n]", text.lstrip(), maxsplit=1)[0]
    outside = "".join(header.split('"')[::2])
    return max(",\t;|", key=outside.count)


def _read_csv(path: Path, text: str, encoding: str, delimiter: str) -> Table:
    """Python's own reader and not pyarrow's: it knows the line of every row, also after cells of several lines."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    columns: list[list[str]] = []
    lines: list[int] = []
    ragged: list[Reject] = []
    start, blank = 1, []
    try:
        for cells in reader:
            start, line = reader.line_num + 1, start
            if not cells:
                blank.append(line)
                continue
            if len(header) == 1:  # in a file of one column a blank line is an empty text, but not at its end
                lines += blank
                columns[0] += [""] * len(blank)
            blank = []
            if not header:
                header = cells
                columns = [[] for _ in header]
            elif len(cells) != len(header):
                row = delimiter.join(cells)
                if byte := _foreign_byte(row):  # in another encoding a delimiter may be a part of a character
                    ragged.append(Reject(str(path), line, "undecodable", byte))
                else:
                    shown = f"{len(cells)} cells under {len(header)} columns: {row}"[:80]
                    ragged.append(Reject(str(path), line, "ragged", shown))
            else:
                lines.append(line)
                for column, cell in zip(columns, cells, strict=True):
                    column.append(cell)
    except csv.Error as error:
        raise DataError(
            "data.csv",
            f"The row that starts at line {start:,} cannot be read: {error}.",
            where=f"{path}, line {start}",
            mend='a quote inside a quoted cell is doubled ("" for "), and every opening quote is closed',
        ) from None
    _check_header(path, header)
    if not lines and not ragged:
        raise DataError("data.empty", "This file has a header and no rows.", where=str(path), mend="one row a text")
    return Table(path, dict(zip(header, columns, strict=True)), lines, ragged, encoding, delimiter)


def _check_header(path: Path, header: list[str]) -> None:
    if halves := [name for name in header if _HALF.search(name)]:
        raise DataError(
            "data.header",
            f"The name of column {header.index(halves[0]) + 1} holds half a character.",
            where=str(path),
            mend="write the name again",
        )
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise DataError(
            "data.header",
            f'Two columns have the name "{twice[0]}".',
            where=f"{path}, line 1",
            mend="is there no header? Put one on the first line, such as text,label; or rename a column",
        )


def _is_array(text: str) -> bool:
    """Whether a JSON file is one array; where its first line is one and more lines follow, it has an object a line."""
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("["):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return not rest.lstrip().startswith('{"') or not text.rstrip().endswith("}")
    return not rest


def _read_json(path: Path, text: str, encoding: str) -> Table:
    """One object a line, or one array of objects."""
    objects: list[tuple[int, Any]] = []
    ragged: list[Reject] = []
    if _is_array(text):
        try:
            objects = list(enumerate(json.loads(text), start=1))
        except (ValueError, RecursionError) as error:
            raise DataError(
                "data.json",
                f"This array is not JSON: {error}.",
                where=str(path),
                mend='close the array, or write one object a line: {"text": "...", "label": "..."}',
            ) from None
    else:
        # Not splitlines(): that also cuts at U+2028 and its like, which JSON strings may hold.
        for line, piece in enumerate(text.split("\n"), start=1):
            if piece.strip():
                try:
                    item = json.loads(piece)
                except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
                    ragged.append(Reject(str(path), line, "not JSON", str(error)[:80]))
                    continue
                if isinstance(item, dict) and _HALF.search(keys := "".join(item)):
                    byte = _foreign_byte(keys) if encoding.endswith(_TORN) else ""
                    ragged.append(Reject(str(path), line, "undecodable" if byte else "half a character", byte))
                else:
                    objects.append((line, item))
    if not objects and not ragged:
        raise DataError("data.empty", "This file is empty.", where=str(path), mend="one object a text")
    names = list(dict.fromkeys(name for _, item in objects if isinstance(item, dict) for name in item))
    _check_header(path, names)
    columns: dict[str, list[Any]] = {name: [] for name in names}
    lines: list[int] = []
    for line, item in objects:
        if not isinstance(item, dict):
            ragged.append(Reject(str(path), line, "not an object", json.dumps(item, ensure_ascii=False)[:80]))
            continue
        lines.append(line)
        for name in names:
            columns[name].append(item.get(name))
    return Table(path, columns, lines, ragged, encoding)
