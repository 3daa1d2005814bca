"""`trimtab serve`: options -> store, engine, application -> a server that starts, answers, and stops in good order."""

import asyncio
import gc
import logging
import multiprocessing
import re
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimtab import adapter as adapter_folder
from trimtab import tokens
from trimtab.config import RuntimeSettings
from trimtab.device import place
from trimtab.errors import ArtefactError, BaseModelError, RecipeError, ResourceError, TrimtabError, quoted, some
from trimtab.hub import Base, find_base
from trimtab.machine import available_memory
from trimtab.rundir import adapter_in
from trimtab.serving import access, uploads
from trimtab.serving.app import Manners, build
from trimtab.serving.base import load_base
from trimtab.serving.engine import Engine
from trimtab.serving.engine import Limits as QueueLimits
from trimtab.serving.guard import Limits, State
from trimtab.serving.service import Service
from trimtab.serving.store import NAME, Store, folders
from trimtab.serving.watch import Watch
from trimtab.tokens import Tokenizer

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Options:
    """What `trimtab serve` was told."""

    adapters: tuple[str, ...] = ()
    """Runs or adapter folders, each as PATH or NAME=PATH."""
    directory: str | None = None
    base: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    tokens: str | None = None
    insecure: bool = False
    """Whether another address than this machine's own may be served without tokens."""
    admin: bool = False
    memory: str | None = None
    """For adapters, such as 4GB; None: half of what is free."""
    watch_s: float = 5.0
    """How often the directory is looked at; 0: never."""
    drain_s: float = 30.0
    queue: QueueLimits = field(default_factory=QueueLimits)
    limits: Limits = field(default_factory=Limits)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)


def serve(options: Options, say: Callable[[str], None]) -> None:
    """Serves until a signal asks to stop; then what was accepted is answered.

    Threads that hang, on a disk that does not answer, are left behind: who calls this ends the process.

    Args:
        options: What to serve, and how.
        say: Receives lines for people.

    Raises:
        TrimtabError: what was asked for cannot be served; nothing was opened.
    """
    manners, budget = _manners(options), _bytes(options.memory)
    for flag, seconds in (("--watch", options.watch_s), ("--drain", options.drain_s)):
        if not 0 <= seconds <= _DAY_S:
            raise RecipeError("serve.seconds", f"{seconds:g} s cannot be.", where=flag, mend="0 to 86400: a day")
    named = _named(options.adapters)
    directory = None if options.directory is None else _directory(options.directory)
    if directory is not None and (both := sorted(named.keys() & dict(folders(directory)).keys())):
        raise RecipeError(
            "serve.name",
            f'"{both[0]}" is named on the command line, and a folder of the directory is called so too.',
            where=str(directory / both[0]),
            mend=f"another name: {both[0]}-2={named[both[0]]}",
        )
    listening = _listen(options.host, options.port)
    try:
        if directory is not None:
            uploads.tidy(directory)
        placement = place(options.runtime)
        base = _base(options.base, named, directory)
        served = load_base(base, _tokenizer(base), options.runtime)
        how = f"{served.config['model_type']}, {str(served.dtype)[6:]}, {placement.threads} threads"
        say(f"base      {served.name} ({how})")
        store = Store(served, budget, say)
        for name, folder in named.items():
            store.replace(name, folder)
        watch = None
        if directory is not None:
            watch = Watch(store, directory)
            watch.first_look()
            if options.watch_s:
                watch.start(options.watch_s)
        totals = store.totals()
        others = ", the others when asked for" if totals["resident"] < totals["registered"] else ""
        say(
            f"adapters  {some(store.names()) or 'none yet'} ({totals['resident']:,} of {totals['registered']:,} in "
            f"memory{others}; {budget / 1e9:.1f} GB for them)"
        )
        service, state = Service(store, Engine(served, options.queue, workers=placement.threads)), State()
        port = listening.getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host

        def ready() -> None:
            state.is_ready = True
            say(f"ready     http://{host}:{port}   (page at /, API at /docs; Ctrl-C stops)")

        server = _Server(_config(build(service, manners, state, watch), options), state, ready, options.drain_s)
        # Not asyncio.run, which would wait at its end for threads that hang on a disk.
        asyncio.new_event_loop().run_until_complete(server.serve(sockets=[listening]))
        if watch is not None:
            watch.stop()
        service.close(_LAST_S)
        left = f"{state.unanswered:,} accepted requests were told that it stops (503)"
        say(f"stopped; {left if state.unanswered else 'all that was accepted has been answered'}")
    finally:
        listening.close()


