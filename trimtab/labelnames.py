"""Names of labels as training rows: `card_arrival` says what its rows are about.

With 10 rows a label they are worth about a point of accuracy to an adapter, and half a point to a probe (three seeds,
`docs/evidence.md`).
"""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import product

from trimtab import tokens
from trimtab.classification import NAME_LANGUAGES, Labels
from trimtab.data import Example, reduced
from trimtab.tokens import Tokenizer

FILE = "label names"
"""Where these rows say that they stand; their line is the number of the label, from 1."""

_WHOLE = 1 << 30  # tokens: names are not cut here


def rows(labels: Labels, texts: Iterable[str], tokenizer: Tokenizer) -> list[Example]:
    """A row for each name that says something of its own, `card arrival`; of display names, one for each language.

    Left out are names of signs and single letters, such that a digit alone tells from another (LABEL_0), such that
    the base does not know, and `texts`, which are trained on or judged already.
    """
    named: dict[tuple[int, str], str] = {}  # the first spelling of each
    for i, language in product(range(len(labels)), NAME_LANGUAGES):
        name = _words(labels.name(i, language))
        named.setdefault((i, reduced(name)), name)
    without_digits = Counter(key for _, key in {(i, _without_digits(name)) for (i, _), name in named.items()})
    taken = {reduced(text) for text in texts}
    says = [
        (i, name)
        for (i, key), name in named.items()
        if re.match(r"\w.*[^\W\d_]{2}|[^\W\d_]{2}", name)
        and without_digits[_without_digits(name)] == 1
        and key not in taken
    ]
    unknown = tokens.unknown_tokens(tokens.encode([name for _, name in says], tokenizer, _WHOLE), tokenizer)
    return [
        Example(name, labels.values[i], FILE, i + 1)
        for (i, name), times in zip(says, unknown, strict=True)
        if not times
    ]


def _words(name: str) -> str:
    """`card_arrival`, `card-arrival` and `card/arrival` -> `card arrival`."""
    return re.sub(r"[\s_/-]+", " ", name).strip()


def _without_digits(name: str) -> str:
    return reduced(re.sub(r"\d", "", name))
