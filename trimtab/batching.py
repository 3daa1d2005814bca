"""Lengths -> batches. Pure functions of integers, so that order and resume position need no model to be tested."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trimtab.tokens import Encoded

_CHUNK_BATCHES = 50  # batches are cut from sorted chunks of so many: length stays random from step to step


@dataclass(frozen=True)
class Batch:
    """Rows padded to the longest: input_ids int64[B, T], attention_mask bool[B, T], labels int64[B]."""

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int64]


def plan(
    lengths: npt.NDArray[np.int64], batch_size: int, *, seed: int, epoch: int, group_by_length: bool
) -> list[npt.NDArray[np.int64]]:
    """The batches of one epoch, as row numbers; the last may be smaller. A function of its arguments alone."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if not group_by_length:
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = []
    for start in range(0, len(order), batch_size * _CHUNK_BATCHES):
        chunk = order[start : start + batch_size * _CHUNK_BATCHES]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def evaluation_plan(lengths: npt.NDArray[np.int64], max_tokens: int = 4_096) -> list[npt.NDArray[np.int64]]:
    """Batches for a pass without gradients: rows sorted by length, at most `max_tokens` after padding."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, max_tokens // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def collate(encoded: Encoded, rows: npt.NDArray[np.int64], pad_id: int) -> Batch:
    """Puts rows side by side, padded on the right with the base's own pad id."""
    lengths = encoded.lengths[rows]
    ids = np.full((len(rows), int(lengths.max())), pad_id, np.int64)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = encoded.ids[encoded.offsets[row] : encoded.offsets[row + 1]]
    return Batch(ids, np.arange(ids.shape[1]) < lengths[:, None], encoded.labels[rows])


def padding_pct(lengths: npt.NDArray[np.int64], batches: Sequence[npt.NDArray[np.int64]]) -> float:
    """Share of the computed tokens that is padding, in per cent."""
    computed = sum(int(lengths[rows].max()) * len(rows) for rows in batches)
    real = sum(int(lengths[rows].sum()) for rows in batches)
    return 100.0 * (1 - real / computed) if computed else 0.0
