"""The exceptions of trimtab, and the exit code that each one ends a command with.

    TrimtabError
    ├── RecipeError        2   a recipe, a setting or a flag that cannot be
    ├── MissingExtraError  2   an optional package is not installed
    ├── DataError          3   a file, a column, a row or a label
    ├── BaseModelError     4   the base model, the model hub or a mirror
    ├── ResourceError      5   disk, memory, permissions
    ├── DivergedError      6   training went to NaN
    └── ArtefactError      7   an adapter, a checkpoint or a base that do not belong together

Every error says what was found, where, and how to mend it, and has a stable `code` such as
`data.missing_column`. Each is also the standard exception that a caller would expect.
"""

import difflib
import shlex
import unicodedata
from collections.abc import Iterable


class TrimtabError(Exception):
    """Anything that a user can mend. `str()` is the whole message, one part a line."""

    exit_code = 1

    def __init__(self, code: str, what: str, *, where: str = "", mend: str = "") -> None:
        super().__init__(code, what, where, mend)
        self.code, self.what, self.where, self.mend = code, what, where, mend

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.code, self.what, self.where, self.mend)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.mend:
            lines.append(f"  mend:  {self.mend}")
        return "\n".join(lines)


class RecipeError(TrimtabError, ValueError):
    """A recipe, a setting or a flag that cannot be."""

    exit_code = 2


class MissingExtraError(TrimtabError, ImportError):
    """An optional package is not installed; the mend is the pip command."""

    exit_code = 2


class DataError(TrimtabError, ValueError):
    """A data file, column, row or label that cannot be used as it is."""

    exit_code = 3


class BaseModelError(TrimtabError, OSError):
    """The base model cannot be found, loaded or used, or the hub did not answer."""

    exit_code = 4


class ResourceError(TrimtabError, OSError):
    """Disk, memory or permissions."""

    exit_code = 5


class DivergedError(TrimtabError, ArithmeticError):
    """Loss or gradients are not finite."""

    exit_code = 6


class ArtefactError(TrimtabError, ValueError):
    """An adapter, checkpoint or base that is damaged or does not belong to the others."""

    exit_code = 7


def _rebuild(kind: type[TrimtabError], code: str, what: str, where: str, mend: str) -> TrimtabError:
    return kind(code, what, where=where, mend=mend)


def install_extra(extra: str) -> str:
    """The mend of a `MissingExtraError`. trimtab is on no package index, so its name alone would install nothing."""
    return f'pip install -c constraints.txt ".[{extra}]" in the folder that trimtab was cloned into'


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean "x"?` for the nearest known word, else an empty string."""
    by_lower = {word.casefold(): word for word in known}
    close = difflib.get_close_matches(wrong.casefold(), by_lower, n=1, cutoff=0.6)
    return f' Did you mean "{by_lower[close[0]]}"?' if close else ""


def quoted(word: object) -> str:
    """A path as a shell takes it, for commands that people copy."""
    return shlex.quote(str(word))


def plain(text: str, most: int | None = None) -> str:
    """Takes out what a terminal would obey, where a stranger may have written a part of it; cuts after `most`."""
    shown = "".join(char if _is_shown(char) else "\N{REPLACEMENT CHARACTER}" for char in text[:most])
    return shown + ("..." if most is not None and len(text) > most else "")


def _is_shown(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"  # Python counts only one of the blanks as printable


def some(items: Iterable[object], limit: int = 5) -> str:
    """Returns the first `limit` items joined by commas, and how many more there are."""
    words = [str(item) for item in items]
    more = f" and {len(words) - limit:,} more" if len(words) > limit else ""
    return ", ".join(words[:limit]) + more
