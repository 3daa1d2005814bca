"""Two sets of answers to the same rows: paired differences, with intervals and a verdict by rules fixed beforehand."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

DRAWS = 10_000
_P = 0.05
_ROUNDING = 1e-12  # of a mean: an end of an interval that is zero may come out beside it
_CHUNK = 500  # draws at a time
_SEED = 0  # of the draws: the same answers get the same interval

Counts = npt.NDArray[np.int64]
OneHot = Any
"""scipy.sparse.csr_array, which has no types."""
Interval = tuple[float, float]


class Difference(NamedTuple):
    """A score of one set of answers minus that of another, over the same rows."""

    difference: float
    ci95: Interval
    """By bootstrap over the rows."""
    only_first: int
    """Rows that the first alone answers rightly."""
    only_second: int
    p: float
    """Two-sided: how likely so large a difference would be, were it chance which of the two gave which answer.

    Of accuracy it is McNemar's exact one, of macro F1 that of drawn exchanges (approximate randomisation, Yeh 2000).
    """

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `not resolved` where the interval holds zero or p is 0.05 or more.

        Where few rows differ, a bootstrap alone is too eager: 4 rows against none leave zero out at p = 0.125.
        """
        if self.p >= _P:
            return "not resolved"
        return "better" if self.ci95[0] > 0 else "worse" if self.ci95[1] < 0 else "not resolved"


def paired(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> Difference:
    """Compares which rows two sets of answers get right, bool[n] each (McNemar 1947; Efron 1979).

    Drawing rows with replacement is drawing how many of them only the first, only the second, and both or neither get
    right: a multinomial draw, exact and quick for any n.
    """
    from scipy.stats import binomtest

    rows = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    shares = np.array([only_first, only_second, rows - only_first - only_second]) / rows
    drawn = np.random.default_rng(_SEED).multinomial(rows, shares, DRAWS)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / rows, (0.025, 0.975))
    uneven = only_first + only_second
    p = float(binomtest(only_first, uneven).pvalue) if uneven else 1.0
    return Difference((only_first - only_second) / rows, (float(low), float(high)), only_first, only_second, p)


def paired_macro_f1(
    first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], classes: int
) -> Difference:
    """As `paired`, for macro F1: answers int64[n] of both, labels int64[n].

    Rows with the same label and the same two answers are one cell, so that a draw is a multinomial one over cells, and
    exchanging answers at random a binomial one in each. A class that neither occurs nor is answered by the one that is
    scored does not count for it, as in `by_class`.
    """
    cells, counts = np.unique(np.stack([labels, first, second], axis=1), axis=0, return_counts=True)
    # Sparse, since of 1,000 classes a cell is of one: 78 s over 3,000 rows, were all of them multiplied.
    truth, ours, theirs = (_one_hot(column, classes) for column in cells.T)

    def macro_f1(kept: Counts, exchanged: Counts, own: OneHot, other: OneHot) -> npt.NDArray[np.float64]:
        right = kept @ truth.multiply(own) + exchanged @ truth.multiply(other)
        whole = (kept + exchanged) @ truth + kept @ own + exchanged @ other
        f1 = np.divide(2 * right, whole, out=np.zeros_like(right), where=whole > 0)
        return np.asarray(f1.sum(axis=1) / (whole > 0).sum(axis=1))

    def differences(kept: Counts, exchanged: Counts) -> npt.NDArray[np.float64]:
        """float64[d] of draws int64[d, cells] of rows as they are, and of rows whose two answers are exchanged."""
        return macro_f1(kept, exchanged, ours, theirs) - macro_f1(kept, exchanged, theirs, ours)

    none, rng, chunks = np.zeros((_CHUNK, len(counts)), np.int64), np.random.default_rng(_SEED), range(DRAWS // _CHUNK)
    difference = float(differences(counts[None], none[:1])[0])
    drawn = (rng.multinomial(len(labels), counts / len(labels), _CHUNK) for _ in chunks)
    low, high = np.quantile(np.concatenate([differences(one, none) for one in drawn]), (0.025, 0.975))
    exchanged = (rng.binomial(np.tile(counts, (_CHUNK, 1)), 0.5) for _ in chunks)
    by_chance = np.abs(np.concatenate([differences(counts - one, one) for one in exchanged]))
    p = (1 + int((by_chance >= abs(difference) - _ROUNDING).sum())) / (1 + DRAWS)
    by_rows = paired(first == labels, second == labels)
    return by_rows._replace(difference=difference, ci95=(float(low), float(high)), p=p)


def _one_hot(values: npt.NDArray[np.int64], classes: int) -> OneHot:
    """A 1 in each of n rows, [n, classes]."""
    from scipy.sparse import csr_array

    rows = len(values)
    return csr_array((np.ones(rows), (np.arange(rows), values)), shape=(rows, classes))


class OverSeeds(NamedTuple):
    """The mean accuracy of one method minus that of another, over the same seeds and rows."""

    difference: float
    ci95: Interval
    """Of other seeds and other rows."""
    p: float
    """Two-sided, over the rows alone: how likely so large a difference would be, were it chance in each row which of
    the two gave which answers (10,000 drawn exchanges).
    """

    def verdict(self, margin: float) -> str:
        """`better` or `worse` beside zero, `same within the margin` where the whole interval is, else `not resolved`.

        From a p of 0.05 on nothing is better or worse: the same 4 rows against none in every seed are no evidence.
        """
        low, high = self.ci95
        if self.p < _P and low > _ROUNDING:
            return "better"
        if self.p < _P and high < -_ROUNDING:
            return "worse"
        return "same within the margin" if -margin <= low and high <= margin else "not resolved"


def paired_over_seeds(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> OverSeeds:
    """Compares two methods by right answers bool[seeds, n] of each to the same rows."""
    values = first.astype(np.float64) - second
    mean, (low, high) = _over_seeds(values)
    of_rows = np.abs(values.mean(axis=0))
    uneven = of_rows[of_rows > 0]
    rng, chunks = np.random.default_rng(_SEED), range(DRAWS // _CHUNK)
    signs = (rng.integers(0, 2, (_CHUNK, len(uneven)), np.int8) * 2 - 1 for _ in chunks)
    by_chance = np.abs(np.concatenate([one @ uneven for one in signs])) / values.shape[1]
    p = (1 + int((by_chance >= abs(mean) - _ROUNDING).sum())) / (1 + DRAWS)
    return OverSeeds(mean, (max(low, -1.0), min(high, 1.0)), p)


def mean_over_seeds(right: npt.NDArray[np.bool_]) -> tuple[float, Interval]:
    """The mean accuracy of bool[seeds, n] and its 95 % interval."""
    mean, (low, high) = _over_seeds(right.astype(np.float64))
    return mean, (max(low, 0.0), min(high, 1.0))


def _over_seeds(values: npt.NDArray[np.float64]) -> tuple[float, Interval]:
    """The mean of float64[seeds, n] and its 95 % interval, for other seeds and other rows.

    The half-widths of both are squared and added: of seeds by Student's t, of rows by the normal distribution. Drawing
    seeds with replacement would be far too sure of few: of three, where seeds alone differ, 95 % would be 75 %. One
    seed leaves its share out.
    """
    from scipy.stats import norm, t

    seeds = len(values)
    mean, half = float(values.mean()), 0.0
    for sampled, quantile in ((values.mean(axis=1), t(max(1, seeds - 1)).ppf), (values.mean(axis=0), norm.ppf)):
        if len(sampled) > 1:
            half = float(np.hypot(half, quantile(0.975) * sampled.std(ddof=1) / len(sampled) ** 0.5))
    return mean, (mean - half, mean + half)
