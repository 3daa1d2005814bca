"""Texts from a file, and answers to a file or a screen: row count and order are kept."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from trimtab import data
from trimtab.classification import Labels
from trimtab.errors import DataError, RecipeError, ResourceError, plain, quoted, some
from trimtab.predict import Prediction

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_ROWS = 20_000  # of a parquet file at a time: enough to sort by length, and 1,000,000 rows take no more memory


@dataclass(frozen=True)
class TextTable:
    """Some rows, and which of their columns are the texts."""

    columns: dict[str, list[Any]]
    text_column: str
    arrow: Any = None
    """The same rows as pyarrow's RecordBatch, where they come from a parquet file: it keeps their types."""

    @property
    def texts(self) -> list[str]:
        """The texts, in the order of the rows."""
        return self.columns[self.text_column]


def as_table(texts: Sequence[str]) -> TextTable:
    """Texts without a file, as a table of one column."""
    return TextTable({"text": list(texts)}, "text")


def read(paths: Sequence[str], text: str) -> Iterator[TextTable]:
    """Reads files with texts to label: parquet in parts, so that any number of rows fits; others as one table.

    All rows are checked before the first table is given.

    Raises:
        DataError: no such file or column, files with different columns, or cells that are no text: all are counted.
    """
    files = data.expand(paths)
    if all(data.file_kind(file) == "parquet" for file in files):
        _check((table for table, _ in _parts(files)), text)
        return (TextTable(table.columns, _text_column(table, text), batch) for table, batch in _parts(files))
    tables = [data.read_table(file) for file in files]
    _check(tables, text)
    joined = {name: [cell for table in tables for cell in table.columns[name]] for name in tables[0].columns}
    return iter([TextTable(joined, _text_column(tables[0], text))])


def _parts(files: Sequence[Path]) -> Iterator[tuple[data.Table, Any]]:
    schema: Any = None
    for file in files:
        for table, batch in data.read_parquet_in_parts(file, _ROWS):
            schema = schema or batch.schema
            if not batch.schema.equals(schema):
                raise DataError(
                    "data.columns",
                    f"Files have different columns: {_shown(schema)}; {_shown(batch.schema)}.",
                    where=str(file),
                    mend="label them one by one",
                )
            yield table, batch


def _shown(schema: Any) -> str:
    return some([f"{field.name} ({field.type})" for field in schema], 20)


def _check(tables: Iterable[data.Table], text: str) -> None:
    first: data.Table | None = None
    bad: list[str] = []
    places: dict[str, None] = {}
    for table in tables:
        first = first or table
        data.refuse_torn(table)
        if list(first.columns) != list(table.columns):
            raise DataError(
                "data.columns",
                f"Files have different columns: {some(first.columns, 20)}; {some(table.columns, 20)}.",
                where=str(table.path),
                mend="label them one by one",
            )
        found = [f"{table.path.name} line {reject.line} ({reject.reason})" for reject in table.ragged]
        texts = table.columns[_text_column(table, text)] if table.lines or not found else []
        cells = zip(table.lines, texts, strict=True)
        problems = ((line, data.text_problem(cell)) for line, cell in cells)
        found += [f"{table.path.name} line {line} ({why})" for line, why in problems if why not in ("", "empty")]
        if found:
            places[str(table.path)] = None
        bad += found
    if bad:
        raise DataError(
            "data.bad_rows",
            f"{len(bad):,} rows hold no text that could be labelled: {some(bad)}.",
            where=some(places),
            mend=('a text with a comma in it needs "..." around it; ' if any("(ragged)" in one for one in bad) else "")
            + "correct or remove these rows; an empty string is fine",
        )


def _text_column(table: data.Table, text: str) -> str:
    return data.find_text_column(table, text) or _only_column(table)


def _only_column(table: data.Table) -> str:
    if len(table.columns) == 1:
        return next(iter(table.columns))
    raise DataError(
        "data.missing_column",
        f"No text column was recognised. Columns: {some(table.columns, 20)}.",
        where=str(table.path),
        mend="--text COLUMN",
    )


def check_writable(out: str) -> None:
    """Finds out before the model loads that answers could not be written.

    Raises:
        RecipeError: an ending that is not written.
        ResourceError: the folder does not exist, or nothing can be written there.
    """
    if Path(out).suffix.lower() not in _SUFFIXES:
        raise RecipeError(
            "out.format",
            f'A file "{out}" is none that trimtab writes.',
            mend=f"an ending of {', '.join(_SUFFIXES)}",
        )
    if not os.path.isdir(Path(os.path.expanduser(out)).parent):
        raise ResourceError(
            "out.folder",
            f"There is no folder {Path(out).parent}.",
            mend=f"mkdir -p {quoted(Path(out).parent)}",
        )
    if not os.access(Path(os.path.expanduser(out)).parent, os.W_OK):  # a read-only volume too
        raise ResourceError(
            "out.folder",
            "Nothing can be written to this folder.",
            where=str(Path(out).parent),
            mend="--out FILE in a folder that you may write to",
        )


