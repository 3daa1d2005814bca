"""Who may ask which adapters: tokens from a file. Knows no HTTP."""

import fnmatch
import hashlib
import hmac
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import RecipeError, TrimtabError

_SHORTEST = 16
_MAKE = 'python3 -c "import secrets; print(secrets.token_urlsafe())" makes one'


class ForbiddenError(TrimtabError):
    """What this caller, or anybody, may not do here."""


@dataclass(frozen=True)
class Token:
    """One caller: the sum of its secret, the adapters it may ask, and whether it may change them."""

    name: str
    sha256: bytes
    adapters: tuple[str, ...]
    """Names, or patterns with * and ?."""
    admin: bool = False

    def may_ask(self, adapter: str) -> bool:
        """Whether one of its patterns is, or matches, the name."""
        return any(fnmatch.fnmatchcase(adapter, pattern) for pattern in self.adapters)


ANYBODY = Token("anybody", b"", ("*",), admin=True)
"""The caller of a server without tokens."""


def find(tokens: Sequence[Token], secret: str) -> Token | None:
    """The token with this secret. Takes the same time whichever it is, and whether it is one or none."""
    given = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
    found = None
    for token in tokens:
        if hmac.compare_digest(token.sha256, given):
            found = token
    return found


def read(file: Path) -> tuple[Token, ...]:
    """Reads a file of tokens:

        [[token]]
        name = "team-a"
        secret = "at-least-16-characters"      # or sha256 = "64 hex digits" of it
        adapters = ["team-a-*", "shared"]
        admin = false

    Raises:
        RecipeError: it cannot be read, holds no token, or one that cannot be.
    """  # noqa: D415 - the example belongs to the sentence
    example = '[[token]]\\nname = "me"\\nsecret = "..."\\nadapters = ["*"]'
    mend = f"one such part for each caller: {example}"
    try:
        said = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            "serve.tokens", f"The token file cannot be read: {error}", where=str(file), mend=mend
        ) from None
    parts = said.get("token")
    if not isinstance(parts, list) or not parts or set(said) != {"token"}:
        raise RecipeError("serve.tokens", "The token file holds no [[token]].", where=str(file), mend=mend)
    tokens = tuple(_token(part, f"{file}, token {number}") for number, part in enumerate(parts, 1))
    if len({token.sha256 for token in tokens}) < len(tokens):
        raise RecipeError("serve.tokens", "Two tokens have the same secret.", where=str(file), mend="one for each")
    return tokens


def _token(part: object, where: str) -> Token:
    def wrong(what: str, mend: str) -> RecipeError:
        return RecipeError("serve.tokens", what, where=where, mend=mend)

    if not isinstance(part, dict):
        raise wrong("This is not a table.", "begin it with [[token]]")
    if unknown := set(part) - {"name", "secret", "sha256", "adapters", "admin"}:
        raise wrong(f"{sorted(unknown)[0]} is not known.", "name, secret or sha256, adapters, admin")
    name, adapters, admin = part.get("name", ""), part.get("adapters"), part.get("admin", False)
    secret, digest = part.get("secret"), part.get("sha256")
    if not isinstance(name, str) or not isinstance(admin, bool):
        raise wrong("name is a string, admin true or false.", 'name = "team-a", admin = false')
    if not isinstance(adapters, list) or not adapters or not all(isinstance(one, str) for one in adapters):
        raise wrong("adapters is a list of names or patterns.", 'adapters = ["*"] for all of them')
    if (secret is None) == (digest is None):
        raise wrong("A token has a secret or the sha256 of one.", 'secret = "..."')
    if digest is not None:
        try:
            found = bytes.fromhex(digest)
        except (TypeError, ValueError):
            found = b""
        if len(found) != hashlib.sha256().digest_size:
            raise wrong("sha256 is not 64 hex digits.", "printf %s SECRET | sha256sum")
    else:
        if not isinstance(secret, str) or len(secret) < _SHORTEST:
            raise wrong(
                f"A secret has at least {_SHORTEST} characters.",
                _MAKE,
            )
        if not re.fullmatch("[!-~]+", secret):  # a header brings no others as they are
            raise wrong("A secret has letters, digits and signs of ASCII, and no spaces.", _MAKE)
        found = hashlib.sha256(secret.encode()).digest()
    return Token(name, found, tuple(adapters), admin)