# -- what was asked for ----------------------------------------------------------------------------------------------


def _manners(options: Options) -> Manners:
    """Tokens, limits and the names that the server goes by.

    Raises:
        RecipeError: an address that others can reach, with neither tokens nor the explicit word that none are wanted.
    """
    tokens = () if options.tokens is None else access.read(Path(options.tokens))
    is_local = options.host in _LOOPBACK
    if not is_local and not tokens and not options.insecure:
        raise RecipeError(
            "serve.open",
            f"On {options.host} others can reach this server, and no token keeps them out.",
            where="--host",
            mend="--tokens FILE with a token for each caller; or, where something else guards it, --insecure-no-auth",
        )
    hosts = Manners.hosts if is_local else ("*",)
    return Manners(tokens=tokens, hosts=hosts, admin=options.admin, limits=options.limits)


def _named(adapters: Sequence[str]) -> dict[str, Path]:
    """The adapters of the command line by name: what stands before =, else the last part of the path."""
    named: dict[str, Path] = {}
    for said in adapters:
        name, equals, path = said.partition("=")
        if not equals or not NAME.fullmatch(name):  # a path, which may hold one: runs/lr=0.1
            path = said
            name = next((part for part in reversed(Path(path).parts) if part != "adapter"), "")
        if not NAME.fullmatch(name):
            raise RecipeError(
                "serve.name",
                f"{name!r} cannot be the name of an adapter: letters, digits, dot, underscore and hyphen.",
                where=said,
                mend=f"a name of your own: my-adapter={path}",
            )
        if name in named:
            raise RecipeError(
                "serve.name", f'Two adapters are called "{name}".', where=said, mend=f"a name for each: {name}-2={path}"
            )
        named[name] = _one_adapter(path)
    return named


def _one_adapter(path: str) -> Path:
    folder = Path(path)
    is_one = any((folder / file).exists() for file in ("trimtab.json", "recipe.toml"))  # an adapter, or a run
    if folder.is_dir() and not is_one and list(folder.glob("*/trimtab.json")):
        raise RecipeError(
            "serve.name",
            "This is a directory of adapters, and no adapter.",
            where=path,
            mend=f"trimtab serve --adapter-dir {quoted(path)}",
        )
    return adapter_in(path)


def _directory(said: str) -> Path:
    path = Path(said)
    if not path.is_dir():
        raise RecipeError(
            "serve.directory", "The adapter directory is not there.", where=said, mend=f"mkdir {said}, or another path"
        )
    return path.resolve()


def _base(said: str | None, named: dict[str, Path], directory: Path | None) -> Base:
    """The base as given, else the one of the first adapter that knows it.

    Raises:
        RecipeError: there is nothing to tell which one.
        TrimtabError: it is not there, or no adapter can be read.
    """
    if said is not None:
        return find_base(said)
    places = (
        [*named.values(), *(folder for _, folder in sorted(folders(directory)))] if directory else [*named.values()]
    )
    problems: list[TrimtabError] = []
    for folder in places:
        try:
            is_named = folder in named.values()
            # What lies in the directory may be a stranger's: it makes nothing come from a hub, and brings no base.
            base = adapter_folder.locate_base(adapter_folder.read(folder), ask_hub=is_named)
            if is_named or directory is None or not base.folder.is_relative_to(directory):
                return base
            problems.append(BaseModelError("serve.base", "It names a base within the directory.", mend="--base BASE"))
        except TrimtabError as error:
            if folder in named.values():
                raise
            problems.append(error)
    if problems:
        raise ArtefactError(
            "serve.base",
            f"None of {len(problems)} adapters tells the base: {some(error.what for error in problems[:2])}",
            where=str(directory),
            mend=f"{problems[0].mend}; where the adapters will come later: --base BASE",
        )
    raise RecipeError(
        "serve.base",
        "There is no adapter yet to tell the base." if directory else "There is nothing to serve.",
        where="trimtab serve",
        mend="--base BASE" if directory else "trimtab serve runs/latest, or --adapter-dir DIR",
    )


