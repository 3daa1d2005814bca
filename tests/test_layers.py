import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trimtab

PACKAGE = Path(trimtab.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py")} | {
    path.parent.name: path.parent for path in PACKAGE.glob("*/__init__.py")
}

# From the ground up. A module imports from lower layers only, so no two modules of one layer know each other.
LAYERS = [
    ["durable", "errors", "interrupts", "machine", "paired"],
    ["config"],
    ["hub", "findings"],
    ["data", "tokens", "rundir", "checkpoint", "doctor", "device", "model", "untrusted", "fast", "wording"],
    ["batching", "demo", "preflight", "charts", "markdown", "logistic"],
    ["forward", "page"],
    ["classification"],
    ["adapter", "calibration", "labelnames", "predictions"],
    ["resolve"],
    ["trunk"],
    ["adopt", "build", "estimate", "predict", "report", "runreport"],
    ["baselines", "comparison", "console", "files", "serving"],
    ["evaluation", "loop"],
    ["headstart"],
    ["search"],
    ["rivals", "training"],
    ["trials"],
    ["tuning"],
    ["api"],
    ["cli"],
]
HEIGHT = {module: height for height, layer in enumerate(LAYERS) for module in layer}
DOORS = {"__init__", "__main__"}  # what they offer is imported when it is asked for

LIGHT = ["trimtab"] + [
    f"trimtab.{module}"
    for module in (
        *("errors", "machine", "config", "hub", "data", "tokens", "batching"),
        *("rundir", "doctor", "demo", "cli"),
    )
]
HEAVY = ["torch", "transformers", "peft", "sklearn", "pyarrow"]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a module, or a package with all its modules, imports at its top or within a function."""
    if path.is_dir():
        for module in path.glob("*.py"):
            yield from imports(module)
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def own(path: Path) -> set[str]:
    """The modules of this package that a module imports."""
    dotted = (name.split(".") for name in imports(path))
    found = {parts[1] for parts in dotted if parts[0] == "trimtab" and len(parts) > 1 and parts[1] in MODULES}
    return found - ({path.name} if path.is_dir() else set())  # the modules of a package know each other


def test_every_module_has_its_layer() -> None:
    assert MODULES.keys() - DOORS == HEIGHT.keys()
    assert sum(map(len, LAYERS)) == len(HEIGHT)


@pytest.mark.parametrize("module", HEIGHT)
def test_imports_go_down(module: str) -> None:
    assert {name for name in own(MODULES[module]) if HEIGHT[name] >= HEIGHT[module]} == set()


def test_imports_are_absolute() -> None:
    assert [path.name for path in MODULES.values() if any(name.startswith(".") for name in imports(path))] == []


def test_the_imports_of_this_package_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "import trimtab.hub\nfrom trimtab import data, __version__\ndef f():\n    from trimtab.cli import app"
    )
    assert own(file) == {"hub", "data", "cli"}


def test_only_the_command_line_knows_typer() -> None:
    users = {name for name, path in MODULES.items() if any(n.split(".")[0] == "typer" for n in imports(path))}
    assert users == {"cli"}


def test_only_serving_knows_http_servers() -> None:
    libraries = {"fastapi", "starlette", "uvicorn", "prometheus_client"}
    users = {name for name, path in MODULES.items() if libraries & {n.split(".")[0] for n in imports(path)}}
    assert users == {"serving"}
    inside = {
        path.stem for path in (PACKAGE / "serving").glob("*.py") if libraries & {n.split(".")[0] for n in imports(path)}
    }
    assert inside == {"app", "listing", "metrics", "predicting", "server"}


def test_only_the_page_knows_templates() -> None:
    users = {
        name for name, path in MODULES.items() if {"jinja2", "markupsafe"} & {n.split(".")[0] for n in imports(path)}
    }
    assert users == {"page"}


def test_what_must_start_at_once_imports_nothing_heavy() -> None:
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[2].split(','):\n"
        "    importlib.import_module(name)\n"
        "    print(name, *(heavy for heavy in sys.argv[1].split(',') if heavy in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, ",".join(HEAVY), ",".join(LIGHT)],
        cwd=PACKAGE.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == LIGHT
