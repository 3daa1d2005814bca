"""Serving: many adapters on one base, against peft and LateFuse, and against itself under load.

    pip install --no-deps latefuse==0.1.0        # it asks for transformers 4, and runs under 5
    python benchmarks/serving.py [--rounds 3] [--parts peft,latefuse,...] [--keep DIR]

Model: all-MiniLM-L6-v2; adapters written by peft with random A, B and answer layers, r=8 on query and value; texts:
rotten_tomatoes sentences (short) and IMDB reviews cut at 256 tokens (long). Every side answers the same texts,
tokenizing included, once a round, in one process, one after another in an order that turns from round to round; ratios
are taken within a round and their median counts. A side whose logits are not those of peft alone is not timed. A part
is written as soon as it is done: benchmarks/results/serving-KIND.json. Needs the extras `demo` and `serve`.
"""

import argparse
import asyncio
import http.client
import itertools
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow.parquet as pq
import torch
from evidence import rotten
from peft import LoraConfig, PeftModel, get_peft_model
from record import commit, kind, read, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from trimtab import adopt, demo, hub, predict, tokens
from trimtab.config import MINILM, RuntimeSettings
from trimtab.device import place
from trimtab.fast import blocked, mixed
from trimtab.fast.blocked import Blocked
from trimtab.fast.encoder import Encoder
from trimtab.serving.base import load_base
from trimtab.serving.engine import Engine
from trimtab.serving.service import Item, Service
from trimtab.serving.store import Store
from trimtab.tokens import Encoded

DISTINCT = 100  # adapters with numbers of their own
RESIDENT = 10_000
TEXTS = 1_024  # of a timed pass
OVERLOAD_S = 60.0
ANSWERS = 100_000  # while adapters are replaced
CUT = 256
REQUEST = 32
AT_ONCE = TEXTS // REQUEST  # requests under way beside a side that is handed all texts at once


# -- adapters and texts --------------------------------------------------------------------------------------------


def adapters(keep: Path, base: str, cut: int = CUT) -> list[tuple[Path, Path]]:
    """For each of the distinct adapters: peft's folder and ours, made now unless they were before."""
    home = keep / ("ours" if cut == CUT else f"ours-{cut}")
    for i in range(DISTINCT):
        theirs, ours = keep / "peft" / f"a{i:03}", home / f"a{i:03}"
        if ours.is_dir():
            continue
        torch.manual_seed(i)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        config = LoraConfig(
            task_type="SEQ_CLS", r=8, lora_alpha=32, target_modules=["query", "value"], init_lora_weights=False
        )
        shutil.rmtree(theirs, ignore_errors=True)
        get_peft_model(model, config).save_pretrained(theirs)
        adopt.adopt(theirs, ours, names="neg,pos", base=base, max_length=cut)
    return [(keep / "peft" / f"a{i:03}", home / f"a{i:03}") for i in range(DISTINCT)]


def texts(keep: Path) -> dict[str, list[str]]:
    """Short and long texts, in an order that is always the same."""
    long = pq.read_table(demo.prepare(keep)[0])["text"].to_pylist()
    return {"short": [text.strip() for text, _ in rotten(keep)[0]], "long": long}


# -- ours ----------------------------------------------------------------------------------------------------------


