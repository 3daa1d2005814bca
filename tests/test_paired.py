import numpy as np
import pytest
from scipy.stats import bootstrap
from sklearn.metrics import f1_score

from trimtab.classification import by_class
from trimtab.paired import OverSeeds, mean_over_seeds, paired, paired_macro_f1, paired_over_seeds


def answers(right: str) -> np.ndarray:
    return np.array([letter == "x" for letter in right])


def test_rows_that_one_alone_gets_right_are_counted_on_the_right_side() -> None:
    found = paired(answers("xxx.x."), answers("x..xx."))
    assert (found.only_first, found.only_second) == (2, 1)
    assert found.difference == pytest.approx(1 / 6)


def test_the_interval_is_that_of_a_bootstrap_over_rows() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random(400) < 0.85, rng.random(400) < 0.80
    found = paired(first, second)
    difference = first.astype(float) - second
    theirs = bootstrap((difference,), np.mean, n_resamples=10_000, method="percentile", rng=2).confidence_interval
    assert found.ci95 == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_mcnemar_is_exact() -> None:
    first = answers("x" * 9 + "." + "x" * 20)
    second = answers("." * 9 + "x" + "x" * 20)
    # 9 against 1: 2 (C(10,0) + C(10,1)) / 2^10, by hand.
    assert paired(first, second).p == pytest.approx(22 / 1024)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("x" * 50, "x" * 30 + "." * 20, "better"),
        ("x" * 30 + "." * 20, "x" * 50, "worse"),
        ("x" * 49 + ".", "." + "x" * 49, "not resolved"),
        ("x" * 50, "x" * 50, "not resolved"),
        ("x" * 50, "x" * 46 + "." * 4, "not resolved"),
        ("x" * 49 + ".", "x" * 42 + "." * 7 + "x", "not resolved"),
        ("x" * 50, "x" * 44 + "." * 6, "better"),
    ],
)
def test_verdicts_need_an_interval_beside_zero(first: str, second: str, verdict: str) -> None:
    assert paired(answers(first), answers(second)).verdict == verdict


def test_the_same_answers_get_the_same_interval() -> None:
    first, second = answers("x.x" * 30), answers("xx." * 30)
    assert paired(first, second) == paired(first, second)


def test_macro_f1_and_its_interval_are_those_of_drawn_rows() -> None:
    rng = np.random.default_rng(3)
    labels = rng.choice(4, 300, p=[0.6, 0.2, 0.15, 0.05])
    first, second = (np.where(rng.random(300) < right, labels, rng.choice(4, 300)) for right in (0.8, 0.6))
    found = paired_macro_f1(first, second, labels, 5)

    def difference(rows: np.ndarray) -> float:
        scores = [f1_score(labels[rows], a[rows], labels=range(4), average="macro") for a in (first, second)]
        return float(scores[0] - scores[1])

    assert found.difference == pytest.approx(difference(np.arange(300)))
    drawn = [difference(rng.integers(300, size=300)) for _ in range(300)]
    assert found.ci95 == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.02)
    assert found.only_first == int(((first == labels) & (second != labels)).sum())


def test_macro_f1_counts_the_classes_that_a_side_answers_itself() -> None:
    labels = np.repeat([0, 1], 50)
    second = labels.copy()
    second[0] = 2  # a label of the adapter that no row has
    found = paired_macro_f1(labels, second, labels, 3)
    each = [by_class(one, labels, 3).macro_f1 for one in (labels, second)]
    assert found.difference == pytest.approx(each[0] - each[1])
    assert found.difference > 0.3
    assert (found.verdict, found.p) == ("not resolved", 1)  # one row is either's by chance