def _tokenizer(base: Base) -> Tokenizer:
    """The base's tokenizer, made in a process of its own: transformers, which knows how, takes 230 MB for good."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(tokens.from_base, base.folder).result()


def _bytes(said: str | None) -> int:
    """A size such as 4GB or 800MB; None: half of the memory that is free."""
    if said is None:
        return available_memory() // 2
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)\s*([KMG])i?B?", said.strip(), re.IGNORECASE)
    if found is None:
        raise RecipeError("serve.memory", f'"{said}" is no size.', where="--memory", mend="--memory 4GB or 800MB")
    return int(float(found.group(1)) * {"K": 1e3, "M": 1e6, "G": 1e9}[found.group(2).upper()])


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens before the base is read: a port in use should not cost a minute."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        raise ResourceError(
            "serve.port",
            f"Nothing can listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}.",
            where="--port",
            mend="--port 0 takes any that is free",
        ) from None
    return listening


# -- the server ------------------------------------------------------------------------------------------------------


def _config(app: Any, options: Options) -> uvicorn.Config:
    _Protocol.receive_s = options.limits.receive_s
    # What the application logs is our fault and never a request's text.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # its warnings quote bytes of a body
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=_LAST_S,  # for clients that are slow to take their answers
        h11_max_incomplete_event_size=options.limits.header_bytes,
        backlog=_BACKLOG,
        limit_concurrency=_connections(),
    )


def _connections() -> int:
    """How many connections are kept at once, so that files for adapters can be opened beside them."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 1_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    return max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES, 16)


_BACKLOG = 1_024
_FILES = 200  # for adapters, libraries and sockets that wait


class _Server(uvicorn.Server):
    """uvicorn's server, which is not ready at the first signal and ends with 0: to be stopped is no failure."""

    def __init__(self, config: uvicorn.Config, state: State, ready: Callable[[], None], drain_s: float) -> None:
        super().__init__(config)
        self.state, self._ready, self.drain_s = state, ready, drain_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and says so."""
        await super().startup(sockets)
        # What is in memory now stays: without this the collector went through all of it, 0.25 s in which nothing else
        # was answered.
        gc.collect()
        gc.freeze()
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals set `should_exit`; uvicorn's own version would raise them again at the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # it stops already

    def _stop(self) -> None:
        if self.state.is_draining:  # the second signal
            self.state.give_up()
            return
        self.state.is_draining = True
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        """Listens on while accepted requests are answered, so that new ones are told to go elsewhere, not cut off."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self.drain_s
        while self.state.running and loop.time() < until:
            await asyncio.sleep(0.05)
        self.state.give_up()
        self.should_exit = True


_TAKING_S = 60.0  # for the rest of an answer to be taken
_LAST_S = 5  # for answers that are ready and on their way
_DAY_S = 86_400


class _Protocol(H11Protocol):
    """uvicorn's protocol, which gives a client so long to send a request, from its first byte to its last."""

    receive_s = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection that says nothing is closed too."""
        super().connection_made(transport)
        self._waiting: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request. Who asks again has taken the answers before."""
        self._stop_taking()
        super().data_received(data)
        self._arm()

    def _arm(self) -> None:
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._wait()
        else:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        """A next request may have begun to arrive before the last was answered."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self._taking = self.loop.call_later(_TAKING_S, self._unless_taken)
        if self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]:
            self._arm()

    def _unless_taken(self) -> None:
        """An answer that nobody reads is not kept for ever."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_waiting()
        self._stop_taking()
        super().connection_lost(exc)

    def _stop_taking(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(self.receive_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
