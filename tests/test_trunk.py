"""The cached trunk: the same answers up to rounding, the same bytes found or made, and no damage believed."""

import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bases import WORDS, write_base
from conftest import reviews, write_csv
from test_fast import make_model
from test_training import contents, lasting, small

from trimtab import build, config, durable, estimate, forward, training, trunk
from trimtab.classification import compute_logits, loss_sum
from trimtab.config import MINILM, Layered
from trimtab.errors import RecipeError, ResourceError
from trimtab.fast import encoder
from trimtab.fast.encoder import LAYOUTS, Stored
from trimtab.resolve import resolve

pytestmark = pytest.mark.usefixtures("quick", "cache")

# Largest difference of a logit between a trunk in bfloat16 and one in float32, as a share of the largest logit: MiniLM
# with LoRA at work on its top two layers. Read once, by hand: 0.0011. docs/guarantees.md states the bound.
ROUNDING = 0.005


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "trimtab" / "trunk"


@pytest.fixture
def layered(bert: Path, tmp_path: Path) -> Layered:
    rows = write_csv(tmp_path / "rows.csv", reviews(96))
    return small(rows, bert, base__dropout=0.0, lora__layers="top:1", train__save_every_s=1e-9)


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def of_kind(events: list[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [event for event in events if event["event"] == kind]


def same(run: training.Run, other: training.Run) -> bool:
    return (
        contents(run.adapter) == contents(other.adapter)
        and all(
            (run.path / name).read_bytes() == (other.path / name).read_bytes()
            for name in ("predictions.parquet", "environment.json", "recipe.toml")
        )
        and lasting(run.metrics) == lasting(other.metrics)
    )


class TestForward:
    @pytest.mark.parametrize("kind", LAYOUTS)
    @pytest.mark.parametrize("lora_dropout", [0.0, 0.25])
    def test_exact_states_give_the_same_logits_and_gradients(
        self, tmp_path: Path, kind: str, lora_dropout: float
    ) -> None:
        """With states that bfloat16 does not round, beginning above them changes nothing."""
        model, texts = make_model(write_base(tmp_path / kind, kind), lora_dropout=lora_dropout, layers="top:1")
        built = encoder.of_peft_model(model)
        rows = np.array([3, 0, 5, 2])
        whole = encoder.pack(texts.ids, texts.offsets, np.arange(len(texts)))
        with torch.no_grad():
            x = encoder._embed(built.embeddings, whole, None, built.workspace)
            exact, _ = encoder._layers(built, x, range(1), whole, None, keeps=False)
        states = torch.cat([exact[whole.first[place] :][: texts.lengths[i]] for i, place in enumerate(whole.order)])
        outcomes = []
        for run in (forward.fast(built), forward.fast(built, [(texts, Stored(states.clone(), 1))])):
            model.zero_grad()
            logits = run(texts, rows, 7)
            loss_sum(logits, torch.arange(4) % 3).backward()
            outcomes.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert len(outcomes[0]) == len(outcomes[1]) > 8
        for computed, read in zip(*outcomes, strict=True):
            torch.testing.assert_close(read, computed, rtol=1e-5, atol=1e-6)

    def test_what_is_kept_stands_in_the_order_of_the_texts(self, bert: Path) -> None:
        model, texts = make_model(bert, layers="top:1")
        built = encoder.of_peft_model(model)
        together, alone = (
            torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.bfloat16).view(len(texts.ids), -1).float()
            for pieces in (trunk.compute(built, texts, 1), trunk.compute(built, texts, 1, most_tokens=1))
        )
        torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-2)
        assert (together[:4] - together[4:8]).abs().max() > 0.1, "states differ from token to token"

    def test_a_layer_with_lora_cannot_be_skipped(self, bert: Path) -> None:
        model, texts = make_model(bert)
        built = encoder.of_peft_model(model)
        states = torch.zeros(len(texts.ids), 32, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="LoRA stands beside layer 0"):
            forward.fast(built, [(texts, Stored(states, 1))])(texts, np.array([0]))

    def test_the_rounding_is_bounded_on_a_real_model(self, tmp_path: Path) -> None:
        rows = [(" ".join(WORDS[i % 40 : i % 40 + 3 + i % 20]), "ab"[i % 2]) for i in range(48)]
        settings = {"lora__layers": "top:2", "base__dropout": 0.0}
        ready = build.make_ready(resolve(small(write_csv(tmp_path / "rows.csv", rows), Path(MINILM), **settings)))
        assert (ready.trunk.depth, ready.trunk.layers) == (4, 6)
        for name, parameter in ready.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
            if name.endswith("classifier.modules_to_save.default.weight"):
                torch.nn.init.normal_(parameter, std=0.8)
        read = build.with_trunk(ready, lambda event: None)
        exact = compute_logits(ready.engine.forward, ready.job.train.encoded)
        rounded = compute_logits(read.forward, ready.job.train.encoded)
        largest = np.abs(exact).max()
        assert largest > 1
        assert 0 < np.abs(exact - rounded).max() < ROUNDING * largest
        assert np.array_equal(rounded, compute_logits(read.forward, ready.job.train.encoded))


