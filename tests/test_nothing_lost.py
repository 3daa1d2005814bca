"""Kills, signals, full disks and lost power: a run ends in the same bytes, and no torn state is ever believed.

Children are forked from this process, after its imports; the thread count of one (conftest) makes that safe.
"""

import contextlib
import errno
import io
import itertools
import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIGURES, later, reviews, tiers, write_csv
from test_training import contents, lasting, small

from trimtab import checkpoint, cli, config, interrupts, training
from trimtab.config import MINILM, Layered
from trimtab.errors import ArtefactError, ResourceError, TrimtabError
from trimtab.loop import Observer

pytestmark = pytest.mark.usefixtures("quick_module", "signals_as_in_a_terminal")

OFTEN = {"train__save_every_s": 1e-9, "train__num_epochs": 3, "train__refit": "on"}  # a checkpoint after every step


def in_child(work: Callable[[], Any]) -> int:
    """Forks; the child works and ends with 0, or with the code that the command would end with."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except interrupts.Interrupted as stop:
        os._exit(stop.exit_code)
    except TrimtabError as error:
        os._exit(error.exit_code)
    finally:
        os._exit(99)


def ending(child: int) -> int:
    """How a child ended: its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_or_resume(layered: Layered, out: Path, observe: Observer = lambda event: None) -> training.Run:
    if (out / "recipe.toml").is_file():
        return training.resume(out, observe=observe)
    return training.train(layered, out=str(out), observe=observe)


