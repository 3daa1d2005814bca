"""`trimtab serve` as a process of its own, for the tests that talk to it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

TOKENS = """
[[token]]
name = "everything"
secret = "admin-admin-admin-admin"
adapters = ["*"]
admin = true

[[token]]
name = "reviews only"
secret = "reader-reader-reader"
adapters = ["rev*"]
"""
ADMIN, READER = "admin-admin-admin-admin", "reader-reader-reader"


@dataclass
class Server:
    """A running `trimtab serve`."""

    process: "subprocess.Popen[str]"
    url: str
    lines: list[str]
    """What it says, on either of its ways to say something; complete once it is stopped."""
    reader: threading.Thread

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, what the body says, headers."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        found = response.read()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        said = json.loads(found) if is_json and found else found.decode("utf-8", "replace")
        return response.status, said, dict(response.headers.items())

    def predict(self, body: object, path: str = "/predict", **headers: str) -> Any:
        status, found, _ = self.ask("POST", path, body, headers=headers)
        assert status == 200, found
        return found

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(30)
        self.reader.join(30)
        return code


def start(*arguments: str) -> Server:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    said = process.stdout
    assert said is not None
    lines: list[str] = []
    for line in said:
        lines.append(line)
        if found := re.match(r"ready +(http://\S+)", line):
            reader = threading.Thread(target=lines.extend, args=(said,), daemon=True)
            reader.start()
            return Server(process, found.group(1), lines, reader)
    raise AssertionError("".join(lines))


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}