class TestBytes:
    def test_found_or_made_or_resumed_it_is_the_same_run(self, layered: Layered, cache: Path, tmp_path: Path) -> None:
        events: list[Mapping[str, Any]] = []
        made = training.train(layered, out=str(tmp_path / "a"), observe=events.append)
        (announced,) = of_kind(events, "trunk")
        size = sum((entry / "states.bin").stat().st_size for entry in entries(cache))
        assert announced["bytes_written"] == announced["bytes"] == size > 0
        assert len(entries(cache)) == 2
        assert events.index(announced) < events.index(of_kind(events, "start")[0])
        assert "the lower 1 of 2 layers from the cache" in of_kind(events, "start")[0]["placement"]
        assert json.loads((made.path / "environment.json").read_bytes())["trunk"] == "lower 1 of 2 layers cached"
        assert config.load_recipe(str(made.path)).recipe.runtime.trunk_cache == "on"

        events.clear()
        found = training.train(layered, out=str(tmp_path / "b"), observe=events.append)
        assert of_kind(events, "trunk")[0]["bytes_written"] == 0
        assert same(found, made)

        def stop(event: Mapping[str, Any]) -> None:
            if event["event"] == "progress" and event.get("step") == 7:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.train(layered, out=str(tmp_path / "c"), observe=stop)
        shutil.rmtree(cache)
        assert same(training.resume(tmp_path / "c"), made)

        repeated = training.train(config.load_recipe(str(made.path)), out=str(tmp_path / "d"))
        assert contents(repeated.adapter) == contents(made.adapter)

        computed = training.train(
            layered.override({"runtime.trunk_cache": "off"}, "test"), out=str(tmp_path / "e"), observe=events.append
        )
        assert contents(computed.adapter) != contents(made.adapter), "the kept states were not read"

    def test_stored_answers_are_those_of_the_adapter_in_use(self, layered: Layered, tmp_path: Path) -> None:
        """What a fresh process computes, without kept states, is compared with it to 1e-4."""
        run = training.train(layered, out=str(tmp_path / "run"))
        assert training.evaluation.verify(run.path).ok

    def test_rates_and_seeds_share_entries_and_other_rows_do_not(self, layered: Layered, cache: Path) -> None:
        def names(**settings: Any) -> set[str]:
            values = {key.replace("__", "."): value for key, value in settings.items()}
            ready = build.make_ready(resolve(layered.override(values, "test")))
            return {entry.name for entry in ready.trunk.entries}

        ours = names()
        assert len(ours) == 2
        assert names(train__seed=7, train__learning_rate=1e-4, lora__r=2, lora__target_modules="query-value") == ours
        for other in ({"data__seed": 7}, {"data__max_length": 9}, {"data__limit_train": 40}):
            assert names(**other) != ours
        assert not names(runtime__threads=2) & ours