@contextmanager
def writing(out: str) -> Iterator[Callable[[TextTable, Sequence[Prediction]], None]]:
    """Gives a function that appends rows: the input's columns with `predicted_label` and `predicted_score`.

    The file appears whole at the end, or not at all where something fails.
    """
    import pyarrow as pa

    path = Path(os.path.expanduser(out))
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        suffix = path.suffix.lower()
        with _parquet(draft) if suffix == ".parquet" else _text(draft, suffix) as append:
            yield append
        draft.replace(path)
    except UnicodeEncodeError:
        raise DataError(
            "out.half_character",
            "A cell of these rows holds half a character, such as a lone \\ud83d, which no file can hold.",
            where=out,
            mend="write that cell again, or leave its column out",
        ) from None
    except (pa.ArrowException, OverflowError) as error:
        raise DataError(
            "out.types",
            f"A column of these rows has no one type, which parquet asks for: {str(error).splitlines()[0]}",
            where=out,
            mend="--out with an ending of .jsonl or .csv",
        ) from None
    except OSError as error:
        raise ResourceError(
            "out.write", f"The answers cannot be written: {error.strerror}.", where=out, mend="--out in another place"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _answers(predictions: Sequence[Prediction]) -> dict[str, list[Any]]:
    return {
        "predicted_label": [prediction.label for prediction in predictions],
        "predicted_score": [prediction.score for prediction in predictions],
    }


@contextmanager
def _parquet(draft: Path) -> Iterator[Callable[[TextTable, Sequence[Prediction]], None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        writer: Any = None

        def append(table: TextTable, predictions: Sequence[Prediction]) -> None:
            nonlocal writer
            answers = _answers(predictions)
            if table.arrow is None:
                rows = pa.table({name: cells for name, cells in table.columns.items() if name not in answers} | answers)
            else:
                rows = pa.Table.from_batches([table.arrow])
                rows = rows.drop_columns([name for name in answers if name in rows.column_names])
                for name, cells in answers.items():
                    kind = pa.string() if name == "predicted_label" else pa.float64()
                    rows = rows.append_column(name, pa.array(cells, kind))
            writer = writer or stack.enter_context(pq.ParquetWriter(draft, rows.schema))
            writer.write_table(rows.cast(writer.schema))

        yield append


@contextmanager
def _text(draft: Path, suffix: str) -> Iterator[Callable[[TextTable, Sequence[Prediction]], None]]:
    with draft.open("w", newline="", encoding="utf-8") as file:
        delimiter = "\t" if suffix == ".tsv" else ","
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        # A carriage return alone ends a line for whoever reads it, and the writer leaves it bare.
        quoted = csv.writer(file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        has_header = False

        def append(table: TextTable, predictions: Sequence[Prediction]) -> None:
            nonlocal has_header
            columns = table.columns | _answers(predictions)
            rows = zip(*columns.values(), strict=True)
            if suffix == ".jsonl":
                for row in rows:  # JSON has neither NaN nor infinity
                    cells = (None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in row)
                    one = dict(zip(columns, cells, strict=True))
                    file.write(json.dumps(one, ensure_ascii=False, default=str) + "\n")
                return
            if not has_header:
                writer.writerow(columns)
                has_header = True
            for row in rows:
                (quoted if any("\r" in str(cell) for cell in row) else writer).writerow(row)

        yield append


def table_lines(
    predictions: Sequence[Prediction], labels: Labels, language: str, notes: Sequence[str] = ()
) -> list[str]:
    """Predictions for people: label, score, text; one line each, and whether the text was cut."""
    names = [plain(labels.shown(prediction.label, language), 100) for prediction in predictions]
    width = max((cell_len(name) for name in names), default=0)
    note_width = max((len(note) for note in notes), default=0)
    lines = []
    for i, (prediction, name) in enumerate(zip(predictions, names, strict=True)):
        shown = plain(" ".join(prediction.text.split()), 100)
        note = f"{notes[i]:<{note_width}}  " if notes else ""
        cut = "  [cut: not all of it was read]" if prediction.truncated else ""
        lines.append(f"{name}{' ' * (width - cell_len(name))}  {prediction.score:.3f}  {note}{shown}{cut}")
    return lines
