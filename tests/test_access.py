"""The file of tokens: what it may say, and that every secret in it can be sent."""

from pathlib import Path

import pytest

from trimtab.errors import RecipeError
from trimtab.serving import access


def written(folder: Path, secret: str) -> Path:
    file = folder / "tokens.toml"
    file.write_text(f'[[token]]\nname = "me"\nsecret = "{secret}"\nadapters = ["*"]\n', "utf-8")
    return file


@pytest.mark.parametrize(
    "secret",
    [
        "a-secret-with-é-in-it",
        "一个足够长的秘密一个足够长的秘密",
        " begins-with-a-space",
        "ends-with-a-space ",
        "has a space within it",
        "tab\\tin-the-middle-of",
        "a-line-of-its-own\\n",
        "not-printable-\\u007f-at-all",
    ],
)
def test_a_secret_that_no_header_brings_is_refused(tmp_path: Path, secret: str) -> None:
    with pytest.raises(RecipeError, match="ASCII, and no spaces") as failure:
        access.read(written(tmp_path, secret))
    assert "token_urlsafe" in failure.value.mend
    assert failure.value.where.endswith("tokens.toml, token 1")


def test_a_secret_of_every_sign_is_found(tmp_path: Path) -> None:
    secret = "".join(map(chr, range(0x21, 0x7F)))
    (token,) = access.read(written(tmp_path, secret.replace("\\", "\\\\").replace('"', '\\"')))
    assert access.find([token], secret) is token
    assert access.find([token], secret[:-1]) is None
