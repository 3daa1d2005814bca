import os
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch

from trimtab import device, machine
from trimtab.config import RuntimeSettings
from trimtab.errors import RecipeError

GIB = 2**30
X86 = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse4_2 avx2 avx512f avx512_bf16 amx_bf16

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd bf16\nCPU implementer\t: 0x41\n"
V2_UNLIMITED = {"cpu.max": "max 100000\n", "memory.max": "max\n"}
V1_UNLIMITED = {
    "cpu/cpu.cfs_quota_us": "-1\n",
    "cpu/cpu.cfs_period_us": "100000\n",
    "memory/memory.limit_in_bytes": "9223372036854771712\n",
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    return root


def test_x86_is_read_from_its_first_processor(tmp_path: Path) -> None:
    cpuinfo = write(tmp_path, {"cpuinfo": X86}) / "cpuinfo"
    features = ("amx_bf16", "avx2", "avx512_bf16", "avx512f")
    assert machine.processor(cpuinfo) == machine.Processor("Intel(R) Xeon(R) Platinum 8480+", features)


def test_arm_has_features_and_the_system_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    cpuinfo = write(tmp_path, {"cpuinfo": ARM}) / "cpuinfo"
    assert machine.processor(cpuinfo) == machine.Processor("aarch64", ("bf16",))


def test_without_cpuinfo_the_processor_has_a_name_and_no_features(tmp_path: Path) -> None:
    chip = machine.processor(tmp_path / "none")
    assert chip.name
    assert chip.features == ()


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({"cpu.max": "250000 100000\n", "memory.max": f"{4 * GIB}\n"}, (2.5, 4 * GIB)),
        (V2_UNLIMITED, (0.0, 0)),
        ({"cpu.max": "50000 100000\n", "memory.max": "max\n"}, (0.5, 0)),
        (
            {**V1_UNLIMITED, "cpu/cpu.cfs_quota_us": "150000\n", "memory/memory.limit_in_bytes": f"{2 * GIB}\n"},
            (1.5, 2 * GIB),
        ),
        (V1_UNLIMITED, (0.0, 0)),
        ({}, (0.0, 0)),
    ],
    ids=["v2", "v2 unlimited", "v2 cores only", "v1", "v1 unlimited", "no cgroup"],
)
def test_what_a_container_grants(tmp_path: Path, files: dict[str, str], limits: tuple[float, int]) -> None:
    assert machine.cgroup(write(tmp_path, files)) == limits


def test_affinity_limits_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert machine.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert machine.usable_cores() == 7


def test_a_container_limits_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = psutil.virtual_memory()._replace(available=8 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: left)
    for limit, below, above in ((0, 8 * GIB, 8 * GIB), (16 * GIB, 8 * GIB, 8 * GIB), (4 * GIB, 2 * GIB, 4 * GIB - 1)):
        root = write(tmp_path / str(limit), {"memory.max": f"{limit or 'max'}\n"})
        # Of its own limit, this process has used something already.
        assert below <= machine.available_memory(root) <= above


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": f"{64 * GIB}\n",
            "memory.current": f"{60 * GIB}\n",
            "memory.stat": f"anon 1\ninactive_file {GIB}\nactive_file 7\n",
        },
        {
            "memory/memory.limit_in_bytes": f"{64 * GIB}\n",
            "memory/memory.usage_in_bytes": f"{60 * GIB}\n",
            "memory/memory.stat": f"inactive_file 3\ntotal_inactive_file {GIB}\n",
        },
    ],
    ids=["v2", "v1"],
)
def test_what_others_in_a_container_have_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    left = psutil.virtual_memory()._replace(available=100 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: left)
    assert machine.available_memory(write(tmp_path, files)) == 5 * GIB


def test_the_peak_is_counted_in_bytes() -> None:
    now = psutil.Process().memory_info().rss
    assert now / 2 < machine.peak_rss_bytes() < 64 * now


@pytest.mark.parametrize(
    ("asked", "threads"), [("3", 3), ("2,4", 2), ("²", 0), ("many", 0), ("0", 0), ("100000", -1), ("9" * 5_000, -1)]
)
def test_threads_are_as_many_as_openmp_is_asked_for(monkeypatch: pytest.MonkeyPatch, asked: str, threads: int) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    if threads < 0:
        with pytest.raises(RecipeError, match="OMP_NUM_THREADS asks for") as refused:
            device.place(RuntimeSettings(device="cpu"))
        assert len(str(refused.value)) < 300
        return
    placement = device.place(RuntimeSettings(device="cpu"))
    assert set_to == [placement.threads]
    assert (placement.threads_reason == "OMP_NUM_THREADS") == (threads > 0)
    assert placement.threads == threads or not threads


def test_freed_memory_goes_back_to_the_system() -> None:
    pa.array(["a text of some length " * 4] * 500_000)  # 40 MB, freed at once, kept by pyarrow's pool
    before = psutil.Process().memory_info().rss
    machine.give_back_freed_memory()
    assert before - psutil.Process().memory_info().rss > 20e6


SHAPES = """
import psutil, torch
from trimtab import device
from trimtab.config import RuntimeSettings
device.place(RuntimeSettings(device="cpu", threads=1))
x, thin = torch.ones(1_400, 384).bfloat16(), torch.ones(384, 8).bfloat16()
before = psutil.Process().memory_info().rss
for rows in range(200, 1_400):
    x[:rows] @ thin
print(psutil.Process().memory_info().rss - before)
"""


def test_products_of_ever_new_shapes_keep_little_memory() -> None:
    """With torch's own limits they keep 700 MB on a processor with bfloat16, and on others hardly anything."""
    without = {key: value for key, value in os.environ.items() if not key.endswith("CACHE_CAPACITY")}
    kept = subprocess.run([sys.executable, "-c", SHAPES], env=without, capture_output=True, text=True, check=True)
    assert int(kept.stdout) < 400e6


def test_what_the_environment_says_of_the_caches_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    machine.keep_few_shapes()
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("7", "256")


@pytest.mark.parametrize(
    ("own", "rounds"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_waiting_threads_sleep_soon(own: dict[str, str], rounds: str) -> None:
    """As OpenMP itself says when torch loads it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **own}
    done = subprocess.run(
        [sys.executable, "-c", "import trimtab.forward"], env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch brings another OpenMP here")
    assert f"GOMP_SPINCOUNT = '{rounds}'" in done.stderr
