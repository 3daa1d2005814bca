"""`trimtab serve` against callers who send what no client would: made-up requests, broken HTTP, strange uploads.

What must hold each time: the answer is one that the API documents, the server lives, and adapters that were there give
the bytes that they gave before.
"""

import gzip
import json
import re
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import hypothesis
import psutil
import pytest
import requests
import schemathesis
from adapters import write_adapter
from bases import write_base
from conftest import tiers
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis import checks as conformance
from servers import ADMIN, READER, TOKENS, Server, bearer, start

LABELS = {"reviews": ("neg", "pos"), "topics": ("sport", "film", "other")}
BODY = {"inputs": "a great film", "model": "reviews"}
CHANGE = re.compile(r"[\w.-]+: (version \S+ put here|pinned|unpinned|removed) by (anybody|everything)\n")


class Made(NamedTuple):
    """Folders that the servers of this file are made from."""

    base: Path
    adapters: Path
    spare: Path
    large: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("fuzz")
    made = Made(folder / "base", folder / "adapters", folder / "spare", folder / "large")
    write_base(made.base, "bert")
    for seed, (name, labels) in enumerate(LABELS.items()):
        write_adapter(made.adapters / name, made.base, seed=seed, labels=labels)
    write_adapter(made.spare, made.base, seed=9)
    shutil.copytree(made.spare, made.adapters / "scratch")
    shutil.copytree(made.spare, made.adapters / "unusable")
    (made.adapters / "unusable" / "adapter_model.safetensors").write_bytes(b"x")  # that its files cannot be used
    write_adapter(made.large, made.base, seed=10, r=64)
    return made


def served(made: Made, folder: Path, *arguments: str) -> Iterator[Server]:
    """A server with admin routes over a directory of its own, which tells its start, its end, and what is changed."""
    shutil.copytree(made.adapters, folder / "adapters")
    server = start("--adapter-dir", str(folder / "adapters"), "--watch", "0", "--admin", *arguments)
    yield server
    assert server.stop() == 0
    others = [line for line in server.lines if not CHANGE.fullmatch(line)]
    assert {line.split()[0] for line in others} == {"base", "adapters", "ready", "stopped;"}, others


