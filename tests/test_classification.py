import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_fscore_support

from trimtab.classification import Labels, by_class, compute_logits, loss_sum, make_labels, metrics, softmax, wilson
from trimtab.errors import RecipeError
from trimtab.forward import stock
from trimtab.tokens import Encoded

# -- labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "language", "shown"),
    [
        ((), "", ["0", "1"]),
        ((), "zh", ["0", "1"]),
        (("差评/negative", "好评/positive"), "", ["差评/negative", "好评/positive"]),
        (("差评/negative", "好评/positive"), "zh", ["差评", "好评"]),
        (("差评/negative", "好评/positive"), "en", ["negative", "positive"]),
        (("bad", "a/b/c"), "en", ["bad", "a/b/c"]),
    ],
)
def test_names(names: tuple[str, ...], language: str, shown: list[str]) -> None:
    labels = Labels(("0", "1"), names)
    assert [labels.name(i, language) for i in range(len(labels))] == shown
    assert labels.index() == {"0": 0, "1": 1}


def test_names_go_by_label_and_may_be_left_out() -> None:
    assert make_labels(("9", "10"), {}).names == ()
    assert make_labels(("9", "10"), {"10": "ten", "9": "nine"}).names == ("nine", "ten")
    assert make_labels(("9", "10"), {"10": "ten"}).names == ("9", "ten")


def test_a_name_for_a_label_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match=r'"psitive".*Labels: negative, positive\..*mean "positive"') as caught:
        make_labels(("negative", "positive"), {"psitive": "x"})
    assert caught.value.exit_code == 2


# -- scores ----------------------------------------------------------------------------------------------------

# Rows 0 to 4 answer a, a, b, b, a with these probabilities; c neither occurs nor is answered.
PROBABILITIES = [[0.7, 0.2, 0.1], [0.5, 0.25, 0.25], [0.2, 0.6, 0.2], [0.1, 0.8, 0.1], [0.9, 0.05, 0.05]]
LOGITS = np.log(np.array(PROBABILITIES, np.float32)) + np.float32(3)
TRUTH = np.array([0, 0, 0, 1, 1], np.int64)


def test_metrics_by_hand() -> None:
    scores = metrics(LOGITS, TRUTH, ["a", "b", "c"])
    assert scores["eval_rows"] == 5
    assert scores["accuracy"] == 3 / 5
    assert scores["majority_accuracy"] == 3 / 5
    assert scores["loss"] == pytest.approx(-sum(map(math.log, [0.7, 0.5, 0.2, 0.8, 0.05])) / 5)
    assert scores["accuracy_ci95"] == pytest.approx([0.2307, 0.8824], abs=1e-4)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["per_class"] == {
        "a": pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "rows": 3}),
        "b": pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "rows": 2}),
        "c": {"precision": 0, "recall": 0, "f1": 0, "rows": 0},
    }


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_scores_by_class_are_those_of_sklearn(pairs: list[tuple[int, int]]) -> None:
    answers, truth = np.array(pairs, np.int64).T
    ours = by_class(answers, truth, 5)
    theirs = precision_recall_fscore_support(truth, answers, labels=range(5), zero_division=0.0)
    for mine, its in zip(ours[:4], theirs, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-15)
    assert ours.macro_f1 == pytest.approx(f1_score(truth, answers, average="macro", zero_division=0.0), rel=1e-15)


def test_an_answer_that_never_occurs_counts_against_macro_f1() -> None:
    logits = np.array([[1, 0, 0], [0, 0, 1]], np.float32)
    assert metrics(logits, np.array([0, 0]), ["a", "b", "c"])["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_always_answering_the_commonest_is_no_better_than_it() -> None:
    truth = np.array([1] * 8 + [0, 2])
    scores = metrics(np.tile(np.array([0, 1, 0], np.float32), (10, 1)), truth, ["a", "b", "c"])
    assert (scores["accuracy"], scores["majority_accuracy"]) == (0.8, 0.8)
    assert scores["accuracy_ci95"] == pytest.approx([0.4901, 0.9433], abs=1e-4)
    assert scores["macro_f1"] == pytest.approx(16 / 18 / 3)


@pytest.mark.parametrize("gap", [5.0, 600.0, 2_000.0])
def test_the_loss_of_a_sure_and_wrong_answer_is_its_distance(gap: float) -> None:
    expected = gap + math.log1p(math.exp(-gap))
    assert metrics(np.array([[0, gap]], np.float32), np.array([0]), ["a", "b"])["loss"] == pytest.approx(expected)


def test_the_loss_of_training_is_the_loss_of_evaluation() -> None:
    total = loss_sum(torch.from_numpy(LOGITS), torch.from_numpy(TRUTH))
    assert total.item() / 5 == pytest.approx(metrics(LOGITS, TRUTH, ["a", "b", "c"])["loss"], rel=1e-6)


def test_softmax() -> None:
    assert softmax(LOGITS) == pytest.approx(np.array(PROBABILITIES), rel=1e-6)
    assert softmax(np.array([[1e4, 0, -1e4]], np.float32)).tolist() == [[1, 0, 0]]


@pytest.mark.parametrize(
    ("correct", "rows", "low", "high"),
    [
        (8, 10, 0.4901, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (50, 100, 0.4038, 0.5962),
        (4_400, 5_000, 0.8707, 0.8887),
    ],
)
def test_wilson(correct: int, rows: int, low: float, high: float) -> None:
    assert wilson(correct, rows) == pytest.approx((low, high), abs=1e-4)


@settings(deadline=None)
@given(rows=st.integers(1, 10_000), share=st.floats(0, 1))
def test_wilson_holds_the_share_and_stays_within_0_and_1(rows: int, share: float) -> None:
    correct = round(rows * share)
    low, high = wilson(correct, rows)
    assert 0 <= low <= correct / rows + 1e-12
    assert correct / rows - 1e-12 <= high <= 1
    assert low < high


# -- the forward pass ------------------------------------------------------------------------------------------


class Sums(torch.nn.Module):
    """Answers with the sum of a row's unmasked ids and their count, so that order and padding show."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.modes.add((self.training, torch.is_grad_enabled()))
        assert (input_ids[attention_mask == 0] == 99).all()
        return SimpleNamespace(logits=torch.stack([(input_ids * attention_mask).sum(1), attention_mask.sum(1)], 1))


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_in_the_order_of_the_rows(training: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 400, 60)
    ids = np.arange(lengths.sum(), dtype=np.int32) % 50
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    model, seen = Sums().train(training), []
    logits = compute_logits(stock(model, 99), Encoded(ids, offsets, lengths * 0 - 1, lengths), after_batch=seen.append)
    sums = [ids[a:b].sum() for a, b in pairwise(offsets)]
    assert logits.tolist() == np.stack([sums, lengths], 1).tolist()
    assert logits.dtype == np.float32
    assert (sum(seen), len(seen) > 1) == (60, True)
    assert model.modes == {(False, False)}


def test_no_row_has_no_logits() -> None:
    nothing = np.zeros(0, np.int64)
    assert (
        compute_logits(
            stock(Sums(), 0), Encoded(nothing.astype(np.int32), np.zeros(1, np.int64), nothing, nothing)
        ).size
        == 0
    )


def test_a_label_that_was_not_named_keeps_its_slash() -> None:
    labels = make_labels(["sci/tech", "sports"], {"sports": "体育/sport"})
    assert [labels.name(0, language) for language in ("", "zh", "en")] == ["sci/tech"] * 3
    assert labels.name(1, "en") == "sport"