def test_a_verdict_on_macro_f1_does_not_ask_for_accuracy() -> None:
    labels = np.repeat([0, 1], (950, 50))
    always, seldom = np.zeros_like(labels), labels.copy()
    seldom[:40], seldom[-10:] = 1, 0  # 40 of the rare class are found, 40 of the usual one lost
    assert paired(seldom == labels, always == labels).verdict == "not resolved"
    assert paired_macro_f1(seldom, always, labels, 2).verdict == "better"
    assert paired_macro_f1(always, seldom, labels, 2).verdict == "worse"


def test_p_of_macro_f1_is_that_of_exchanged_answers() -> None:
    rng = np.random.default_rng(4)
    labels = rng.choice(3, 60)
    first, second = (np.where(rng.random(60) < right, labels, rng.choice(3, 60)) for right in (0.75, 0.5))

    def difference(swap: np.ndarray) -> float:
        one, other = np.where(swap, second, first), np.where(swap, first, second)
        return by_class(one, labels, 3).macro_f1 - by_class(other, labels, 3).macro_f1

    drawn = [abs(difference(rng.random(60) < 0.5)) for _ in range(4_000)]
    wanted = np.mean(np.array(drawn) >= abs(difference(np.zeros(60, np.bool_))))
    assert 0.005 < wanted < 0.5
    assert paired_macro_f1(first, second, labels, 3).p == pytest.approx(wanted, abs=0.025)


def test_rounding_decides_nothing() -> None:
    assert OverSeeds(-0.3, (-0.6, -2.8e-17), 0).verdict(0.01) == "not resolved"
    assert OverSeeds(0.3, (6.9e-18, 0.6), 0).verdict(0.01) == "not resolved"


@pytest.mark.parametrize(
    ("ci95", "p", "verdict"),
    [
        ((-0.004, 0.006), 0.5, "same within the margin"),
        ((-0.02, 0.006), 0.5, "not resolved"),
        ((0.001, 0.02), 0.01, "better"),
        ((0.001, 0.02), 0.06, "not resolved"),
        ((-0.02, -0.001), 0.01, "worse"),
        ((-0.02, -0.001), 0.06, "not resolved"),
    ],
)
def test_verdicts_over_seeds_need_interval_and_p(ci95: tuple[float, float], p: float, verdict: str) -> None:
    assert OverSeeds(sum(ci95) / 2, ci95, p).verdict(0.01) == verdict


@pytest.mark.parametrize("seeds", [2, 4])
@pytest.mark.parametrize("spread", [0.002, 0.2])
def test_an_interval_over_few_seeds_misses_no_more_than_it_says(seeds: int, spread: float) -> None:
    """The rows' share of a method's errors is its own in each seed, by `spread`; both methods are equally good."""
    rng, missed = np.random.default_rng(5), 0
    for _ in range(150):
        shares = 0.8 + spread * rng.uniform(-0.5, 0.5, (2, seeds, 1))
        first, second = rng.random((2, seeds, 400)) < shares
        low, high = paired_over_seeds(first, second).ci95
        missed += not low <= 0 <= high
    assert missed <= 15  # 5 % are 8, and three standard deviations more


def test_means_over_seeds_stay_within_what_can_be() -> None:
    right = np.ones((2, 50), np.bool_)
    right[0, :20] = False
    mean, (low, high) = mean_over_seeds(right)
    assert (mean, low, high) == (0.8, 0.0, 1.0)
    one, ends = mean_over_seeds(right[:1])
    assert (one, *ends) == pytest.approx((0.6, 0.6 - 0.13718, 0.6 + 0.13718), abs=1e-4)  # rows alone, by hand


def test_p_over_one_seed_is_that_of_mcnemar() -> None:
    first, second = answers("x" * 9 + "." + "x" * 20)[None], answers("." * 9 + "x" + "x" * 20)[None]
    assert paired_over_seeds(first, second).p == pytest.approx(22 / 1024, abs=0.005)
    repeated = [np.repeat(one, 4, axis=0) for one in (first, second)]
    assert paired_over_seeds(*repeated).p == pytest.approx(22 / 1024, abs=0.005)  # the same rows say no more