class Ours:
    """The server's own parts without HTTP: requests of 32 texts.

    Args:
        base: The base.
        folders: The adapters by name.
        under_way: Requests at a time: as many as a busy server has, or all, beside a side that is handed all at once.
        budget: Bytes of adapters in memory.
        compute: Rows -> logits, in place of `mixed.logits`.
    """

    def __init__(
        self,
        base: str,
        folders: dict[str, Path],
        *,
        under_way: int = 8,
        budget: int = 8 << 30,
        compute: Callable[..., list[torch.Tensor]] = mixed.logits,
    ) -> None:
        self.under_way = under_way
        settings = RuntimeSettings()
        placement = place(settings)
        found = hub.find_base(base)
        self.store = Store(load_base(found, tokens.from_base(found.folder), settings), budget)
        for name, folder in folders.items():
            self.store.register(name, folder)
        self.service = Service(self.store, Engine(self.store.served, workers=placement.threads, compute=compute))

    def load_all(self) -> None:
        """Every adapter into memory."""
        for name in self.store.names():
            self.store.release(self.store.hold(name).result())

    def __call__(self, items: Sequence[Item]) -> list[np.ndarray]:
        """Logits of items, in their order."""

        async def run() -> list[np.ndarray]:
            room = asyncio.Semaphore(self.under_way)

            async def one(part: Sequence[Item]) -> list[np.ndarray]:
                async with room:
                    answers, _ = await self.service.answer(part)
                    return [answer.logits for answer in answers]

            parts = [items[i : i + REQUEST] for i in range(0, len(items), REQUEST)]
            return [row for found in await asyncio.gather(*map(one, parts)) for row in found]

        return asyncio.run(run())

    def close(self) -> None:
        """Ends its threads."""
        self.service.close(60)


def merged_into(classifier: predict.Classifier) -> Callable[..., list[torch.Tensor]]:
    """What the server would compute if its base were this merged model, and no adapter stood beside it."""
    whole = classifier.engine.encoder
    assert whole is not None
    alone = mixed.Beside(mixed.Form(0, ()), torch.empty(0), whole.head)

    def compute(encoder: Encoder, ids: Any, offsets: Any, adapters: Sequence[Any], costs: mixed.Costs) -> Any:
        merged = replace(whole, workspace=encoder.workspace)
        return mixed.logits(merged, ids, offsets, [alone] * len(adapters), costs)

    return compute


# -- the others ----------------------------------------------------------------------------------------------------


class Peft:
    """All adapters in one peft model."""

    def __init__(self, base: str, folders: Sequence[Path]) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        self.model = PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
        for folder in folders[1:]:
            self.model.load_adapter(folder, adapter_name=folder.name)
        self.model.eval()
        self.tokenizer = AutoTokenizer.from_pretrained(base)

    def _run(self, batch: Sequence[str]) -> np.ndarray:
        encoded = self.tokenizer(list(batch), truncation=True, max_length=CUT, padding=True, return_tensors="pt")
        with torch.inference_mode():
            return self.model(**encoded).logits.numpy()

    def one_by_one(self, items: Sequence[Item]) -> list[np.ndarray]:
        """set_adapter before every text."""
        found = []
        for item in items:
            self.model.set_adapter(item.adapter)
            found.append(self._run([item.text])[0])
        return found

    def grouped(self, items: Sequence[Item]) -> list[np.ndarray]:
        """Texts sorted by adapter, one set_adapter for each, batches of at most 32."""
        found: dict[int, np.ndarray] = {}
        order = sorted(range(len(items)), key=lambda i: items[i].adapter)
        for name, rows in itertools.groupby(order, key=lambda i: items[i].adapter):
            self.model.set_adapter(name)
            mine = list(rows)
            for start in range(0, len(mine), REQUEST):
                part = mine[start : start + REQUEST]
                found |= dict(zip(part, self._run([items[i].text for i in part]), strict=True))
        return [found[i] for i in range(len(items))]


