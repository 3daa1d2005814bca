"""Whether this machine is ready: one line for each thing that stops or slows a run on a CPU.

Each check imports what it needs, so a missing package becomes a line instead of a traceback. torch is never
imported: that a package is installed does not tell that it loads, nor how fast a run will be.
"""

import codecs
import os
import platform
import re
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

Level = Literal["good", "doubtful", "bad"]

_GIB = 2**30
_THREE_WAYS_OUT = (
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


def diagnose(*, folder: Path = Path(".")) -> list[Check]:
    """Returns every check of this machine, with `folder` as the place where runs will be written."""
    checks: dict[str, Callable[[], Check]] = {
        "python": check_python,
        "packages": partial(check_installed, "packages", "", "bad"),
        "cpu": check_cpu,
        "cores": check_cores,
        "memory": check_memory,
        "disk": partial(check_disk, folder),
        "demo": partial(check_installed, "demo", "demo", "doubtful"),
        "hub": check_hub,
        "console": check_console,
    }
    return [_guarded(name, check) for name, check in checks.items()]


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    """Runs a check; one that fails still gives its line, and every line is ASCII, which prints anywhere."""
    try:
        line = check()
    except Exception as error:
        found = f"could not be checked ({type(error).__name__}: {error})"
        line = Check(name, "doubtful", found, "install trimtab again; if this line stays, report it to its authors")
    return Check(name, line.level, _ascii(line.found), _ascii(line.mend))


def _ascii(text: str) -> str:
    return " ".join(text.split()).encode("ascii", "backslashreplace").decode()


def check_python() -> Check:
    """The interpreter, against what trimtab's metadata asks for."""
    from packaging.specifiers import SpecifierSet

    wanted = metadata.metadata("trimtab")["Requires-Python"]
    found = ".".join(map(str, sys.version_info[:3]))
    if SpecifierSet(wanted).contains(found):
        return Check("python", "good", found)
    return Check("python", "bad", f"{found}, needed is {wanted}", f"install Python {wanted}")


def check_installed(name: str, extra: str, otherwise: Level) -> Check:
    """Versions of what trimtab requires, or of what one of its extras adds, against its own metadata."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    told = [Requirement(text) for text in metadata.requires("trimtab") or ()]
    good, wrong, mend = [], [], ["pip install"]
    for wanted in told:
        if not (wanted.marker.evaluate({"extra": extra}) if wanted.marker else not extra):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            version = ""
        # Builds from source, such as 2.9.0a0+git1234, are known by their number.
        if version and wanted.specifier.contains(Version(version).base_version):
            good.append(f"{wanted.name} {version}")
        else:
            wrong.append(f"{wanted.name} {version or 'not installed'}, needed is {wanted.specifier}")
            mend.append(f'"{wanted.name}{wanted.specifier}"')
    if wrong:
        return Check(name, otherwise, "; ".join(wrong), " ".join(mend))
    return Check(name, "good", ", ".join(good))


def check_cpu() -> Check:
    """What the processor's features mean for the dtype."""
    from trimtab import machine

    chip = machine.processor()
    found = f"{chip.name}; {', '.join(chip.features) or platform.machine()}"
    if machine.is_faster_in_bf16(chip):
        return Check("cpu", "good", f"{found}: bf16 in hardware, which the fast forward computes in")
    if machine.has_bf16(chip):
        return Check("cpu", "good", f"{found}: bf16 in hardware, for runtime.dtype=bfloat16; else float32")
    if "avx2" in chip.features or platform.machine().lower() in ("arm64", "aarch64"):
        return Check("cpu", "good", f"{found}: float32 is the fast dtype, bf16 would be slow")
    mend = "if the CPU has no AVX2, expect a slow run: take a small base model, or another machine"
    return Check("cpu", "doubtful", f"{found}: no AVX2 seen", mend)


def check_cores() -> Check:
    """Cores, the container's quota, and limits on threads that waste cores or fight over them."""
    from trimtab import machine

    cores, (quota, _) = machine.usable_cores(), machine.cgroup()
    usable = max(1, min(cores, int(quota or cores)))
    found = f"{cores} seen, but the container's quota is {quota:g}" if 0 < quota < cores else f"{cores} usable"
    told = {name: os.environ.get(name, "").partition(",")[0] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    limits = {name: int(threads) for name, threads in told.items() if threads.isdecimal()}
    found += "".join(f"; {name}={threads}" for name, threads in limits.items())
    wrong = [name for name, threads in limits.items() if threads > usable or threads == 1 < usable]
    if wrong:
        mend = f"unset {' and '.join(wrong)}: a run then chooses its threads itself, up to {usable}"
        return Check("cores", "doubtful", found, mend)
    return Check("cores", "good", found)


def check_memory() -> Check:
    """Memory that a run can have now."""
    from trimtab import machine

    available = machine.available_memory()
    found = f"{available / _GIB:.2f} GiB available"
    if available >= 2 * _GIB:
        return Check("memory", "good", found)
    mend = "close other programs, or give the machine or container more memory: 2 GiB or more"
    return Check("memory", "bad" if available < _GIB else "doubtful", found, mend)


def check_disk(folder: Path) -> Check:
    """Free space at `folder`, or at the nearest folder above it that exists, and whether a file can be made."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    where = "this folder" if place == Path(".") else str(place)
    probe = place / f".trimtab-doctor-{os.getpid()}"
    try:
        # Permission bits do not tell on Windows, for root, or on a disk that is mounted read-only.
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        mend = "work in a folder where you may create files"
        return Check("disk", "bad", f"{where} is not writable ({error.strerror})", mend)
    free = shutil.disk_usage(place).free
    found = f"{free / _GIB:.2f} GiB free in {where}, writable"
    if free >= 2 * _GIB:
        return Check("disk", "good", found)
    mend = "free 2 GiB or more, or work in a folder on another disk"
    return Check("disk", "bad" if free < _GIB / 5 else "doubtful", found, mend)


def check_hub(seconds: float = 3.0) -> Check:
    """Whether the hub or mirror answers; offline, no socket is opened."""
    from trimtab import hub

    if hub.is_offline():
        return Check("hub", "good", "HF_HUB_OFFLINE is set: not asked")
    # A password in the address belongs neither on a screen nor in a bug report.
    address = re.sub(r"//[^/]*@", "//", hub.endpoint())
    answers: list[tuple[int, str]] = []
    # A thread limits the whole: urllib limits each step, and the lookup of the name not at all.
    asking = threading.Thread(target=lambda: answers.append(_ask(address, seconds)), daemon=True)
    asking.start()
    asking.join(seconds)
    status, answer = answers[0] if answers else (0, f"no answer within {seconds:g} s")
    # Mirrors need not serve their root, so 404 and 405 are answers; 401, 403 and 407 may be a proxy's.
    if 0 < status < 400 or status in (404, 405):
        return Check("hub", "good", f"{address} answers: {answer}")
    return Check("hub", "doubtful", f"{address} cannot be used: {answer}", _THREE_WAYS_OUT)


def _ask(address: str, seconds: float) -> tuple[int, str]:
    """The HTTP status of one HEAD request, or 0, and what to say of it."""
    try:
        # Some mirrors turn urllib's own name away.
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "trimtab-doctor"})
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return response.status, f"HTTP {response.status}"
    except urllib.error.HTTPError as error:
        return error.code, f"HTTP {error.code}"
    except Exception as error:  # whatever proxies, TLS, DNS and odd addresses raise
        cause = getattr(error, "reason", error)
        return 0, str(cause) or type(cause).__name__


def check_console() -> Check:
    """The encoding of standard output, which is None in a process without one."""
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig", "gbk", "gb18030"):
        return Check("console", "good", f"{encoding}: Chinese and English print")
    mend = "set the environment variable PYTHONIOENCODING to utf-8"
    return Check("console", "doubtful", f"{encoding}: Chinese may not print", mend)
