"""A small model hub on 127.0.0.1, for the tests that download through `huggingface_hub`.

It answers what `snapshot_download` and `hf_hub_download` ask and nothing else: the facts of a repository, the
list of its files, and each file. A repository has one commit, `main`: what its folder held when the server
started, kept in memory. Files are plain git blobs: no LFS, no Xet, no resumed downloads, no sign-in.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

# A repository id is `name` or `owner/name`.
_API = re.compile(r"/api/(models|datasets)/([^/]+(?:/[^/]+)??)(?:/(revision|tree)/([^/]+))?")
_FILE = re.compile(r"/(datasets/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)")

_Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


@dataclass(frozen=True)
class Hub:
    """A running hub: its address, and 'METHOD path' (without the query) of every request so far."""

    url: str
    requests: list[str]


@dataclass(frozen=True)
class _Repo:
    commit: str
    files: dict[str, bytes]


def _git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _read_repo(folder: Path) -> _Repo:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    listing = repr([(name, _git_blob_id(data)) for name, data in files.items()])
    return _Repo(hashlib.sha1(listing.encode()).hexdigest(), files)


def _missing(code: str, message: str, **headers: str) -> _Answer:
    return 404, {"X-Error-Code": code, "X-Error-Message": message, **headers}, b""


class _Server(ThreadingHTTPServer):
    def __init__(self, repos: dict[tuple[str, str], _Repo]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos = repos
        self.requests: list[str] = []

    def answer(self, path: str) -> _Answer:
        """Look for the repository, then the revision, then the file."""
        if api := _API.fullmatch(path):
            kind, repo_id, listing, revision = api.groups()
            name = None
        elif file := _FILE.fullmatch(path):
            prefix, repo_id, revision, name = file.groups()
            kind = "datasets" if prefix else "models"
        else:
            return 404, {}, b""  # not a route of this hub
        repo = self.repos.get((kind, repo_id))
        if repo is None:
            return _missing("RepoNotFound", "Repository not found")
        if revision not in (None, "main", repo.commit):
            return _missing("RevisionNotFound", f"Invalid rev id: {revision}")
        if name is not None:
            commit = {"X-Repo-Commit": repo.commit}
            data = repo.files.get(unquote(name))
            if data is None:
                return _missing("EntryNotFound", "Entry not found", **commit)
            return 200, {**commit, "ETag": f'"{_git_blob_id(data)}"'}, data
        facts: object
        if listing == "tree":  # of the whole repository, `recursive` or not
            facts = [
                {"type": "file", "path": name, "size": len(data), "oid": _git_blob_id(data)}
                for name, data in repo.files.items()
            ]
        else:  # clients before the tree route took over read the list of files here
            facts = {"id": repo_id, "sha": repo.commit, "siblings": [{"rfilename": n} for n in repo.files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(facts).encode()


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0, the default here, closes each connection: nothing is answered once the server has stopped.
    server: _Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        status, headers, body = self.server.answer(path)
        self.send_response(status)
        for header, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the requests are kept in `Hub.requests`."""


@contextmanager
def serve_hub(models: Mapping[str, Path], datasets: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve these folders, each under its repository id, until the block ends."""
    repos = {("models", repo_id): _read_repo(folder) for repo_id, folder in models.items()}
    repos |= {("datasets", repo_id): _read_repo(folder) for repo_id, folder in datasets.items()}
    with _Server(repos) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield Hub(f"http://127.0.0.1:{server.server_port}", server.requests)
        finally:
            server.shutdown()
            thread.join()