def latefuse_side(base: str, folders: Sequence[Path], *, tuned: bool, length: int) -> Callable[..., list[np.ndarray]]:
    """LateFuse as documented (batches of 32 x 128), or cut to the longest text and with its faster assembler."""
    from latefuse import MultiTenantClassifier
    from safetensors.torch import load_file, save_file

    options: dict[str, Any] = {"batch_size": 32, "max_seq_len": length, "assembler": "index_select"} if tuned else {}
    side = MultiTenantClassifier.from_pretrained(base, **options)
    for folder in folders:
        tensors = load_file(folder / "adapter_model.safetensors")
        with tempfile.TemporaryDirectory() as place_:
            # It expects other names than peft writes for classifiers, and takes the answer layer apart.
            renamed = {k.replace("base_model.model.bert.", "base_model.model."): v for k, v in tensors.items()}
            shutil.copy(folder / "adapter_config.json", place_)
            save_file({k: v for k, v in renamed.items() if "lora" in k}, Path(place_) / "adapter_model.safetensors")
            side.register_adapter(folder.name, place_)
        side.heads.load(folder.name, *(tensors[f"base_model.model.classifier.{part}"] for part in ("weight", "bias")))

    def run(items: Sequence[Item]) -> list[np.ndarray]:
        found = side.logits([item.text for item in items], [item.adapter for item in items])
        return [np.array(row, np.float32) for row in found]

    return run


# -- timing --------------------------------------------------------------------------------------------------------