@pytest.fixture(scope="module")
def server(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from served(made, tmp_path_factory.mktemp("open"))


@pytest.fixture(scope="module")
def guarded(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "tokens.toml").write_text(TOKENS, "utf-8")
    yield from served(made, folder, "--tokens", str(folder / "tokens.toml"))


def directory(server: Server) -> Path:
    arguments = server.process.args
    assert isinstance(arguments, list)
    return Path(arguments[arguments.index("--adapter-dir") + 1])


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def said(server: Server, **headers: str) -> list[Any]:
    """What the adapters that were there say."""
    return [server.predict({"inputs": "a great film", "model": name}, **headers) for name in LABELS]


def about(answers: list[Any]) -> list[Any]:
    """The same to 1e-4: in a batch with others the last digits may be others."""
    return [[{"label": one["label"], "score": pytest.approx(one["score"], abs=1e-4)} for one in row] for row in answers]


@pytest.fixture
def unharmed(server: Server) -> Iterator[None]:
    """The adapters answer the same afterwards."""
    before = said(server)
    yield
    assert said(server) == before


# -- requests that the description of the API makes up

CHECKS = [
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_headers_conformance,
    conformance.response_schema_conformance,
]
MEANT = (503, 504, 507)
"""Codes from 500 on that are no fault of the server."""


def fuzz(server: Server, callers: list[dict[str, str]], examples: int, seed: int) -> "Counter[tuple[str, int]]":
    """Sends made-up requests to every route; how often each gave which code."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    settings = hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=[*hypothesis.HealthCheck],
    )
    seen = Counter[tuple[str, int]]()
    for found in schema.get_all_operations():
        hypothesis.seed(seed)(settings(requests_for(found.ok(), callers, seen)))()
    return seen


def requests_for(operation: Any, callers: list[dict[str, str]], seen: "Counter[tuple[str, int]]") -> Any:
    """Requests for one route, good ones and bad ones, about adapters that are there and others."""
    route, session = f"{operation.method.upper()} {operation.path}", requests.Session()
    names = ["scratch"] if operation.method in ("put", "patch", "delete") else [*LABELS, "unusable"]
    made_up = st.one_of([operation.as_strategy(generation_mode=mode) for mode in GenerationMode])

    @hypothesis.given(made_up, st.sampled_from([*names, *names, None]), st.sampled_from(callers))
    def one(case: Any, name: str | None, caller: dict[str, str]) -> None:
        if name is not None:  # nobody makes up a name that is there
            if case.path_parameters and "adapter" in case.path_parameters:
                case.path_parameters["adapter"] = name
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = name
        response = case.call(headers=caller, session=session)
        seen[route, response.status_code] += 1
        assert response.status_code < 500 or response.status_code in MEANT, response.text
        case.validate_response(response, checks=CHECKS)

    return one


@pytest.mark.parametrize("trial", tiers(1, 4))
def test_made_up_requests_get_documented_answers(server: Server, unharmed: None, trial: int) -> None:
    seen = fuzz(server, [{}, {}, {"X-Request-Timeout-Ms": "1"}], 5 if trial == 0 else 60, trial)
    codes = {code for _, code in seen}
    assert {200, 422} <= codes
    assert any(code == 200 and route.startswith("POST") for route, code in seen)
    assert seen["PUT /v1/adapters/{adapter}", 200] + seen["PUT /v1/adapters/{adapter}", 422]


@pytest.mark.parametrize("trial", tiers(1, 4))
def test_made_up_requests_of_callers_with_tokens_get_documented_answers(guarded: Server, trial: int) -> None:
    before = said(guarded, **bearer(ADMIN))
    seen = fuzz(guarded, [{}, bearer(READER), bearer(ADMIN)], 5 if trial == 0 else 60, trial)
    assert {200, 401, 403, 422} <= {code for _, code in seen}
    assert said(guarded, **bearer(ADMIN)) == before


# -- bytes that are no requests

DATA = json.dumps(BODY).encode()
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ONE = HEAD + b"Content-Length: %d\r\n\r\n" % len(DATA) + DATA
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def get(target: bytes, more: bytes = b"", version: bytes = b"1.1") -> bytes:
    return b"GET %s HTTP/%s\r\nHost: localhost\r\n%s\r\n" % (target, version, more)


RAW: dict[str, tuple[bytes, list[int]]] = {
    "five at once": (ONE * 5, [200] * 5),
    "a good one before a bad one": (ONE + b"\0\0\r\n\r\n", [200, 400]),
    "chunks": (CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(DATA), DATA), [200]),
    "a chunk that is longer than it says": (CHUNKED + b"3\r\n" + DATA + b"\r\n0\r\n\r\n", [400]),
    "a chunk that never ends": (CHUNKED + b"ffffffffffffffff\r\n" + DATA, []),
    "a chunk's size of many digits": (CHUNKED + b"f" * 5_000 + b"\r\n" + DATA, [400]),
    "a chunk of less than nothing": (CHUNKED + b"-1\r\n" + DATA, [400]),
    "a chunk with a long extension": (CHUNKED + b"1;" + b"a" * 100_000 + b"\r\n" + DATA, [400]),
    "an encoding that nobody knows": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", [400]),
    "a body shorter than it says": (HEAD + b"Content-Length: 1000\r\n\r\n" + DATA, []),
    "a body longer than it says": (HEAD + b"Content-Length: 5\r\n\r\n" + DATA + b"\r\n\r\n", [422, 400]),
    "two lengths": (HEAD + b"Content-Length: 59\r\nContent-Length: 3\r\n\r\n" + DATA, [400]),
    "a length below zero": (HEAD + b"Content-Length: -1\r\n\r\n", [400]),
    "a length with a sign": (HEAD + b"Content-Length: +5\r\n\r\n", [400]),
    "a length of many digits": (HEAD + b"Content-Length: " + b"9" * 5_000 + b"\r\n\r\n", [400]),
    "a length of an exabyte": (HEAD + b"Content-Length: 1000000000000000000\r\n\r\n", []),
    "HTTP/1.0": (ONE.replace(b"HTTP/1.1", b"HTTP/1.0"), [200]),
    "HTTP/1.1 without a host": (b"GET /livez HTTP/1.1\r\n\r\n", [400]),
    "HTTP/1.0 without a host": (b"GET /v1/models HTTP/1.0\r\n\r\n", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200, [400]),
    "two hosts": (get(b"/v1/models", b"Host: evil.example\r\n"), [400]),
    "another host in the target": (get(b"http://evil.example/v1/models"), [404]),
    "a whole address": (get(b"http://localhost/v1/models"), [404]),
    "every method on anything": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", [404]),
    "a tunnel": (b"CONNECT evil.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", [404]),
    "an echo": (b"TRACE /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", [405]),
    "who wants to be asked for the body": (ONE.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"), [200]),
    "200 headers": (get(b"/livez", b"".join(b"X-%d: 1\r\n" % i for i in range(200))), [200]),
    "5,000 headers": (get(b"/livez", b"".join(b"X-%d: 1\r\n" % i for i in range(5_000))), [431]),
    "a web socket": (get(b"/livez", b"Upgrade: websocket\r\nConnection: Upgrade\r\n"), [200]),
    "NUL": (get(b"/v1/models/a%00b"), [404]),
    "NUL as it is": (get(b"/v1/models/a\0b"), [400]),
    "bytes that are no text": (get(b"/v1/models/%ff%fe"), [404]),
    "half a character": (get(b"/v1/models/%ed%a0%80"), [404]),
    "out of the folder": (get(b"/page/%2e%2e/app.py"), [404]),
    "out of the folder, twice encoded": (get(b"/page/%252e%252e/app.py"), [404]),
    "out of the folder as on Windows": (get(b"/page/..%5capp.py"), [404]),
    "out of the folder as it is": (get(b"/docs-assets/../../../etc/passwd"), [404]),
    "a name that leads out": (get(b"/v1/adapters/%2e%2e%2fspare"), [404]),
    "a number of many digits": (get(b"/v1/models?limit=" + b"9" * 6_000), [422]),
    "a query of nothing": (get(b"/v1/models?&&&===%ff&after=%00"), [200]),
    "a time of other digits": (ONE.replace(b"\r\n\r\n", "\r\nX-Request-Timeout-Ms: ²\r\n\r\n".encode()), [422]),
}


def exchange(server: Server, sent: bytes, answers: int) -> list[int]:
    """The codes of the answers to some bytes: so many, or as many as come before the server closes."""
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=8) as connection:
        with suppress(ConnectionError):  # it answered before it had read all
            connection.sendall(sent)
            if not answers:
                connection.shutdown(socket.SHUT_WR)
        found, codes = b"", []
        with suppress(ConnectionError):
            while piece := connection.recv(65_536):
                found += piece
                codes = [int(code) for code in re.findall(rb"(?:^|[\n}\]])HTTP/1\.1 ([2-5]\d\d)", found)]
                if answers and len(codes) >= answers:
                    break
        return codes


@pytest.mark.parametrize("kind", RAW)
def test_bytes_that_are_no_requests(server: Server, unharmed: None, kind: str) -> None:
    sent, expected = RAW[kind]
    assert exchange(server, sent, len(expected)) == expected


@pytest.mark.parametrize(
    "path", ["/health", "/livez", "/readyz", "/ping", "/", "/v2/health/ready", "/docs", "/page/page.js", "/v1/models"]
)
def test_head_is_answered_like_get_without_a_body(server: Server, path: str) -> None:
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=8) as connection:
        connection.sendall(b"HEAD %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode())
        connection.sendall(get(b"/livez", b"Connection: close\r\n"))
        head, _, rest = b"".join(iter(lambda: connection.recv(65_536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert rest.startswith(b"HTTP/1.1 200 ")  # the next answer follows at once
    _, _, headers = server.ask("GET", path)
    said = dict(line.split(": ", 1) for line in head.decode().lower().split("\r\n")[1:])
    assert said["content-length"] == headers["content-length"]
    assert said["content-type"] == headers["content-type"]


def test_head_needs_a_token_where_get_does(guarded: Server) -> None:
    assert guarded.ask("HEAD", "/v1/models")[0] == 401
    assert guarded.ask("HEAD", "/v1/models", headers=bearer(READER))[0] == 200
    assert guarded.ask("HEAD", "/v1/adapters/topics", headers=bearer(READER))[0] == 403
    assert guarded.ask("HEAD", "/predict", headers=bearer(READER))[0] == 405


def test_broken_requests_at_once_disturb_nobody(server: Server) -> None:
    """While forty callers send broken requests, every good one is answered alike."""
    before, over = about(said(server)), threading.Event()

    def abuse(sent: bytes) -> None:
        where = urlsplit(server.url)
        while not over.is_set():
            with suppress(OSError), socket.create_connection((where.hostname, where.port), timeout=1) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(65_536)

    threads = [threading.Thread(target=abuse, args=(sent,)) for sent, _ in RAW.values()]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert said(server) == before
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    "target",
    [
        b"http://localhost/v1/models", b"/docs/../v1/models", b"/docs/%2e%2e/v1/models", b"/docs%2f..%2fv1/models",
        b"/page/..%2f..%2fv1%2fmodels", b"/page/../v1/models", b"//v1/models", b"/livez/../v1/models",
        b"/livez;/v1/models", b"/livez%00/v1/models", b"/v1/models?/docs", b"/v1/models#/docs", b"/v1/models%3f/docs",
        b"/docs-assets/../v1/models", b"/%76%31/models", b"/v1/adapters/reviews", b"/a/reviews/info",
    ],
)  # fmt: skip
def test_no_spelling_of_an_address_needs_no_token(guarded: Server, target: bytes) -> None:
    where = urlsplit(guarded.url)
    with socket.create_connection((where.hostname, where.port), timeout=8) as connection:
        connection.sendall(get(target, b"Connection: close\r\n"))
        found = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert re.match(rb"HTTP/1\.1 4\d\d ", found)
    assert b"reviews" not in found


# -- bodies of another kind

EVERYTHING = {"inputs": "a great film", "input": "a great film", "model": "reviews"}
INFER = {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a great film"]}]}
SIMPLE = [None, "text/plain", "text/plain; charset=application/json", "application/x-www-form-urlencoded", "text/json",
          "multipart/form-data; boundary=x"]  # fmt: skip
"""What a page of any site may send without asking; and what looks like JSON."""


@pytest.mark.parametrize("kind", SIMPLE)
def test_a_page_elsewhere_cannot_ask_or_change_anything(server: Server, unharmed: None, kind: str | None) -> None:
    """Every route that takes a body is tried, also those that are still to be written."""
    paths = server.ask("GET", "/openapi.json")[1]["paths"]
    routes = [(method, path) for path, ways in paths.items() for method in ways if method in ("post", "put", "patch")]
    assert len(routes) >= 9
    for method, path in routes:
        body = {"pin": False} if method != "post" else INFER if path.endswith("infer") else EVERYTHING
        address = f"{server.url}{path.replace('{adapter}', 'reviews')}"
        headers = {"Origin": "http://evil.example"} | ({"Content-Type": kind} if kind else {})
        response = requests.request(method, address, data=json.dumps(body).encode(), headers=headers, timeout=30)
        assert response.status_code in (400, 415, 422), (method, path, response.text)
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": method.upper()}
        leave = requests.options(address, headers=asked, timeout=30)
        assert leave.status_code >= 400
        assert not [name for name in leave.headers if name.lower().startswith("access-control")]


def test_nothing_compressed_is_inflated(server: Server, unharmed: None) -> None:
    bomb = gzip.compress(b'{"inputs": "' + b"a" * (100 << 20) + b'"}')
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    for method, path in (("POST", "/predict"), ("POST", "/v2/models/reviews/infer"), ("PUT", "/v1/adapters/scratch")):
        for raw in (bomb, gzip.compress(json.dumps(BODY).encode())):
            for encoding in ("gzip", "GZIP", "deflate", "br", "gzip, gzip", "identity, gzip"):
                status, failure, _ = server.ask(method, path, raw=raw, headers={"Content-Encoding": encoding})
                assert (status, "Compressed" in failure["error"]) == (415, True)
    assert process.memory_info().rss - before < 50 << 20
    assert server.ask("POST", "/predict", BODY, headers={"Content-Encoding": "identity"})[0] == 200


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
@pytest.mark.parametrize(
    ("status", "path", "more"),
    [
        (401, "/predict", {}),
        (401, "/v1/adapters/reviews", bearer("wrong")),
        (413, "/predict", bearer(ADMIN)),
        (413, "/health", {}),
        (415, "/predict", bearer(ADMIN) | {"Content-Encoding": "gzip"}),
        (415, "/health", {"Content-Encoding": "gzip"}),
        (431, "/predict", bearer(ADMIN) | {"X-One": "a" * 9_000, "X-Two": "a" * 9_000}),
    ],
)
def test_who_still_sends_reads_why_not(
    guarded: Server, status: int, path: str, more: dict[str, str], connection: str
) -> None:
    for _ in range(5):
        found, failure, _ = guarded.ask("PUT", path, raw=b"x" * (8 << 20), headers=more | {"Connection": connection})
        assert (found, bool(failure["error"])) == (status, True)


# -- uploads

EDGE = "edge-of-the-parts"
PARTS = {"Content-Type": f"multipart/form-data; boundary={EDGE}"}


def form(*parts: tuple[str, bytes]) -> bytes:
    """A body of parts, each with what stands behind `form-data` and its content."""
    pieces = [f"--{EDGE}\r\nContent-Disposition: form-data{head}\r\n\r\n".encode() + data for head, data in parts]
    return b"\r\n".join([*pieces, f"--{EDGE}--\r\n".encode()])


def sent_files(folder: Path, **other: bytes) -> list[tuple[str, bytes]]:
    contents = {file.name: file.read_bytes() for file in folder.iterdir()} | other
    return [(f'; name="files"; filename="{name}"', data) for name, data in contents.items()]


def strange(folder: Path) -> dict[str, bytes]:
    """Bodies of uploads that must be refused."""
    good, name = sent_files(folder), '; name="files"'
    config = next(part for part in good if "adapter_config" in part[0])
    return {
        "nothing": b"",
        "no edge": json.dumps(BODY).encode(),
        "no parts": form(),
        "no end": form(*good)[:-20],
        "no files": form(('; name="pin"', b"true")),
        "a file alone": form(config),
        "parts of another name": form(*[(head.replace('"files"', '"file"'), data) for head, data in good]),
        "a name twice": form(*good, config),
        "texts where files are wanted": form(*[(name, data) for _, data in good[:3]]),
        "no name": form(("", b"x")),
        "a file that leads out": form(*good, (f'{name}; filename="../../out"', b"x")),
        "a file from the root": form(*good, (f'{name}; filename="/etc/cron.d/x"', b"x")),
        "a file of Windows": form(*good, (f'{name}; filename="..\\\\out"', b"x")),
        "a file of no name": form(*good, (f'{name}; filename=""', b"x")),
        "a file with a NUL": form(*good, (f'{name}; filename="README.md\0"', b"x")),
        "a file with a long name": form(*good, (f'{name}; filename="{"a" * 3_000}"', b"x")),
        "a hidden file": form(*good, (f'{name}; filename=".bashrc"', b"x")),
        "a program": form(*good, (f'{name}; filename="model.py"', b"x")),
        "a name in another coding": form(*good, (f"{name}; filename*=utf-8''..%2fout", b"x")),
        "many files": form(*[(f'{name}; filename="f{i}"', b"x") for i in range(20_000)]),
        "many fields": form(*[(f'; name="f{i}"', b"x") for i in range(20_000)]),
        "a header of a megabyte": form((f'; name="{"a" * (1 << 20)}"', b"x")),
        "many headers": form((name + "".join(f"\r\nX-{i}: 1" for i in range(20_000)), b"x")),
        "a field of ten megabytes": form(('; name="pin"', b"a" * (10 << 20))),
        "a field that is no number": form(*good, ('; name="if_generation"', b"soon")),
        "a number of many digits": form(*good, ('; name="if_generation"', b"9" * 6_000)),
        "a file where a field is wanted": form(*good, ('; name="pin"; filename="pin"', b"true")),
        "another generation": form(*good, ('; name="if_generation"', b"7")),
        "tensors that are none": form(*sent_files(folder, **{"adapter_model.safetensors": b"x" * 1_000})),
    }


STRANGE = [
    "nothing", "no edge", "no parts", "no end", "no files", "a file alone", "parts of another name", "a name twice",
    "texts where files are wanted", "no name", "a file that leads out", "a file from the root", "a file of Windows",
    "a file of no name", "a file with a NUL", "a file with a long name", "a hidden file", "a program",
    "a name in another coding", "many files", "many fields", "a header of a megabyte", "many headers",
    "a field of ten megabytes", "a field that is no number", "a number of many digits",
    "a file where a field is wanted", "another generation", "tensors that are none",
]  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_uploads_leave_everything_as_it_was(server: Server, made: Made, unharmed: None, kind: str) -> None:
    raw, before = strange(made.spare)[kind], files(directory(server).parent)
    for name in ("topics", "new"):
        status, failure, _ = server.ask("PUT", f"/v1/adapters/{name}", raw=raw, headers=PARTS)
        assert status in ((412,) if kind == "another generation" else (400, 413, 422)), failure
        assert failure.keys() == {"error", "error_type", "code", "mend"}
        assert len(failure["error"]) < 1_000
    assert files(directory(server).parent) == before
    assert server.ask("GET", "/v1/adapters/new")[0] == 404


def test_every_strange_upload_is_sent(made: Made) -> None:
    assert [*strange(made.spare)] == STRANGE


@pytest.mark.parametrize("edge", ["", "a" * 5_000, "a b", '"', "\xe9"])
def test_strange_edges_of_parts(server: Server, made: Made, unharmed: None, edge: str) -> None:
    raw = form(*sent_files(made.spare))
    kind = f"multipart/form-data; boundary={edge}"
    assert server.ask("PUT", "/v1/adapters/new", raw=raw, headers={"Content-Type": kind})[0] in (400, 422)


@pytest.mark.parametrize("charset", ["undefined", "idna", "unicode_escape", "utf-16", "latin-1", "no such", ""])
def test_strange_codings_of_parts(server: Server, made: Made, unharmed: None, charset: str) -> None:
    raw, kind = form(*sent_files(made.spare)), f"{PARTS['Content-Type']}; charset={charset}"
    status, failure, _ = server.ask("PUT", "/v1/adapters/new", raw=raw, headers={"Content-Type": kind})
    assert (status, failure["code"]) == (422, "serve.upload")
    assert "charset" in failure["mend"]


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", '"utf8"'])
def test_the_usual_coding_of_parts(server: Server, made: Made, unharmed: None, charset: str) -> None:
    raw, kind = form(*sent_files(made.spare)), f"{PARTS['Content-Type']}; charset={charset}"
    assert server.ask("PUT", "/v1/adapters/scratch", raw=raw, headers={"Content-Type": kind})[0] == 200


@pytest.mark.skipif(not hasattr(psutil.Process, "rlimit"), reason="a process's limits can be changed on Linux alone")
def test_an_upload_without_room_for_its_parts_is_507(server: Server, made: Made, unharmed: None) -> None:
    process, before = psutil.Process(server.process.pid), files(directory(server).parent)
    soft, hard = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (500_000, hard))  # as if its disks were full
    try:
        raw = form(*sent_files(made.spare, **{"README.md": b"x" * (2 << 20)}))
        status, failure, _ = server.ask("PUT", "/v1/adapters/new", raw=raw, headers=PARTS)
    finally:
        process.rlimit(psutil.RLIMIT_FSIZE, (soft, hard))
    assert (status, failure["code"], "TMPDIR" in failure["mend"]) == (507, "serve.disk", True)
    assert files(directory(server).parent) == before


def test_uploads_while_others_ask(server: Server, made: Made) -> None:
    """An adapter comes, is replaced, refused and goes; who asks others sees their answers and nothing else."""
    before, over, found = about(said(server)), threading.Event(), list[bool]()

    def ask() -> None:
        while not over.is_set():
            found.append(said(server) == before)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            for folder in (made.spare, made.large):
                raw = form(*sent_files(folder))
                assert server.ask("PUT", "/v1/adapters/coming", raw=raw, headers=PARTS)[0] == 200
            bad = form(*sent_files(made.spare, **{"adapter_model.safetensors": b"x" * 1_000}))
            assert server.ask("PUT", "/v1/adapters/coming", raw=bad, headers=PARTS)[0] == 422
            assert server.ask("DELETE", "/v1/adapters/coming")[0] == 200
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert len(found) >= 8
    assert all(found)


def test_an_upload_without_room_leaves_the_folder_as_it_was(made: Made, tmp_path: Path) -> None:
    """What answers and what lies in the folder stay one and the same."""
    shutil.copytree(made.adapters / "topics", tmp_path / "adapters" / "topics")
    server = start("--adapter-dir", str(tmp_path / "adapters"), "--watch", "0", "--admin", "--memory", "20KB")
    before, answer = files(tmp_path), server.predict({"inputs": "a great film"})
    raw = form(*sent_files(made.large))
    for name in ("topics", "new"):
        assert server.ask("PUT", f"/v1/adapters/{name}", raw=raw, headers=PARTS)[0] == 507
        assert files(tmp_path) == before
    assert server.predict({"inputs": "a great film"}) == answer
    assert server.stop() == 0


def test_only_who_may_change_adapters_may_send_much(guarded: Server) -> None:
    """A body is kept in memory until it is whole: an upload's size is for those who may upload."""
    raw = b"x" * (3 << 20)
    assert guarded.ask("PUT", "/v1/adapters/reviews", raw=raw, headers=PARTS | bearer(READER))[0] == 413
    assert guarded.ask("PUT", "/v1/adapters/reviews", raw=raw, headers=PARTS | bearer(ADMIN))[0] in (400, 422)