class TestChoice:
    def choose(self, layered: Layered, **settings: Any) -> trunk.Trunk:
        values = {key.replace("__", "."): value for key, value in settings.items()}
        return build.make_ready(resolve(layered.override(values, "test"))).trunk

    @pytest.mark.parametrize(
        ("settings", "reason", "settled"),
        [
            ({"lora__layers": "all"}, "beside the lowest layer", "auto"),
            ({"base__dropout": 0.1}, "base.dropout", "auto"),
            ({"runtime__fast": "off"}, "stock forward", "auto"),
            ({"train__num_epochs": 1}, "1 epoch", "off"),
            ({"runtime__trunk_cache_gb": 1e-5}, "trunk_cache_gb", "off"),
            ({"runtime__trunk_cache": "off"}, "as the recipe says", "off"),
        ],
    )
    def test_auto_keeps_nothing_where_it_cannot_be_or_would_not_pay(
        self, layered: Layered, cache: Path, settings: dict[str, Any], reason: str, settled: str
    ) -> None:
        found = self.choose(layered, **settings)
        assert (found.depth, found.settled) == (0, settled)
        assert reason in found.reason
        assert bool(found.line) == ("lora__layers" not in settings)
        assert not cache.exists()

    @pytest.mark.parametrize(
        ("settings", "error"),
        [
            ({"lora__layers": "all"}, RecipeError),
            ({"base__dropout": 0.1}, RecipeError),
            ({"runtime__fast": "off"}, RecipeError),
            ({"runtime__trunk_cache_gb": 1e-5}, ResourceError),
        ],
    )
    def test_on_is_refused_before_the_first_step(
        self, layered: Layered, cache: Path, tmp_path: Path, settings: dict[str, Any], error: type[Exception]
    ) -> None:
        values = {key.replace("__", "."): value for key, value in settings.items()}
        with pytest.raises(error, match="cannot be kept"):
            training.train(layered.override({"runtime.trunk_cache": "on", **values}, "test"), out=str(tmp_path / "run"))
        assert not cache.exists()
        assert not (tmp_path / "run").exists()

    def test_the_way_out_is_that_of_what_is_short(
        self, layered: Layered, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on = {"runtime__trunk_cache": "on"}
        with pytest.raises(ResourceError) as too_large:
            self.choose(layered, **on, runtime__trunk_cache_gb=1e-5)
        assert "--set runtime.trunk_cache_gb=" in too_large.value.mend
        monkeypatch.setattr("trimtab.trunk.shutil.disk_usage", lambda place: SimpleNamespace(free=1 << 20))
        with pytest.raises(ResourceError) as full:
            self.choose(layered, **on)
        assert full.value.mend.startswith("make room, or another volume: XDG_CACHE_HOME=DIR")

    def test_on_keeps_them_for_a_single_epoch(self, layered: Layered) -> None:
        assert self.choose(layered, train__num_epochs=1, runtime__trunk_cache="on").depth == 1

    def test_a_disk_without_room_is_told_and_the_run_goes_on(
        self, layered: Layered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        free = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(trunk.shutil, "disk_usage", lambda path: free._replace(free=1 << 30))
        events: list[Mapping[str, Any]] = []
        run = training.train(layered, out=str(tmp_path / "run"), observe=events.append)
        assert "would leave less than" in of_kind(events, "start")[0]["placement"]
        assert config.load_recipe(str(run.path)).recipe.runtime.trunk_cache == "off"
        assert of_kind(events, "trunk") == []

    def test_a_disk_that_fails_while_it_is_written(
        self, layered: Layered, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: Path, pieces: object) -> None:
            if path.name == "states.bin":
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device", str(path))

        monkeypatch.setattr(durable, "write_pieces", full)
        ready = build.make_ready(resolve(layered))
        went_on = build.with_trunk(ready, lambda event: None)
        assert went_on.forward is ready.engine.forward
        assert "No space left" in went_on.trunk.reason
        assert went_on.job.recipe.runtime.trunk_cache == "off"
        assert list(cache.iterdir()) == []
        with pytest.raises(ResourceError, match="No space left"):
            build.with_trunk(
                build.make_ready(resolve(layered.override({"runtime.trunk_cache": "on"}, "test"))),
                lambda event: None,
            )

    def test_a_used_out_is_refused_before_anything_is_kept(self, layered: Layered, cache: Path, tmp_path: Path) -> None:
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "file").touch()
        with pytest.raises(RecipeError, match="not empty"):
            training.train(layered, out=str(tmp_path / "used"))
        assert not cache.exists()

    def test_the_estimate_counts_what_is_computed_once(self, layered: Layered, tmp_path: Path) -> None:
        before = training.plan(layered)
        assert before.speed.trunk_seconds > 0
        assert before.estimate.trunk_seconds > 0
        assert "from the cache" in before.as_dict()["on"]
        build.with_trunk(before.ready, lambda event: None)
        assert training.plan(layered).estimate.trunk_seconds == 0
        assert training.plan(layered.override({"lora.layers": "all"}, "test")).speed.trunk_seconds == 0

    def test_a_budget_pays_for_it_too(self) -> None:
        found = estimate.Estimate(3, 300, 100.0, 10.0, 0.0, 10**9, 10**9, 10**10, trunk_seconds=100.0)
        assert estimate.within(500, found, 1_000, 100) == {}
        assert estimate.within(400, found, 1_000, 100) == {"train.num_epochs": 2}
        values = estimate.within(200, found, 1_000, 100)
        rows = values["data.limit_train"]
        assert isinstance(rows, int)
        assert 0.9 * 200 < rows / 1_000 * (2 * 100 + 100) + 2 * 10 <= 200


class TestFolder:
    def load(self, layered: Layered) -> tuple[list[Mapping[str, Any]], Any]:
        events: list[Mapping[str, Any]] = []
        ready = build.with_trunk(build.make_ready(resolve(layered)), events.append)
        return events, compute_logits(ready.forward, ready.job.train.encoded)

    @pytest.mark.parametrize("damage", ["bit", "half", "no states", "no manifest", "no sum", "other rows", "list"])
    def test_damage_is_noticed_and_made_anew(self, layered: Layered, cache: Path, damage: str) -> None:
        _, good = self.load(layered)
        before = {path.name: contents(path) for path in entries(cache)}
        for path in entries(cache):
            states, manifest = path / "states.bin", path / "manifest.json"
            raw = bytearray(states.read_bytes())
            raw[len(raw) // 2] ^= 1
            {
                "bit": lambda states=states, raw=raw: states.write_bytes(raw),
                "half": lambda states=states, raw=raw: states.write_bytes(raw[: len(raw) // 2]),
                "no states": states.unlink,
                "no manifest": manifest.unlink,
                "no sum": lambda manifest=manifest: manifest.write_text("{}"),
                "other rows": lambda manifest=manifest: manifest.write_text(
                    json.dumps(json.loads(manifest.read_text("utf-8")) | {"of": {}})
                ),
                "list": lambda manifest=manifest: manifest.write_text("[1]"),
            }[damage]()
        events, again = self.load(layered)
        assert len(of_kind(events, "warning")) == 2
        assert np.array_equal(again, good)
        assert {path.name: contents(path) for path in entries(cache)} == before

    def test_the_longest_unused_goes_first_and_never_ones_own(self, layered: Layered, cache: Path) -> None:
        def other(seed: int) -> Layered:
            return layered.override({"data.seed": seed}, "test")

        self.load(other(1))
        first = set(entries(cache))
        self.load(other(2))
        second = set(entries(cache)) - first
        for age, path in enumerate([*second, *first]):  # the first were used last
            os.utime(path / "manifest.json", (10_000 + age, 10_000 + age))
        one = max(sum((path / "states.bin").stat().st_size for path in part) for part in (first, second))
        self.load(other(3).override({"runtime.trunk_cache_gb": 2.2 * one / 1e9}, "test"))
        assert first < set(entries(cache))
        assert not second <= set(entries(cache))
        for _ in range(2):
            self.load(other(4).override({"runtime.trunk_cache_gb": 1.1 * one / 1e9}, "test"))
            mine = entries(cache)
            assert len(mine) == 2
            shutil.rmtree(mine[0])
            os.utime(mine[1] / "manifest.json", (10_000, 10_000))

    def test_what_a_killed_process_left_is_swept_and_what_is_being_written_stays(
        self, layered: Layered, cache: Path
    ) -> None:
        for name, age in ((".draft-old", 7_200), (".draft-new", 0), (".trash-old", 7_200)):
            (cache / name).mkdir(parents=True)
            (cache / name / "states.bin").write_bytes(b"x")
            for path in (cache / name / "states.bin", cache / name):
                os.utime(path, (time.time() - age, time.time() - age))
        self.load(layered)
        assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == [".draft-new"]

    def test_two_at_once_make_the_same(self, layered: Layered, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both have seen that nothing is there before either writes."""
        ready = [build.make_ready(resolve(layered)) for _ in range(2)]
        both, write = threading.Barrier(2), durable.write_pieces

        def together(path: Path, pieces: Any) -> None:
            if path.name == "states.bin":
                both.wait(20)
            write(path, pieces)

        monkeypatch.setattr(durable, "write_pieces", together)
        found: dict[int, Any] = {}

        def work(number: int) -> None:
            with_trunk = build.with_trunk(ready[number], lambda event: None)
            found[number] = compute_logits(with_trunk.forward, with_trunk.job.train.encoded)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert np.array_equal(found[0], found[1])
        assert len(list(cache.iterdir())) == 2

    def test_a_stop_leaves_no_half_entry(self, layered: Layered, cache: Path) -> None:
        def stop(event: Mapping[str, Any]) -> None:
            if "kept" in event:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build.with_trunk(build.make_ready(resolve(layered)), stop)
        assert list(cache.iterdir()) == []
