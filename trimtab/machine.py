"""What this machine is: processor, cores that may be used, memory. Reads the system, imports nothing heavy."""

import contextlib
import ctypes
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

# What decides the fast dtype: bf16 in hardware (ARM calls it just that), or float32 vectors of 256 bits.
_FEATURES = frozenset({"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "bf16"})


@dataclass(frozen=True)
class Processor:
    """The processor's name and those of its features that matter here; features are known on Linux only."""

    name: str
    features: tuple[str, ...]


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Processor:
    """The processor, from Linux's cpuinfo where there is one."""
    told: dict[str, str] = {}
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            told.setdefault(key.strip(), value.strip())
    features = sorted(_FEATURES & set((told.get("flags") or told.get("Features") or "").split()))
    return Processor(told.get("model name") or platform.processor() or platform.machine(), tuple(features))


def has_bf16(chip: Processor) -> bool:
    """Whether it multiplies bfloat16 in hardware."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(chip.features))


def is_faster_in_bf16(chip: Processor) -> bool:
    """Whether bfloat16 was measured to be faster on its kind: AVX-512's instructions; ARM's nobody has measured."""
    return "avx512_bf16" in chip.features


def cgroup(root: Path = Path("/sys/fs/cgroup")) -> tuple[float, int]:
    """What a container grants: (cores, bytes of memory); 0 where there is no limit. cgroup v2, else v1."""
    cores, memory = 0.0, 0
    quota = _words(root / "cpu.max") or _words(root / "cpu/cpu.cfs_quota_us") + _words(root / "cpu/cpu.cfs_period_us")
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        cores = int(quota[0]) / int(quota[1])
    limit = _words(root / "memory.max") or _words(root / "memory/memory.limit_in_bytes")
    if limit and limit[0].isdigit() and int(limit[0]) < 1 << 60:  # v1 writes a number near 2**63 for no limit
        memory = int(limit[0])
    return cores, memory


def _words(file: Path) -> list[str]:
    try:
        return file.read_text("ascii").split()
    except OSError:
        return []


def usable_cores() -> int:
    """Cores that this process may run on, before any container quota."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be taken: what the system has left, at most what the container has."""
    _, limit = cgroup(root)
    left = int(psutil.virtual_memory().available)
    return min(left, limit - _taken(root)) if limit else left


def _taken(root: Path) -> int:
    """Bytes that a container's processes have, without files that can be read again; at least this process's own."""
    own = int(psutil.Process().memory_info().rss)
    taken = _words(root / "memory.current") or _words(root / "memory/memory.usage_in_bytes")
    told = _words(root / "memory.stat") or _words(root / "memory/memory.stat")
    files = dict(zip(told[::2], told[1::2], strict=False))
    again = files.get("total_inactive_file") or files.get("inactive_file") or "0"
    return max(own, int(taken[0]) - int(again)) if taken and taken[0].isdigit() and again.isdigit() else own


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows keeps it elsewhere
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next tensor instead of giving it back to the system.

    A training step frees and takes back tensors of megabytes; by default each is mapped anew, and its pages, 2 us
    each, cost 10 to 15 % of a step. 32 MB is the most that glibc takes as the threshold; the second setting must come
    with it, or the heap is trimmed at every free (man 3 mallopt). Elsewhere this does nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_few_shapes() -> None:
    """Lets oneDNN keep 256 shapes of products for all threads and torch 64 for each, where 1,024 are their defaults.

    In bfloat16 every shape has code of its own, 0.3 to 0.7 MB, and batches of texts bring new shapes all the time: the
    tutorial's recipe peaked at 2.3 GB; 24 of its steps at 1.70 GB, at 1.35 with 256 of each. A step has about 150
    shapes a thread and comes back to most within a layer: 64 a thread took as long as 256 (0.99 and 1.01 in two
    pairs) and 170 MB less (read by hand, AMD with bf16 instructions). What the environment says already stands; after
    oneDNN's first product this does nothing.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # oneDNN's, one for all threads
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")  # of ideep, by which torch calls it: one for each thread


def give_back_freed_memory() -> None:
    """Gives the system back what pyarrow and glibc keep of freed memory.

    Of 20,000 reviews read for 1,000, 160 MB were kept for nothing; while training, holes between the small tensors of
    batches of many sizes, for glibc does not use a hole again for an aligned piece of its very size.
    """
    if pyarrow := sys.modules.get("pyarrow"):
        pyarrow.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
