"""Texts from a file, and answers to a file or a screen: row count and order are kept."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from trimtab import data
from trimtab.classification import Labels
from trimtab.errors import DataError, RecipeError, ResourceError, some
from trimtab.predict import Prediction

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class TextTable:
    """The columns of one or several files, and which of them are the texts."""

    columns: dict[str, list[Any]]
    text_column: str

    @property
    def texts(self) -> list[str]:
        """The texts, in the order of the rows."""
        return self.columns[self.text_column]


def as_table(texts: Sequence[str]) -> TextTable:
    """Texts without a file, as a table of one column."""
    return TextTable({"text": list(texts)}, "text")


def read(paths: Sequence[str], text: str) -> TextTable:
    """Reads files with texts to label.

    Raises:
        DataError: no such file or column, files with different columns, or cells that are no text: all are counted.
    """
    joined: dict[str, list[Any]] = {}
    text_column = ""
    bad: list[str] = []
    for path in data.expand(paths):
        table = data.read_table(path)
        text_column = data.find_text_column(table, text) or _only_column(table)
        if joined and list(joined) != list(table.columns):
            raise DataError(
                "data.columns",
                f"Files have different columns: {some(joined, 20)}; {some(table.columns, 20)}.",
                where=str(path),
                mend="label them one by one",
            )
        for name, values in table.columns.items():
            joined.setdefault(name, []).extend(values)
        bad += [f"{table.path.name} line {reject.line} ({reject.reason})" for reject in table.ragged]
        cells = zip(table.lines, table.columns[text_column], strict=True)
        bad += [f"{table.path.name} line {line} (not text)" for line, cell in cells if not isinstance(cell, str)]
    if bad:
        raise DataError(
            "data.bad_rows",
            f"{len(bad):,} rows hold no text that could be labelled: {some(bad)}.",
            where=some(paths),
            mend="correct or remove these rows; an empty string is fine",
        )
    return TextTable(joined, text_column)


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
        ResourceError: the folder does not exist.
    """
    if Path(out).suffix.lower() not in _SUFFIXES:
        raise RecipeError(
            "out.format",
            f'A file "{out}" is none that trimtab writes.',
            mend=f"an ending of {', '.join(_SUFFIXES)}",
        )
    if not Path(out).expanduser().parent.is_dir():
        raise ResourceError(
            "out.folder", f"There is no folder {Path(out).parent}.", mend=f"mkdir -p {Path(out).parent}"
        )


def write(out: str, table: TextTable, predictions: Sequence[Prediction]) -> None:
    """Writes the input's columns with `predicted_label` and `predicted_score`; the file appears whole."""
    path = Path(out).expanduser()
    columns = table.columns | {
        "predicted_label": [prediction.label for prediction in predictions],
        "predicted_score": [prediction.score for prediction in predictions],
    }
    draft = path.with_name(path.name + ".tmp")
    if path.suffix.lower() == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), draft)
    else:
        rows = zip(*columns.values(), strict=True)
        with draft.open("w", newline="", encoding="utf-8") as file:
            if path.suffix.lower() == ".jsonl":
                file.writelines(
                    json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False, default=str) + "\n"
                    for row in rows
                )
            else:
                writer = csv.writer(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", lineterminator="\n")
                writer.writerow(columns)
                writer.writerows(rows)
    draft.replace(path)


def table_lines(
    predictions: Sequence[Prediction], labels: Labels, language: str, notes: Sequence[str] = ()
) -> list[str]:
    """Predictions for people: label, score, text; one line each, and whether the text was cut."""
    index = labels.index()
    names = [labels.name(index[prediction.label], language) for prediction in predictions]
    width = max((cell_len(name) for name in names), default=0)
    note_width = max((len(note) for note in notes), default=0)
    lines = []
    for i, (prediction, name) in enumerate(zip(predictions, names, strict=True)):
        text = " ".join(prediction.text.split())
        shown = text if len(text) <= 100 else text[:97] + "..."
        note = f"{notes[i]:<{note_width}}  " if notes else ""
        cut = "  [cut: its end was not read]" if prediction.truncated else ""
        lines.append(f"{name}{' ' * (width - cell_len(name))}  {prediction.score:.3f}  {note}{shown}{cut}")
    return lines
