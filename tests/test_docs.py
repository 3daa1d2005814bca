"""The two READMEs say the same, and what they say exists."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

from trimtab import config
from trimtab.cli import app

ROOT = Path(__file__).parent.parent
ENGLISH = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text("utf-8")


def headings(text: str) -> list[int]:
    """Depth of each heading outside code blocks."""
    outside = re.sub(r"```.*?```", "", text, flags=re.S)
    return [len(match) for match in re.findall(r"^(#+) ", outside, flags=re.M)]


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.S | re.M)


def commands(text: str) -> list[str]:
    shell = [code for language, code in blocks(text) if language == "bash"]
    joined = "\n".join(shell).replace("\\\n", " ")
    return [line.partition("#")[0].strip() for line in joined.splitlines() if line.strip()]


def test_both_languages_have_the_same_structure_and_the_same_commands() -> None:
    assert headings(ENGLISH) == headings(CHINESE)
    assert commands(ENGLISH) == commands(CHINESE)
    assert [code for language, code in blocks(ENGLISH) if language == "python"] == [
        code for language, code in blocks(CHINESE) if language == "python"
    ]


@pytest.mark.parametrize("command", [c for c in commands(ENGLISH) if c.startswith("trimtab ")])
def test_every_command_and_option_exists(command: str) -> None:
    words = shlex.split(command)
    found = typer.main.get_command(app)
    for word in words[1:]:
        if not hasattr(found, "commands"):
            break
        assert word in found.commands, f"no such command: {command}"
        found = found.commands[word]
    known = {name for parameter in found.params for name in parameter.opts}
    known_settings = config.keys()
    used = [word.partition("=")[0] for word in words if word.startswith("--")]
    assert set(used) <= known, command
    for setting in [words[i + 1] for i, word in enumerate(words) if word == "--set"]:
        assert setting.partition("=")[0] in known_settings


@pytest.mark.parametrize("target", [c.split()[1] for c in commands(ENGLISH) if c.startswith("make ")])
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "docs/serving.md"])
def test_extras_are_installed_from_a_clone_and_exist(page: str) -> None:
    """trimtab is on no package index, so `pip install trimtab` finds nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    told = re.findall(r"pip install (.*?)\"(\S*?)\[(\w+)\]\"", (ROOT / page).read_text("utf-8"))
    assert told
    for options, what, extra in told:
        assert (options, what) == ("-c constraints.txt ", ".")
        assert extra in project["optional-dependencies"]


PAGES = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/guarantees.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target
    for name in re.findall(r"`((?:trimtab|examples|docs|tests)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
