"""What a person should know of the rows before a model sees them: duplicates, contradictions, overlap, small classes.

Texts count as the same when their casefolded letters and digits are the same, with nothing between them: spaces,
punctuation and case do not make a second text. Every finding here is a warning; rows that cannot be used are
an error of `data`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.data import Example, Rows, reduced

_SMALL_CLASS = 5


@dataclass(frozen=True)
class Repeats:
    """Texts that stand in a part more than once."""

    duplicate_rows: int
    """Rows whose text stood there before with the same label."""
    conflicting_texts: int
    """Texts that stand there with different labels."""
    conflict: tuple[Example, Example] | None
    """The first such pair."""


def repeats(examples: Sequence[Example]) -> Repeats:
    """Duplicates and contradictions among labelled rows."""
    first: dict[str, Example] = {}
    conflicting: dict[str, tuple[Example, Example]] = {}
    pairs: set[tuple[str, str]] = set()
    for example in examples:
        key = reduced(example.text)
        pairs.add((key, example.label))
        before = first.setdefault(key, example)
        if before.label != example.label:
            conflicting.setdefault(key, (before, example))
    return Repeats(len(examples) - len(pairs), len(conflicting), next(iter(conflicting.values()), None))


_BEFORE = {"train": (), "eval": ("train",), "test": ("train", "eval")}
"""For each role, those whose files teach or choose before it: it is no judge of what stands there."""


def known_rows(rows: Mapping[str, Rows], parts: Mapping[str, Sequence[Example]]) -> dict[str, npt.NDArray[np.bool_]]:
    """For each part, bool[n]: whether a row's text stands in a file that taught or chose before; False in training.

    Against whole files: a row that was not drawn this time may have been before.
    """
    found = {}
    for role, examples in parts.items():
        # Our own split never parts what is the same, so its two sides know nothing of each other.
        files = [rows[before] for before in _BEFORE[role] if before in rows and role in rows]
        texts = {reduced(example.text) for part in files for example in part.examples}
        found[role] = np.array([bool(texts) and reduced(example.text) in texts for example in examples], np.bool_)
    return found


def report(
    rows: Mapping[str, Rows],
    parts: Mapping[str, Sequence[Example]],
    known: Mapping[str, npt.NDArray[np.bool_]],
    labels: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """What is known of each part without a tokenizer: rows in = usable + skipped, labels, repeats, overlap.

    Args:
        rows: What the files of each role hold.
        parts: The rows that are used; `eval` may be split from the training file.
        known: As `known_rows` gives them.
        labels: All of them, in their order.
    """
    found: dict[str, dict[str, Any]] = {}
    for role, examples in parts.items():
        source = rows.get(role)
        counts = Counter(example.label for example in examples)
        again = repeats(examples)
        found[role] = {
            "files": source.files if source else "split from the training files",
            "rows_in": source.rows_in if source else None,
            "rows_usable": len(source.examples) if source else None,
            "rows_skipped": dict(Counter(reject.reason for reject in source.rejects)) if source else None,
            "rows_used": len(examples),
            "rows_per_label": {label: counts[label] for label in labels},
            "majority_share": max(counts.values()) / len(examples),
            "duplicate_rows": again.duplicate_rows,
            "conflicting_texts": again.conflicting_texts,
            "first_conflict": [{"line": example.line, "label": example.label} for example in again.conflict or ()],
        }
        if role != "train":
            found[role]["overlap_rows"] = int(known[role].sum())
    return found


def warnings(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The findings that a user should read, in words."""
    lines = []
    counts: dict[str, int] = dict(found["train"]["rows_per_label"])
    for role, one in found.items():
        where = f"of the {role} rows" if role != "train" else "of the training rows"
        if one["duplicate_rows"]:
            lines.append(f"{one['duplicate_rows']:,} {where} repeat an earlier one (letters and digits are the same)")
        if one["conflicting_texts"]:
            places = " and ".join(f'line {at["line"]} ("{at["label"]}")' for at in one["first_conflict"])
            lines.append(f"texts {where} with several labels: {one['conflicting_texts']:,}, the first at {places}")
        if one.get("overlap_rows"):
            rest = "and none is left for a fair score"
            if role != ("test" if "test" in found else "eval"):
                rest = "and they choose the epoch"
            elif one["overlap_rows"] < one["rows_used"]:
                rest = "and the score without them is given beside"
            chose = role == "test" and not isinstance(found["eval"]["files"], str)
            files = "the training or evaluation file" if chose else "the training file"
            lines.append(f"{one['overlap_rows']:,} {where} stand in {files} too: scores on them are too good, {rest}")
    largest, smallest = max(counts.values()), max(1, min(counts.values()))
    if largest > 3 * smallest:
        lines.append(
            f"the largest class has {largest:,} rows, the smallest {smallest:,}: always answering the commonest label "
            f"is right {found['train']['majority_share']:.0%} of the time; look at macro F1, or weigh the classes: "
            "--set train.class_weights=auto"
        )
    small = [label for label, count in counts.items() if count < _SMALL_CLASS]
    if small:
        shown = ", ".join(small[:5])
        lines.append(f"{len(small)} of {len(counts)} classes have fewer than {_SMALL_CLASS} training rows: {shown}")
    alike: dict[str, list[str]] = {}
    for label in counts:
        alike.setdefault(" ".join(label.casefold().split()), []).append(f'"{label}"')
    lines += [
        f"the labels {' and '.join(same)} differ in case or spaces alone, and are {len(same)} classes"
        for same in alike.values()
        if len(same) > 1
    ]
    return lines