@pytest.fixture(scope="module")
def signals_as_in_a_terminal() -> Iterator[None]:
    """Under nohup, and in the background of a shell, some are ignored, and stay so in every child."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def layered(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Layered:
    return small(write_csv(tmp_path_factory.mktemp("rows") / "rows.csv", reviews(96)), bert, **OFTEN)


@pytest.fixture(scope="module")
def whole(layered: Layered, tmp_path_factory: pytest.TempPathFactory, quick_module: None) -> training.Run:
    """The run that nothing happens to."""
    return training.train(layered, out=str(tmp_path_factory.mktemp("whole") / "run"))


def same(run: Path, whole: training.Run) -> bool:
    return (
        contents(run / "adapter") == contents(whole.adapter)
        and all(
            (run / name).read_bytes() == (whole.path / name).read_bytes()
            for name in ("predictions.parquet", "data_report.json", "environment.json")
        )
        and lasting(training.Run(run, _metrics(run)).metrics) == lasting(whole.metrics)
    )


def _metrics(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "metrics.json").read_text("utf-8"))
    return found


class TestKill:
    @pytest.mark.parametrize("trial", tiers(4, 184))
    def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(
        self, layered: Layered, whole: training.Run, tmp_path: Path, trial: int
    ) -> None:
        rng, out, kills, in_second = random.Random(trial), tmp_path / "cut", 0, 0
        for number in range(4):
            child = in_child(lambda: start_or_resume(layered, out))
            if trial % 2:  # aimed at a save, of the first training or the second
                drafts = "checkpoints/.tmp-*" if trial % 4 == 1 else "checkpoints-refit/.tmp-*"
                wait_for(lambda drafts=drafts: any(out.glob(drafts)), child)
                time.sleep(rng.uniform(0, 0.003))
            elif number:
                if trial % 4 == 2:
                    wait_for(lambda: learns_twice(out), child)
                enough = lines(out / "events.jsonl") + rng.randrange(1, 8)
                wait_for(lambda enough=enough: lines(out / "events.jsonl") >= enough, child)
                time.sleep(rng.uniform(0, 0.01))
            else:  # wherever it is: reading, building, or at work
                time.sleep(rng.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
            killed = ending(child) == -signal.SIGKILL
            kills += killed
            in_second += killed and learns_twice(out)
        assert ending(in_child(lambda: start_or_resume(layered, out))) == 0
        assert in_second or trial % 4 < 2
        assert kills >= 3
        assert same(out, whole)
        FIGURES["runs killed"] += 1
        FIGURES["kills"] += kills
        FIGURES["kills in the second training"] += in_second

    @pytest.mark.parametrize("trial", tiers(2, 20))
    def test_real_processes_on_a_real_model(
        self, tmp_path: Path, real: tuple[list[str], training.Run], trial: int
    ) -> None:
        """The command itself, killed while it trains, evaluates and saves."""
        (words, whole), rng, out, kills = real, random.Random(trial), tmp_path / "cut", 0
        for _ in range(1 + trial % 2):
            begun = (out / "recipe.toml").is_file()
            process = command("train", "--resume", str(out)) if begun else command(*words, "--out", str(out))
            enough = lines(out / "events.jsonl") + rng.randrange(2, 9)
            wait_until(lambda enough=enough: lines(out / "events.jsonl") > enough, process)
            time.sleep(rng.uniform(0, 0.1))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
        assert command("train", "--resume", str(out)).wait() == 0
        assert kills == 1 + trial % 2
        assert same(out, whole)
        FIGURES["runs killed"] += 1
        FIGURES["kills"] += kills

    @pytest.mark.parametrize("at", [*range(0, 26, 5), *later([*range(26)] * 3)])
    def test_a_kill_at_any_call_of_a_save_leaves_a_whole_checkpoint(self, tmp_path: Path, at: int) -> None:
        write(tmp_path, 1)
        write(tmp_path, 2)

        def save() -> None:
            count_calls(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == at else None)
            write(tmp_path, 3)
            checkpoint.prune(tmp_path, best_step=-1)

        code = ending(in_child(save))
        assert code in (0, -signal.SIGKILL)
        found, _ = checkpoint.newest(tmp_path)
        assert found is not None
        assert found.state["step"] in (2, 3)
        assert bool((found.tensors["weight"] == found.state["step"]).all())
        FIGURES["kills at a call of a save"] += code != 0


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], training.Run]:
    """A command that trains a real model, and the run of it that was never killed."""
    place = tmp_path_factory.mktemp("real")
    settings = ("train.num_epochs=2", "base.dropout=0.1", "train.save_every_s=0.01", "train.batch_size=4")
    words = ["train", str(write_csv(place / "rows.csv", reviews(64))), "--base", MINILM]
    words += [word for one in settings for word in ("--set", one)]
    assert command(*words, "--out", str(place / "whole")).wait() == 0
    return words, training.Run(place / "whole", _metrics(place / "whole"))


def command(*words: str) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-m", "trimtab", *words]
    return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def learns_twice(out: Path) -> bool:
    return b'"event": "refit"' in (out / "events.jsonl").read_bytes() if (out / "events.jsonl").is_file() else False


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not happened() and process.poll() is None:
        time.sleep(0.005)


def wait_for(happened: Callable[[], bool], child: int) -> None:
    """Until it happened, or the child has ended, without taking its ending away."""
    while not happened():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.0005)


def write(folder: Path, step: int) -> None:
    checkpoint.write(folder, step, {"weight": torch.full((1_000,), float(step))}, {"step": step})


def count_calls(before: Callable[[int], object]) -> None:
    """From now on, `before(number)` runs ahead of each call that changes the file system, and amid each write."""
    numbers = itertools.count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **more: Any) -> Any:
            before(next(numbers))
            return call(*given, **more)

        return counting

    for name in ("mkdir", "open", "fsync", "rename", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    real_open = io.open

    def opened(*given: Any, **more: Any) -> Any:
        stream = real_open(*given, **more)
        if not isinstance(stream, io.BufferedWriter):
            return stream
        return Halving(stream.detach())

    class Halving(io.BufferedWriter):
        def write(self, data: Any) -> int:
            super().write(data[: len(data) // 2])
            self.flush()
            before(next(numbers))
            return super().write(data[len(data) // 2 :])

    io.open = opened


class TestSignals:
    @pytest.mark.parametrize("trial", tiers(10, 200))
    def test_a_signal_saves_and_the_run_goes_on_in_the_same_bytes(
        self, layered: Layered, whole: training.Run, tmp_path: Path, trial: int
    ) -> None:
        rng, out = random.Random(trial), tmp_path / "cut"
        number = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP][trial % 4]
        stopped = 0
        for _ in range(20):
            child = in_child(lambda: start_or_resume(layered, out))
            if trial % 2:  # while it trains, evaluates or saves
                wait_for(lambda: lines(out / "events.jsonl") > 3, child)
            time.sleep(rng.uniform(0.02, 0.3))
            if not stopped:
                os.kill(child, number)
            code = ending(child)
            assert code in (0, 75, -number), "before the handlers stand, a signal ends the child as it always does"
            stopped += code == 75
            if code == 0:
                break
        assert stopped or trial % 2 == 0, "nothing was stopped"
        assert same(out, whole)
        FIGURES["runs stopped by a signal"] += stopped

    def test_a_terminal_that_is_closed(self, layered: Layered, whole: training.Run, tmp_path: Path) -> None:
        """SIGHUP and a stream that fails, both at once, as when a window is closed."""
        recipe, out = tmp_path / "recipe.toml", tmp_path / "cut"
        recipe.write_text(config.dump(layered), "utf-8")
        child, terminal = pty.fork()
        if child == 0:
            sys.argv = ["trimtab", "train", "--recipe", str(recipe), "--out", str(out)]
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
            try:
                cli.main()
            except SystemExit as end:
                os._exit(int(end.code or 0))
            finally:
                os._exit(99)
        seen = b""
        while b"epoch   1" not in seen:
            seen += os.read(terminal, 1_000)
        os.close(terminal)
        assert ending(child) == 75
        assert same(training.resume(out).path, whole)
        assert b'"resume"' in (out / "events.jsonl").read_bytes()

    def test_what_was_done_is_saved(self, layered: Layered, tmp_path: Path) -> None:
        """Without checkpoints by time: the signal's own is the only one."""
        recipe = layered.override({"train.save_every_s": 1_000.0}, "test")

        def stop(event: Any) -> None:
            if event["event"] == "progress" and event.get("step") == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(interrupts.Interrupted) as stopped:
            training.train(recipe, out=str(tmp_path / "cut"), observe=stop)
        assert (stopped.value.name, stopped.value.exit_code) == ("SIGTERM", 75)
        found, _ = checkpoint.newest(tmp_path / "cut" / "checkpoints")
        assert found is not None
        assert found.state["step"] == 4
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the handlers are those of before"

    def test_a_stop_that_cannot_be_saved_is_an_error(self, layered: Layered, tmp_path: Path, quick: None) -> None:
        recipe = layered.override({"train.save_every_s": 1_000.0}, "test")

        def stop(event: Any) -> None:
            if event["event"] == "progress" and event.get("step") == 4:
                (tmp_path / "cut" / "checkpoints").write_text("in the way", "utf-8")
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(ResourceError, match="step 4 cannot be written"):
            training.train(recipe, out=str(tmp_path / "cut"), observe=stop)

    def test_a_second_ctrl_c_ends_at_once(self) -> None:
        def work() -> None:
            with interrupts.heard(), interrupts.postponed():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(30)

        began = time.monotonic()
        assert ending(in_child(work)) == 130
        assert time.monotonic() - began < 10

    def test_what_is_ignored_stays_ignored(self) -> None:
        """As nohup ignores SIGHUP."""

        def work() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            with interrupts.heard():
                os.kill(os.getpid(), signal.SIGHUP)
                interrupts.check()

        assert ending(in_child(work)) == 0

    def test_before_anything_is_written_a_signal_is_obeyed_at_once(self) -> None:
        """A mirror that hangs, a large file: there is nothing to save."""

        def work() -> None:
            with interrupts.heard():
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(1)

        assert ending(in_child(work)) == 75