def race(sides: dict[str, tuple[Callable[..., Any], Sequence[Item]]], rounds: int) -> dict[str, list[float]]:
    """Texts a second of each side in each round, after one that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run, items = sides[name]
            begin = time.perf_counter()
            run(items if turn else items[: max(1, len(items) // 4)])
            if turn:
                rates[name].append(len(items) / (time.perf_counter() - begin))
    return rates


def ratio(rates: dict[str, list[float]], ours: str, theirs: str) -> float:
    """The median of the ratios within rounds."""
    return statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))


def difference(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def spread(texts_: Sequence[str], names: Sequence[str], count: int, seed: int = 0) -> list[Item]:
    """Texts with adapters drawn evenly."""
    rng = np.random.default_rng(seed)
    return [Item(str(rng.choice(names)), texts_[i % len(texts_)]) for i in range(count)]


def product_rate() -> float:
    """FLOP/s of plain products of a batch's shape, each core computing its own, as the server does."""
    x, w, bias, times = torch.randn(1_024, 384), torch.randn(1_536, 384), torch.zeros(1_536), 60
    kept = Blocked(w) if blocked.pays(torch.float32) else None

    def work() -> None:
        torch.set_num_threads(1)  # holds for this thread
        for _ in range(times):
            torch.addmm(bias, x, w.t()) if kept is None else kept.product(x, bias)

    threads = [threading.Thread(target=work) for _ in range(place(RuntimeSettings()).threads)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(threads) * times * 2 * 1_024 * 1_536 * 384 / (time.perf_counter() - begin)


def needed_flops(encoded: Encoded) -> float:
    """The products of MiniLM's own weights for some texts: the last layer for first tokens only."""
    tokens_, width, inner, layers = len(encoded.ids), 384, 1_536, 6
    whole = 8 * width * width + 4 * width * inner
    return float(((layers - 1) * tokens_ + len(encoded)) * whole)


# -- the parts -------------------------------------------------------------------------------------------------------


def against_peft(keep: Path, base: str, rounds: int) -> dict[str, Any]:
    folders = adapters(keep, base)
    short = texts(keep)["short"]
    names = [ours.name for _, ours in folders]
    ours = Ours(base, {folder.name: folder for _, folder in folders}, under_way=AT_ONCE)
    theirs = Peft(base, [one for one, _ in folders])
    ours.load_all()
    check = spread(short, names, 64)
    exact = theirs.one_by_one(check)
    parity = difference(ours(check), exact)
    assert parity < 1e-4, parity
    assert difference(theirs.grouped(check), exact) < 1e-4
    few, many = spread(short, names, TEXTS // 8), spread(short, names, TEXTS)
    rates = race({"ours": (ours, many), "one": (theirs.one_by_one, few), "grouped": (theirs.grouped, many)}, rounds)
    encoded = tokens.encode([item.text for item in many], tokens.from_base(Path(base)), CUT)
    shares = []
    for _ in range(rounds):
        before = product_rate()
        begin = time.perf_counter()
        ours(many)
        took = time.perf_counter() - begin
        shares.append(needed_flops(encoded) / took / statistics.mean((before, product_rate())))
    ours.close()
    return {
        "texts_per_s": rates,
        "largest_difference": parity,
        "share_of_product_rate": shares,
        "ratios": {
            "100 adapters, short texts, against set_adapter for each": ratio(rates, "ours", "one"),
            "100 adapters, short texts, against peft grouped by adapter": ratio(rates, "ours", "grouped"),
            "the base's own products of ours, share of the plain product rate": statistics.median(shares),
        },
    }


def against_latefuse(keep: Path, base: str, rounds: int) -> dict[str, Any]:
    """As documented it cuts texts at 128 tokens, and so do we beside it; tuned, both see up to 256."""
    folders, all_texts = adapters(keep, base), texts(keep)
    names = [ours.name for _, ours in folders]
    ours = Ours(base, {folder.name: folder for _, folder in folders}, under_way=AT_ONCE)
    ours_cut = Ours(base, {folder.name: folder for _, folder in adapters(keep, base, 128)}, under_way=AT_ONCE)
    ours.load_all()
    ours_cut.load_all()
    theirs = [one for one, _ in folders]
    documented = latefuse_side(base, theirs, tuned=False, length=128)
    found: dict[str, Any] = {"ratios": {}}
    # The longest short text has fewer than 96 tokens.
    for what, count, length in (("short", TEXTS // 2, 96), ("long", TEXTS // 8, CUT)):
        tuned = latefuse_side(base, theirs, tuned=True, length=length)
        items = spread(all_texts[what], names, count)
        parity = {
            "tuned": difference(tuned(items[:32]), ours(items[:32])),
            "documented": difference(documented(items[:32]), ours_cut(items[:32])),
        }
        assert max(parity.values()) < 1e-4, parity
        sides = {"ours": ours, "tuned": tuned, "ours, cut at 128": ours_cut, "documented": documented}
        rates = race({name: (side, items) for name, side in sides.items()}, rounds)
        found[what] = {"texts_per_s": rates, "largest_difference": parity}
        found["ratios"] |= {
            f"{what} texts, against LateFuse as documented": ratio(rates, "ours, cut at 128", "documented"),
            f"{what} texts, against LateFuse tuned": ratio(rates, "ours", "tuned"),
        }
    single: dict[str, list[float]] = {"ours": [], "documented": []}
    for i in range(20 * rounds):
        item = spread(all_texts["short"], names, 1, seed=i)
        for name, run in (("ours", ours), ("documented", documented)):
            begin = time.perf_counter()
            run(item)
            single[name].append(time.perf_counter() - begin)
    found["single_text_s"] = {name: statistics.median(times) for name, times in single.items()}
    found["ratios"]["one short text, latency against LateFuse as documented"] = (
        found["single_text_s"]["documented"] / found["single_text_s"]["ours"]
    )
    ours.close()
    ours_cut.close()
    return found


def latencies(ours: Ours, items: Sequence[Item], size: int = REQUEST) -> list[float]:
    """Seconds of requests that follow one another."""
    times = []
    for i in range(0, len(items), size):
        begin = time.perf_counter()
        ours(items[i : i + size])
        times.append(time.perf_counter() - begin)
    return times


def resident(keep: Path, base: str, rounds: int) -> dict[str, Any]:
    """10,000 adapters in memory against 32, and 32 in a batch against one that is merged into the weights.

    The merged model is served in the same way, and, handed all texts at once, predicts by itself.
    """
    folders, short = adapters(keep, base), texts(keep)["short"]
    few = Ours(base, {f"x{i:05}": folders[i][1] for i in range(32)})
    few.load_all()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    many = Ours(base, {f"x{i:05}": folders[i % DISTINCT][1] for i in range(RESIDENT)})
    begin = time.perf_counter()
    many.load_all()
    loaded = time.perf_counter() - begin
    grown = 1_024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    adapter = many.store.hold("x00000").result()
    tensors = sum(t.numel() * 4 for t in _tensors(folders[0][1]))
    merged = predict.load(folders[0][1])
    served_alone = Ours(base, {"x00000": folders[0][1]}, compute=merged_into(merged))
    at_once = Ours(base, {f"x{i:05}": folders[i][1] for i in range(32)}, under_way=AT_ONCE)
    served_alone.load_all()
    at_once.load_all()
    rng = np.random.default_rng(0)
    # The same 32 adapters in every request, spread over all that are in memory.
    drawn = [f"x{i:05}" for i in range(32)]
    spread_out = [f"x{i:05}" for i in sorted(rng.permutation(RESIDENT)[:32])]
    count = TEXTS
    same = [Item(drawn[i % 32], short[i]) for i in range(count)]
    far = [Item(spread_out[i % 32], short[i]) for i in range(count)]
    any_ = [Item(f"x{int(rng.integers(RESIDENT)):05}", short[i]) for i in range(count)]
    lone = [Item(drawn[0], short[i]) for i in range(count)]
    parity = difference(served_alone(lone[:64]), few(lone[:64]))
    assert parity < 1e-4, parity
    rates = race(
        {
            "32 of 32": (few, same),
            "32 of 10,000": (many, far),
            "any of 10,000": (many, any_),
            "one": (few, lone),
            "merged, served": (served_alone, lone),
            "32 of 32, all texts at once": (at_once, same),
            "merged, all texts at once": (
                lambda items: merged.logits(merged.encode([item.text for item in items])),
                lone,
            ),
        },
        rounds,
    )
    p99: dict[str, list[float]] = {"32 of 32": [], "32 of 10,000": []}
    for _ in range(rounds):
        p99["32 of 32"].append(float(np.percentile(latencies(few, same), 99)))
        p99["32 of 10,000"].append(float(np.percentile(latencies(many, far), 99)))
    for side in (few, many, served_alone, at_once):
        side.close()
    return {
        "texts_per_s": rates,
        "p99_s": p99,
        "load_10_000_s": loaded,
        "bytes_per_adapter": adapter.bytes,
        "tensor_bytes": tensors,
        "peak_grown_bytes": grown,
        "ratios": {
            "throughput, 10,000 in memory against 32, the same 32 in a request": ratio(
                rates, "32 of 10,000", "32 of 32"
            ),
            "p99, 10,000 in memory against 32": statistics.median(
                a / b for a, b in zip(p99["32 of 10,000"], p99["32 of 32"], strict=True)
            ),
            "throughput, 32 adapters in a request against one merged model, both served": ratio(
                rates, "32 of 32", "merged, served"
            ),
            "throughput, 32 adapters in a request against one merged model that predicts, both handed all texts": ratio(
                rates, "32 of 32, all texts at once", "merged, all texts at once"
            ),
            "memory of an adapter, of its tensors": adapter.bytes / tensors,
            "memory that the process grew for 10,000, of their tensors": grown / (RESIDENT * tensors),
        },
    }


def _tensors(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(folder / "adapter_model.safetensors").values())


class Server:
    """`trimtab serve` as a process of its own."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trimtab", "serve", "--port", "0", *arguments], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("ready"):
                self.url = line.split()[1]
                break
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def connect(self) -> http.client.HTTPConnection:
        """A connection of its own."""
        return http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=120)

    def stop(self) -> int:
        """Asks it to stop; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def post(connection: http.client.HTTPConnection, items: Sequence[Item]) -> tuple[int, Any, Any]:
    """Status, body and headers of a request."""
    body = {"inputs": [[item.text] for item in items], "models": [item.adapter for item in items]}
    connection.request("POST", "/predict", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    return response.status, json.loads(data), response.headers


def over_http(server: Server, *, size: int = REQUEST, connections: int = 8) -> Callable[[Sequence[Item]], None]:
    """Requests of `size` texts over some connections, each sending its next one when it has an answer."""

    def run(items: Sequence[Item]) -> None:
        parts = iter([items[i : i + size] for i in range(0, len(items), size)])
        lock = threading.Lock()

        def work() -> None:
            connection = server.connect()
            while True:
                with lock:
                    part = next(parts, None)
                if part is None:
                    return
                status, _, _ = post(connection, part)
                assert status == 200, status

        threads = [threading.Thread(target=work) for _ in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def http_against_inside(keep: Path, base: str, rounds: int) -> dict[str, Any]:
    folders, short = adapters(keep, base), texts(keep)["short"]
    ours = Ours(base, {folder.name: folder for _, folder in folders})
    ours.load_all()
    server = Server("--adapter-dir", str(keep / "ours"))
    items = spread(short, [folder.name for _, folder in folders], TEXTS)
    over_http(server)(items)  # loads them
    rates = race({"http": (over_http(server), items), "inside": (ours, items)}, rounds)
    assert server.stop() == 0
    ours.close()
    return {
        "texts_per_s": rates,
        "ratios": {"short texts by 32, HTTP against in process": ratio(rates, "http", "inside")},
    }


def evicting(keep: Path, base: str, rounds: int) -> dict[str, Any]:
    """Every adapter as likely as any other, and room for half of them."""
    folders, short = adapters(keep, base), texts(keep)["short"]
    named = {f"x{i:05}": folders[i % DISTINCT][1] for i in range(400)}
    roomy = Ours(base, named)
    roomy.load_all()
    tight = Ours(base, named, budget=roomy.store.totals()["bytes"] // 2)
    items = spread(short, list(named), TEXTS)
    rates = race({"all resident": (roomy, items), "half resident": (tight, items)}, rounds)
    counts = vars(tight.store.counts)
    roomy.close()
    tight.close()
    return {
        "texts_per_s": rates,
        "counts": {key: value for key, value in counts.items() if key != "failures"},
        "load_s": counts["load_seconds"] / counts["loads"],
        "ratios": {
            "working set twice the memory, against all in memory": ratio(rates, "half resident", "all resident")
        },
    }


def overload(keep: Path, base: str, rounds: int) -> dict[str, Any]:
    """Twice what the server can do, for a minute: open loop, requests of 8 texts at even distances.

    The peak is that of requests of the same size, 32 of them under way.
    """
    folders, short = adapters(keep, base), texts(keep)["short"]
    items = spread(short, [folder.name for _, folder in folders], 4_096)
    size = 8
    server = Server("--adapter-dir", str(keep / "ours"))
    closed_loop = over_http(server, size=size, connections=32)
    closed_loop(items[:TEXTS])
    begin = time.perf_counter()
    closed_loop(items[: 2 * TEXTS])
    peak = 2 * TEXTS / (time.perf_counter() - begin)
    gap = size / (2 * peak)
    total = int(OVERLOAD_S / gap)
    answered: list[tuple[float, float]] = []
    refused: list[float] = []
    lost: list[object] = []
    numbers = iter(range(total))
    lock = threading.Lock()
    origin = time.perf_counter() + 1

    def work() -> None:
        while True:
            with lock:
                i = next(numbers, None)
            if i is None:
                return
            time.sleep(max(0.0, origin + i * gap - time.perf_counter()))
            at = time.perf_counter()
            connection = server.connect()  # each its own: one that idles is closed by the server after 30 s
            try:
                status, _, headers = post(connection, items[(i * size) % 4_000 :][:size])
            except (OSError, http.client.HTTPException) as error:
                lost.append(repr(error))
                continue
            finally:
                connection.close()
            took = time.perf_counter() - at
            if status == 200:
                answered.append((time.perf_counter() - origin, took))
            elif status == 429 and headers["retry-after"]:
                refused.append(took)
            else:
                lost.append(status)

    # As many as may wait at a time: by the queue's 10 s and twice that for those that wait longest.
    threads = [threading.Thread(target=work) for _ in range(int(20 / gap))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until = max(at for at, _ in answered)
    goodput = size * len(answered) / until
    assert server.stop() == 0
    return {
        "peak_texts_per_s": peak,
        "sent": total,
        "answered": len(answered),
        "refused": len(refused),
        "lost": lost[:5],
        "until_s": until,
        "answer_s": {f"p{p}": float(np.percentile([took for _, took in answered], p)) for p in (50, 99)},
        "refusal_s": {f"p{p}": float(np.percentile(refused, p)) for p in (50, 95, 99)} if refused else None,
        "ratios": {"goodput at twice the load, of the peak": goodput / peak, "requests lost": float(len(lost))},
    }


def replacing(keep: Path, base: str, rounds: int) -> dict[str, Any]:
    """Ten replacements a second under load; every answer is compared with that of the version that it names."""
    folders, short = adapters(keep, base), texts(keep)["short"]
    two = [folders[0][1], folders[1][1]]
    probes = [text for text in short if len(text) < 60][:64]
    expected = []
    for folder in two:
        classifier = predict.load(folder)
        expected.append([one.scores for one in classifier.predict(probes)])
    named = {f"x{i}": two[i % 2] for i in range(10)}
    ours = Ours(base, named)
    ours.load_all()
    which = {ours.store.status(f"x{i}").version.split("-")[1]: i % 2 for i in range(2)}
    wrong, times, done = 0, {"quiet": [], "replacing": []}, 0
    stop = threading.Event()
    replaced = 0

    def replace() -> None:
        nonlocal replaced
        rng = np.random.default_rng(1)
        while not stop.wait(0.1):
            ours.store.replace(f"x{int(rng.integers(10))}", two[int(rng.integers(2))])
            replaced += 1

    async def load(count: int, kept: list[float]) -> None:
        nonlocal wrong, done
        rng = np.random.default_rng(len(kept))
        room = asyncio.Semaphore(8)

        async def one() -> None:
            nonlocal wrong, done
            async with room:
                rows = [int(i) for i in rng.integers(len(probes), size=REQUEST)]
                items = [Item(f"x{int(rng.integers(10))}", probes[row]) for row in rows]
                begin = time.perf_counter()
                found, _ = await ours.service.answer(items)
                kept.append(time.perf_counter() - begin)
                for answer, row in zip(found, rows, strict=True):
                    said = expected[which[answer.resident.version.split("-")[1]]][row]
                    wrong += max(abs(said[k] - v) for k, v in answer.prediction.scores.items()) > 1e-4
                done += len(found)

        await asyncio.gather(*(one() for _ in range(count // REQUEST)))

    asyncio.run(load(ANSWERS // 10, times["quiet"]))
    thread = threading.Thread(target=replace)
    thread.start()
    asyncio.run(load(ANSWERS, times["replacing"]))
    stop.set()
    thread.join()
    asyncio.run(load(ANSWERS // 10, times["quiet"]))
    ours.close()
    p99 = {name: float(np.percentile(kept, 99)) for name, kept in times.items()}
    return {
        "answers": done,
        "replacements": replaced,
        "wrong": wrong,
        "p99_s": p99,
        "ratios": {
            "wrong answers among them": float(wrong),
            "p99 while adapters are replaced, against quiet": p99["replacing"] / p99["quiet"],
        },
    }


PARTS = {
    "peft": against_peft,
    "latefuse": against_latefuse,
    "resident": resident,
    "http": http_against_inside,
    "evicting": evicting,
    "overload": overload,
    "replacing": replacing,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "trimtab-serving")
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    base = str(hub.find_base(MINILM).folder)
    parts = read(f"serving-{kind()}").get("parts", {})
    for name in given.parts.split(","):
        parts[name] = {"commit": commit(), **PARTS[name](given.keep, base, given.rounds)}
        ratios = {key: value for one in parts.values() for key, value in one["ratios"].items()}
        write(f"serving-{kind()}", {"rounds": given.rounds, "parts": parts, "ratios": ratios})


if __name__ == "__main__":
    main()
