"""predictions.parquet: each row that the headline score is about, its label, and the logits that it got."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimtab import durable
from trimtab.classification import Labels, softmax
from trimtab.data import Example, text_problem
from trimtab.errors import ArtefactError, quoted


@dataclass(frozen=True)
class Stored:
    """Answers to n rows."""

    texts: tuple[str, ...]
    places: tuple[str, ...]
    """File name and line of each row."""
    truth: npt.NDArray[np.int64]
    """int64[n]: the labels as they stand in the data."""
    logits: npt.NDArray[np.float32]
    """float32[n, C], as the model gave them."""

    @property
    def told(self) -> npt.NDArray[np.int64]:
        """The answers, int64[n]."""
        return np.asarray(self.logits.argmax(axis=1))


def place(file: str, line: int) -> str:
    """Where a row stands, for people."""
    return f"{Path(file).name}:{line}"


def write(
    path: Path, examples: Sequence[Example], logits: npt.NDArray[np.float32], labels: Labels, temperature: float = 1.0
) -> None:
    """Writes text, label, predicted_label, predicted_score, file, line and logits of each row.

    The score is a probability under the temperature; logits stand as the model gave them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    probabilities = softmax(logits / np.float32(temperature))
    table = pa.table(
        {
            "text": [example.text for example in examples],
            "label": [example.label for example in examples],
            "predicted_label": [labels.values[i] for i in logits.argmax(axis=1)],
            "predicted_score": probabilities.max(axis=1),
            "file": [Path(example.file).name for example in examples],
            "line": [example.line for example in examples],
            "logits": pa.array(list(logits), pa.list_(pa.float32())),
        }
    )
    written = io.BytesIO()
    pq.write_table(table, written)
    durable.replace(path, written.getvalue())


def read(path: Path, labels: Labels, rows: int | None = None) -> Stored:
    """The answers in a file; with `rows`, the first of them alone.

    Raises:
        ArtefactError: it is not there, is damaged, or does not answer with these labels in their order.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ["text", "label", "predicted_label", "file", "line", "logits"]
    try:
        table = pq.read_table(path, columns=columns).slice(0, rows).combine_chunks()
        text, label, told, file, line = (table.column(name).to_pylist() for name in columns[:-1])
        logits = np.array(table.column("logits").to_pylist(), np.float32)
        if not text or logits.shape != (len(text), len(labels)) or not np.isfinite(logits).all():
            raise ValueError(f"they are not rows with {len(labels)} logits each")
        if any(text_problem(one) for one in text):
            raise ValueError("a row has no text")
        if told != [labels.values[i] for i in logits.argmax(axis=1)]:
            raise ValueError("their labels are not the adapter's, or stand in another order")
        index = labels.index()
        if unknown := set(label) - set(index):
            raise ValueError(f'"{min(unknown)}" is no label of this run')
        places = tuple(place(*where) for where in zip(file, line, strict=True))
        return Stored(tuple(text), places, np.array([index[one] for one in label], np.int64), logits)
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        raise ArtefactError(
            "run.predictions",
            f"The stored answers cannot be read: {error}",
            where=str(path),
            mend="bring the file back from a copy; or delete it, and this writes it again: "
            f"trimtab train --resume {quoted(path.parent)}",
        ) from None