class TestOneWriter:
    def test_a_second_process_is_refused_and_names_the_first(self, layered: Layered, tmp_path: Path) -> None:
        out = tmp_path / "run"

        def hold(event: Any) -> None:
            if event["event"] == "start":
                time.sleep(60)

        child = in_child(lambda: start_or_resume(layered, out, hold))
        wait_for(lambda: (out / "events.jsonl").is_file(), child)
        with pytest.raises(ResourceError, match=f"Process {child} on "):
            training.resume(out)
        os.kill(child, signal.SIGKILL)
        ending(child)
        training.resume(out)  # the lock has ended with its process


class Disk:
    """Fails one call, the n-th of those that write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: int) -> None:
        self.number, self.at, self.failed = -1, at, ""
        for name in ("mkdir", "fsync", "rename"):
            monkeypatch.setattr(os, name, self.guarded(name, getattr(os, name), error))

    def guarded(self, name: str, call: Callable[..., Any], error: int) -> Callable[..., Any]:
        def guard(*given: Any, **more: Any) -> Any:
            self.number += 1
            if self.number == self.at:
                self.failed = name
                raise OSError(error, os.strerror(error), *(name for name in given[:1] if not isinstance(name, int)))
            return call(*given, **more)

        return guard


@contextmanager
def suppress_and_tell(told: list[str]) -> Iterator[None]:
    try:
        yield
    except ResourceError as failed:
        told.append(failed.what if failed.mend else "")


class TestDisk:
    @pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
    @pytest.mark.parametrize("at", [0, 3, 18, 51, 77, 110, 140, *later(range(1, 140, 5))])
    def test_a_write_that_fails_costs_a_warning_or_names_what_is_there(
        self, layered: Layered, whole: training.Run, tmp_path: Path, at: int, error: int
    ) -> None:
        out = tmp_path / "cut"
        told: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, error)
            with suppress_and_tell(told):
                training.train(layered, out=str(out), observe=lambda event: told.append(str(event.get("text", ""))))
        assert disk.failed, "no call was reached"
        assert any(os.strerror(error) in text for text in told), told
        assert same(start_or_resume(layered, out).path, whole)
        FIGURES["writes that failed"] += 1

    def test_a_real_disk_that_fills_up(
        self, layered: Layered, whole: training.Run, tmp_path: Path, small_disk: Path
    ) -> None:
        told: list[str] = []
        filler = small_disk / "filler"

        def fill(event: Any) -> None:
            told.append(str(event.get("text", "")))
            if event["event"] == "progress" and event.get("step") == 5:
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(4_096))

        with pytest.raises(ResourceError, match="No space left on device") as failed:
            training.train(layered, out=str(small_disk / "run"), observe=fill)
        assert failed.value.exit_code == 5
        assert sum("Training goes on" in text for text in told) > 3
        assert "checkpoints/step-000005" in failed.value.what or "checkpoints/step-000004" in failed.value.what
        filler.unlink()
        assert same(training.resume(small_disk / "run").path, whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", place], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


# -- lost power ------------------------------------------------------------------------------------------------


class Recorder:
    """What a process asked of the file system, in order, as operations on nodes (files and folders).

    After a loss of power a file holds what it held at its last fsync, or a part of it, or zeros; and an entry of a
    folder (a new name, a rename, a removal) may be lost unless that folder was flushed after it.
    """

    def __init__(self, root: Path, *, without_fsync: int = -1) -> None:
        self.root, self.without, self.flushes = root, without_fsync, 0
        self.node_at: dict[str, int] = {".": 0}
        self.contents: dict[int, bytes] = {}
        self.log: list[tuple[Any, ...]] = []
        """("add", folder, name, node), ("remove", folder, name), ("move", folder, name, folder, name),
        ("flush", node), and ("returned", step)."""

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        real = {name: getattr(os, name) for name in ("fsync", "rename", "mkdir", "unlink", "rmdir")}
        real_open = io.open

        def fsync(handle: int) -> None:
            real["fsync"](handle)
            self.flushes += 1
            if self.flushes - 1 != self.without:
                self.log.append(("flush", self.node_at[self.name(os.readlink(f"/proc/self/fd/{handle}"))]))

        def rename(source: Any, target: Any) -> None:
            for path in Path(source).iterdir():
                self.contents[self.node_at[self.name(path)]] = path.read_bytes()
            real["rename"](source, target)
            old, new = self.name(source), self.name(target)
            self.log.append(("move", *self.entry(old), *self.entry(new)))
            for path in [path for path in self.node_at if path == old or path.startswith(old + "/")]:
                self.node_at[new + path.removeprefix(old)] = self.node_at.pop(path)

        def mkdir(path: Any, mode: int = 0o777) -> None:
            real["mkdir"](path, mode)
            self.add(self.name(path))

        def opened(file: Any, mode: str = "r", *given: Any, **more: Any) -> Any:
            stream = real_open(file, mode, *given, **more)
            if "w" in mode:
                self.add(self.name(file))
            return stream

        def removed(name: str) -> Callable[..., None]:
            def remove(path: Any, *, dir_fd: int | None = None) -> None:
                folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
                where = self.name(os.path.join(folder, path))
                real[name](path, dir_fd=dir_fd)
                self.log.append(("remove", *self.entry(where)))

            return remove

        patch.setattr(io, "open", opened)
        for call in (fsync, rename, mkdir):
            patch.setattr(os, call.__name__, call)
        patch.setattr(os, "unlink", removed("unlink"))
        patch.setattr(os, "rmdir", removed("rmdir"))

    def name(self, path: Any) -> str:
        return os.path.relpath(path, self.root)

    def entry(self, name: str) -> tuple[int, str]:
        return self.node_at[os.path.dirname(name) or "."], os.path.basename(name)

    def add(self, name: str) -> None:
        self.node_at[name] = len(self.log) + 1
        self.log.append(("add", *self.entry(name), self.node_at[name]))

    def after_power_loss(self, at: int, rng: random.Random) -> dict[int, dict[str, int]]:
        """Folders as they may be found, entries by name, when the power goes after `at` operations."""
        folders: dict[int, dict[str, int]] = {0: {}}
        for number, (kind, *what) in enumerate(self.log[:at]):
            if kind not in ("add", "remove", "move"):
                continue
            safe = ("flush", what[0]) in self.log[number:at]
            if not safe and rng.random() < 0.5:
                continue
            entries = folders.setdefault(what[0], {})
            if kind == "add":
                entries[what[1]] = what[2]
            elif kind == "remove":
                entries.pop(what[1], None)
            elif what[1] in entries:
                folders.setdefault(what[2], {})[what[3]] = entries.pop(what[1])
        return folders

    def build(self, at: int, rng: random.Random, place: Path) -> None:
        """Writes one state after a loss of power to a real folder."""
        folders = self.after_power_loss(at, rng)

        def fill(folder: int, path: Path) -> None:
            path.mkdir()
            for name, node in folders.get(folder, {}).items():
                if node not in self.contents:
                    fill(node, path / name)
                    continue
                data = self.contents[node]
                if ("flush", node) not in self.log[:at]:
                    data = rng.choice([data, data[: rng.randrange(len(data))], bytes(len(data)), b""])
                (path / name).write_bytes(data)

        fill(0, place)


def recorded(place: Path, *, without_fsync: int = -1) -> Recorder:
    """Four saves into a folder that the first one makes, each followed by the removal of what is old."""
    place.mkdir()
    recorder = Recorder(place, without_fsync=without_fsync)
    with pytest.MonkeyPatch.context() as patch:
        recorder.watch(patch)
        for step in (1, 2, 3, 4):
            write(place / "checkpoints", step)
            recorder.log.append(("returned", step))
            checkpoint.prune(place / "checkpoints", best_step=-1)
    return recorder


def violations(recorder: Recorder, states: int, place: Path) -> list[str]:
    """States after a loss of power in which a save that had returned is gone, or something torn is believed."""
    found = []
    for trial in range(states):
        rng = random.Random(trial)
        at = rng.randrange(len(recorder.log) + 1)
        saved = max((what[0] for kind, *what in recorder.log[:at] if kind == "returned"), default=0)
        state = place / str(trial)
        recorder.build(at, rng, state)
        newest, _ = checkpoint.newest(state / "checkpoints")
        if newest is None:
            if saved:
                found.append(f"after {at} operations: step {saved} is gone")
            continue
        step = newest.state["step"]
        if step < saved or not bool((newest.tensors["weight"] == step).all()):
            found.append(f"after {at} operations: step {step}, and {saved} was saved")
    return found


class TestPower:
    @pytest.mark.parametrize("states", [200, *later([5_000])])
    def test_what_was_saved_is_there_and_nothing_torn_is_believed(self, tmp_path: Path, states: int) -> None:
        recorder = recorded(tmp_path / "disk")
        (tmp_path / "states").mkdir()
        assert violations(recorder, states, tmp_path / "states") == []
        FIGURES["states after a loss of power"] += states

    @pytest.mark.parametrize("left_out", range(11))
    def test_no_fsync_of_a_save_can_be_left_out(self, tmp_path: Path, left_out: int) -> None:
        recorder = recorded(tmp_path / "disk", without_fsync=left_out)
        (tmp_path / "states").mkdir()
        assert recorder.flushes == 21
        assert violations(recorder, 200, tmp_path / "states")


class TestDamage:
    @pytest.mark.parametrize("times", [100, *later([1_000])])
    def test_bits_and_lengths_of_checkpoints(self, tmp_path: Path, times: int) -> None:
        rng = random.Random(0)
        write(tmp_path, 1)
        path = tmp_path / "step-000001"
        whole = {file: file.read_bytes() for file in sorted(path.iterdir())}
        FIGURES["spoilt files"] += times
        for _ in range(times):
            file = rng.choice(list(whole))
            file.write_bytes(spoilt(whole[file], rng))
            try:
                found = checkpoint.read(path)
            except ArtefactError:
                pass
            else:  # a bit of the manifest that decides nothing, such as a blank
                assert found.state == {"step": 1}
                assert bool((found.tensors["weight"] == 1).all())
                assert file.name == "manifest.json"
            file.write_bytes(whole[file])


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """One bit turned over, or the end cut off."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)
