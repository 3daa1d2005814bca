"""What `trimtab serve` makes of its options, and how its server starts."""

import asyncio
import gc
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from adapters import write_adapter
from bases import write_base

from trimtab.errors import ArtefactError, RecipeError, ResourceError
from trimtab.serving import predicting, server
from trimtab.serving.guard import State
from trimtab.serving.service import Times


def test_an_adapter_has_the_name_before_the_first_equals_sign_else_of_its_folder(tmp_path: Path) -> None:
    for path in ("reviews", "lr=0.1", "run/adapter"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "trimtab.json").touch()
    named = server._named([f"a={tmp_path}/lr=0.1", f"{tmp_path}/reviews", f"{tmp_path}/run/adapter"])
    assert {name: path.name for name, path in named.items()} == {"a": "lr=0.1", "reviews": "reviews", "run": "adapter"}
    with pytest.raises(RecipeError, match=r"lr=0\.1.*cannot be the name"):
        server._named([f"{tmp_path}/lr=0.1"])


def test_a_port_is_taken_once(tmp_path: Path) -> None:
    with server._listen("127.0.0.1", 0) as first, pytest.raises(ResourceError, match="listen"):
        server._listen("127.0.0.1", first.getsockname()[1])


def test_a_base_within_the_directory_is_nobodys(tmp_path: Path) -> None:
    """Whoever may put folders there would choose the base and the tokenizer of all."""
    directory = tmp_path.resolve() / "adapters"
    write_base(directory / "a" / "base", "bert")
    write_adapter(directory / "a" / "adapter", directory / "a" / "base")
    (directory / "a" / "adapter").rename(directory / "b")
    with pytest.raises(ArtefactError, match="within the directory"):
        server._base(None, {}, directory)
    assert server._base(None, {"b": directory / "b"}, directory).folder == directory / "a" / "base"


def test_a_directory_of_adapters_is_told_from_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "a").mkdir(parents=True)
    (tmp_path / "adapters" / "a" / "trimtab.json").touch()
    with pytest.raises(RecipeError, match="--adapter-dir"):
        server._named([str(tmp_path / "adapters")])


@pytest.mark.parametrize("said", ["lots", "9" * 400 + "GB", "1e3MB", "-1GB", ""])
def test_a_size_that_is_none(said: str) -> None:
    with pytest.raises(RecipeError, match="no size"):
        server._bytes(said)
    assert (server._bytes("1.5 GiB"), server._bytes("800MB")) == (1_500_000_000, 800_000_000)


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 1e12, -1.0])
@pytest.mark.parametrize("flag", ["watch_s", "drain_s"])
def test_times_that_no_clock_has(flag: str, seconds: float) -> None:
    options: dict[str, Any] = {flag: seconds}
    with pytest.raises(RecipeError, match="cannot be"):
        server.serve(replace(server.Options(), **options), print)


def test_what_is_in_memory_when_it_is_ready_is_never_collected_again() -> None:
    """One pass of the collector stopped all answers for a quarter of a second."""

    async def app(scope: object, receive: object, send: object) -> None: ...

    frozen: list[int] = []
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        one = server._Server(config, State(), lambda: frozen.append(gc.get_freeze_count()), drain_s=0)

        async def start_and_stop() -> None:
            config.load()
            one.lifespan = config.lifespan_class(config)
            await one.startup([listening])
            await one.shutdown([listening])

        gc.unfreeze()  # what other tests of this process left
        try:
            asyncio.run(start_and_stop())
        finally:
            gc.unfreeze()
    assert frozen[0] > 10_000


def test_headers_that_proxies_would_refuse_are_left_out() -> None:
    def answer(name: str) -> Any:
        resident = SimpleNamespace(name=name, version=f"1-{name}")
        return SimpleNamespace(resident=resident, tokens=3, prediction=SimpleNamespace(truncated=False, text="t"))

    times = Times(0.1, 0.0, 0.1)
    few = predicting._headers([answer(f"customer-{i:03}") for i in range(100)], times)
    many = predicting._headers([answer(f"customer-{i:03}") for i in range(256)], times)
    assert few["x-adapter"].count(",") == 99
    assert "x-adapter" not in many
    assert "x-adapter-version" not in many
    assert many["x-compute-tokens"] == "768"
