from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.batching import collate, evaluation_plan, padding_pct, plan
from trimtab.tokens import Encoded

LENGTHS = st.lists(st.integers(1, 300), max_size=200).map(lambda values: np.array(values, np.int64))


def lists(batches: list[npt.NDArray[np.int64]]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def encoded(rows: list[list[int]], labels: list[int]) -> Encoded:
    lengths = np.array([len(row) for row in rows], np.int64)
    return Encoded(
        np.array([token for row in rows for token in row], np.int32),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        np.array(labels, np.int64),
        lengths,
    )


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 99),
    group=st.booleans(),
)
def test_an_epoch_has_every_row_once(
    lengths: npt.NDArray[np.int64], batch_size: int, seed: int, epoch: int, group: bool
) -> None:
    batches = plan(lengths, batch_size, seed=seed, epoch=epoch, group_by_length=group)
    assert sorted(row for batch in lists(batches) for row in batch) == list(range(len(lengths)))
    sizes = sorted((len(batch) for batch in batches), reverse=True)
    assert len(sizes) == -(-len(lengths) // batch_size)
    assert all(size == batch_size for size in sizes[:-1])


@pytest.mark.parametrize("group", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(group: bool) -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 100)

    def order(seed: int, epoch: int) -> str:
        np.random.seed(seed + epoch)  # the global generator must not matter
        return str(lists(plan(lengths, 8, seed=seed, epoch=epoch, group_by_length=group)))

    assert order(1, 0) == order(1, 0)
    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_without_groups_the_order_does_not_look_at_lengths() -> None:
    rng = np.random.default_rng(0)
    orders = [plan(rng.integers(5, 100, 50), 8, seed=1, epoch=0, group_by_length=False) for _ in range(2)]
    assert lists(orders[0]) == lists(orders[1])


def test_groups_save_padding_and_leave_the_lengths_of_steps_random() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 0.8, 3_000), 5, 256).astype(np.int64)
    padding = [
        padding_pct(lengths, plan(lengths, 16, seed=1, epoch=0, group_by_length=group)) for group in (False, True)
    ]
    assert padding[0] > 40
    assert padding[1] < 5
    batches = plan(lengths, 16, seed=1, epoch=0, group_by_length=True)
    assert sorted(row for batch in lists(batches) for row in batch) == list(range(3_000))
    longest = [int(lengths[rows].max()) for rows in batches]
    rises = sum(a < b for a, b in pairwise(longest)) / len(longest)
    assert 0.3 < rises < 0.7


@settings(deadline=None)
@given(lengths=LENGTHS, max_tokens=st.integers(1, 2_000))
def test_an_evaluation_batch_stays_within_its_tokens(lengths: npt.NDArray[np.int64], max_tokens: int) -> None:
    batches = evaluation_plan(lengths, max_tokens)
    assert sorted(row for batch in lists(batches) for row in batch) == list(range(len(lengths)))
    assert all(len(rows) == 1 or int(lengths[rows].max()) * len(rows) <= max_tokens for rows in batches)
    longest = [int(lengths[rows].max()) for rows in batches]
    assert longest == sorted(longest, reverse=True)  # so that a pass which does not fit fails at once
    for rows, following in pairwise(batches):
        assert (len(rows) + 1) * int(lengths[rows].max()) > max_tokens, (rows, following)


@pytest.mark.parametrize("lengths", [[0], [5, 0], [0, 0, 3]])
def test_texts_without_a_token_are_rows_too(lengths: list[int]) -> None:
    batches = evaluation_plan(np.array(lengths, np.int64), 5)
    assert sorted(row for batch in lists(batches) for row in batch) == list(range(len(lengths)))


def test_collate_pads_on_the_right_with_the_given_id() -> None:
    batch = collate(encoded([[5, 6], [7], [8, 9, 1, 2]], [1, 0, 2]), np.array([2, 0, 1]), 77)
    assert batch.input_ids.tolist() == [[8, 9, 1, 2], [5, 6, 77, 77], [7, 77, 77, 77]]
    assert batch.attention_mask.tolist() == [[True] * 4, [True, True, False, False], [True, False, False, False]]
    assert batch.labels.tolist() == [2, 1, 0]
    assert (batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype) == (np.int64, np.bool_, np.int64)


def test_a_token_that_has_the_pad_id_is_not_masked() -> None:
    batch = collate(encoded([[0, 5, 0], [0]], [0, 0]), np.array([0, 1]), 0)
    assert batch.attention_mask.tolist() == [[True, True, True], [True, False, False]]


def test_a_batch_of_one() -> None:
    batch = collate(encoded([[5, 6], [7]], [1, 0]), np.array([1]), 0)
    assert (batch.input_ids.tolist(), batch.attention_mask.tolist(), batch.labels.tolist()) == ([[7]], [[True]], [0])


def test_padding_by_hand() -> None:
    lengths = np.array([4, 1, 3], np.int64)
    assert padding_pct(lengths, [np.array([0, 1]), np.array([2])]) == pytest.approx(100 * 3 / 11)
    assert padding_pct(lengths, []) == 0
