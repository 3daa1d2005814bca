"""Methods against each other on a user's own data: equal tuning, several seeds, one table, rules fixed beforehand.

Each method is tried at the same number of rates with the first seed; the evaluation rows choose its rate and its
epochs. At that rate it is trained with every seed, and the test rows, which chose nothing, decide. Each trial is a
process of its own and leaves a folder; what has finished is not repeated.
"""

import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trimtab import config, data, durable, interrupts, rundir
from trimtab.comparison import Answers, read_answers
from trimtab.config import Layered
from trimtab.data import Example, Rows
from trimtab.errors import (
    ArtefactError,
    BaseModelError,
    DataError,
    DivergedError,
    RecipeError,
    ResourceError,
    TrimtabError,
    did_you_mean,
    some,
)
from trimtab.machine import available_memory
from trimtab.paired import mean_over_seeds, paired_over_seeds
from trimtab.resolve import Job, resolve
from trimtab.rundir import RunDir

LORA = ("lora", "dora", "rslora")
METHODS = (*LORA, "head", "full")
_FULL_SHARE = 0.1  # of LoRA's best rate is where full fine-tuning's is (Biderman et al. 2024, arXiv 2405.09673)
_STEP = 3.0  # between two rates
_CS = 10.0  # between two C of the probe, around 10
_TEST_FRACTION = 0.2
_FAIR: dict[str, object] = {"train.baselines": False, "train.head_start": "random", "train.refit": "off"}
"""Every method begins alike (DoRA and full fine-tuning, which run stock, have no head start) and learns once."""
PLAN = "plan.toml"
"""The recipe of a folder of trials; not recipe.toml, which is the mark of a run."""
_BYTES_A_WEIGHT = 20  # of full fine-tuning: weight, gradient, two moments, the best so far


@dataclass(frozen=True)
class Plan:
    """What is compared, and how."""

    methods: tuple[str, ...]
    seeds: int = 5
    rates: int = 3
    margin: float = 0.01
    """Methods whose whole interval of difference lies within it are the same."""


@dataclass(frozen=True)
class Trial:
    """One training."""

    method: str
    rate: float
    """The learning rate; of `head`, the C of its logistic regression."""
    seed: int

    @property
    def name(self) -> str:
        """Its folder, below that of the comparison."""
        return f"{self.method}/{self.rate:.2g}/seed-{self.seed}"


def run(layered: Layered, plan: Plan, *, out: str | None = None, tell: Callable[[str], None]) -> dict[str, Any]:
    """Trains what the plan says, as far as that was not done before, and compares.

    Args:
        layered: The recipe, with data.train; without data.test a fifth of its rows is kept for the test.
        plan: Methods, seeds, rates, margin.
        out: The folder of the trials; None: a new one under ./runs. The same one again goes on.
        tell: Receives a line for people now and then.

    Returns:
        rows of each role, methods: for each its rate, accuracies, mean, std, ci95, and against the first one
        difference, difference_ci95, difference_p, verdict; trainable_parameters, adapter_bytes, core_seconds,
        peak_rss_bytes, the means over its seeds; diverged: method, rate and seed of those that are not among them;
        test_rows; folder.
        The probe has no seed and is fitted once.

    Raises:
        TrimtabError: whatever cannot be, before the first step where that can be known.
        DivergedError: no method came to an end.
        Interrupted: a signal asked to stop; what has finished stays.
    """
    with interrupts.heard():
        return _run(layered, plan, out, tell)


def _run(layered: Layered, plan: Plan, out: str | None, tell: Callable[[str], None]) -> dict[str, Any]:
    _check(layered, plan)
    if layered.recipe.train.learning_rate == "search":  # each method is searched here, and equally
        layered = layered.override({"train.learning_rate": "auto"}, "compare")
    _check_methods(layered, resolve(layered), plan)
    folder, layered = _prepare(layered, out)
    with rundir.only_writer(RunDir(folder)):
        return _carry_out_all(folder, layered.override(_FAIR, "compare"), plan, tell)


def _carry_out_all(folder: Path, layered: Layered, plan: Plan, tell: Callable[[str], None]) -> dict[str, Any]:
    job = resolve(layered)
    centre, metric = float(job.recipe.train.learning_rate), job.recipe.train.metric_for_best_model
    assert job.test is not None
    tell(
        f"data    {len(job.train.examples):,} rows to train on, {len(job.eval.examples):,} choose epoch and rate, "
        f"{len(job.test.examples):,} decide"
    )
    for warning in job.warnings:
        tell(f"! {warning}")
    first = job.recipe.train.seed
    trainings = sum(plan.rates + _seeds(method, plan) - 1 for method in plan.methods)
    tell(
        f"plan    {some(plan.methods)}: each at {plan.rates} rates with seed {first}, then with {plan.seeds} seeds at "
        f"its best rate{' (head has no seed)' if 'head' in plan.methods else ''}, {trainings} trainings in all"
    )
    tell(f"        in {folder}; the same command with --out {folder} goes on where this one stops")
    done: dict[str, list[Trial]] = {}
    diverged: list[dict[str, Any]] = []
    for method in plan.methods:
        tried = [Trial(method, rate, first) for rate in _grid(method, centre, plan.rates)]
        best = max(tried, key=lambda trial: _chosen_by(folder, layered, trial, metric, tell))
        chosen = [replace(best, seed=first + i) for i in range(_seeds(method, plan))]
        for trial in chosen:
            try:
                _carry_out(folder, layered, trial, tell)
            except DivergedError:  # the other methods are compared all the same
                tell(f"trial   {trial.name}: diverged")
                diverged.append(asdict(trial))
                break
        else:
            done[method] = chosen
    if not done:
        raise DivergedError(
            "compare.diverged",
            f"Every method diverged: {some([one['method'] for one in diverged])}.",
            where=str(folder),
            mend="a smaller --set train.learning_rate and another --out, or look at the data",
        )
    found = _compare(folder, done, plan) | {"diverged": diverged, "folder": str(folder)}
    rundir.write_json(folder / "comparison.json", found)
    durable.replace(folder / "comparison.md", ("\n".join(markdown_lines(found)) + "\n").encode())
    return found


def _check(layered: Layered, plan: Plan) -> None:
    for method in plan.methods:
        if method not in METHODS:
            raise RecipeError(
                "compare.method",
                f'There is no method "{method}": {some(METHODS, 9)}.{did_you_mean(method, METHODS)}',
                where="--methods",
                mend="--methods lora,head,full",
            )
    if not 0 <= plan.margin < 1:
        raise RecipeError(
            "compare.margin",
            f"A margin is a difference of accuracies from 0 up to 1, not {plan.margin:g}.",
            where="--margin",
            mend="--margin 0.01",
        )
    if layered.recipe.lora.init_from:
        raise RecipeError(
            "compare.init_from",
            "A comparison starts every method from the base: an adapter to start from would favour one.",
            where="lora.init_from",
            mend="leave lora.init_from out",
        )
    if len(set(plan.methods)) < 2:
        raise RecipeError(
            "compare.method", "One method alone cannot be compared.", where="--methods", mend="--methods lora,full"
        )


def _prepare(layered: Layered, out: str | None) -> tuple[Path, Layered]:
    """The folder, and the recipe with test rows.

    Raises:
        RecipeError: no file is named; or as `own_folder`.
    """
    if not layered.recipe.data.train:
        raise RecipeError("data.train", "No file is named.", mend="trimtab compare --methods lora,full FILE")
    has_test = bool(layered.recipe.data.test)
    folder = own_folder(
        out, "compare", layered, config.dump(resolve(layered).layered) if has_test else _dump_without_test(layered)
    )
    if has_test:
        return folder, layered
    with _folder_errors("compare", folder):
        return folder, layered.override(_split(layered, folder), "compare")


def own_folder(out: str | None, command: str, layered: Layered, plan: str) -> Path:
    """The folder of a comparison or a search: new, or that of this very plan, in which the command goes on.

    Raises:
        RecipeError: it has no name, or holds something else.
        ResourceError: it cannot be read or written.
    """
    if out is not None and not out.strip():  # of a variable that is not set
        raise RecipeError(
            "usage", "The folder has no name.", where="--out", mend="--out DIR, or without it: a new one in runs"
        )
    stem = Path(layered.recipe.data.train[0]).name.partition(".")[0]
    folder = Path(os.path.expanduser(out or f"runs/{command}-{time.strftime('%Y%m%d-%H%M%S')}-{stem}")).resolve()
    there = folder / PLAN
    with _folder_errors(command, folder):
        if there.is_file():
            if there.read_text("utf-8") != plan:
                raise RecipeError(
                    f"{command}.exists",
                    f"{folder} was begun with another recipe or other rows; nothing in it was touched.",
                    where=str(there),
                    mend="another --out; or the settings and the files that it was begun with",
                )
        elif folder.exists() and any(file.name != f"{PLAN}.tmp" for file in folder.iterdir()):
            raise RecipeError(
                f"{command}.exists",
                f"{folder} exists and is not empty; nothing in it was touched.",
                mend="another --out",
            )
        else:
            durable.make_folder(folder)
            durable.replace(there, plan.encode())
    return folder


@contextmanager
def _folder_errors(command: str, folder: Path) -> Iterator[None]:
    """Whatever the system refuses here is told with the way out."""
    try:
        yield
    except OSError as error:
        if isinstance(error, TrimtabError):
            raise
        raise ResourceError(
            f"{command}.folder",
            f"The folder cannot be used: {error.strerror or error}",
            where=str(error.filename or folder),
            mend="--out DIR in a folder that you may write to, on a volume with room",
        ) from None


def _dump_without_test(layered: Layered) -> str:
    return config.dump(resolve(layered).layered) + "# a fifth of the training rows, data/test.parquet, decides\n"


def _split(layered: Layered, folder: Path) -> dict[str, object]:
    """A fifth of the rows of each class, repeats kept together, in a file of its own; the others in another.

    They are drawn again each time, so that a file which was changed since is written again.
    """
    settings = layered.recipe.data
    files = {role: folder / "data" / f"{role}.parquet" for role in ("train", "test")}
    rows = data.read_rows(
        settings.train, text=settings.text, label=settings.label, skip_bad=settings.bad_rows == "skip"
    )
    parts = dict(zip(files, data.split(rows.examples, _TEST_FRACTION, settings.seed), strict=True))
    if not parts["test"]:
        raise DataError(
            "data.too_few",
            "No class has two different texts, so none can be kept for the test.",
            where=str(settings.train[0]),
            mend="add rows, or give test rows: --test FILE",
        )
    durable.make_folder(folder / "data")
    for role, part in parts.items():
        _write_rows(files[role], part, rows)
    return {"data.train": (str(files["train"]),), "data.test": (str(files["test"]),)}


def _write_rows(file: Path, examples: Sequence[Example], rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = "text" if rows.text_column == "auto" else rows.text_column
    label = "label" if rows.label_column == "auto" else rows.label_column
    columns = {text: [example.text for example in examples], label: [example.label for example in examples]}
    wanted = pa.table(columns)
    with suppress(OSError, pa.ArrowException):
        if pq.read_table(file).equals(wanted):  # other versions of pyarrow write the same rows in other bytes
            return
    written = io.BytesIO()
    pq.write_table(wanted, written)
    durable.replace(file, written.getvalue())


def _check_methods(layered: Layered, job: Job, plan: Plan) -> None:
    """What a method cannot do with this base is said before anything is trained.

    Raises:
        RecipeError: a variant that this base does not take.
        ResourceError: full fine-tuning would not fit the memory.
    """
    from trimtab.training import count_parameters

    for method in plan.methods:
        if method in LORA:
            count_parameters(layered.override({"lora.variant": method}, "--methods"), len(job.labels))
    if "full" in plan.methods:
        needs = _BYTES_A_WEIGHT * int(count_parameters(layered, len(job.labels))["base"])
        if needs > (free := available_memory()):
            raise ResourceError(
                "compare.memory",
                f"Full fine-tuning of this base takes {needs / 1e9:.1f} GB for weights, gradients and moments alone, "
                f"and {free / 1e9:.1f} GB are free.",
                mend="leave full out of --methods, or choose a smaller --base",
            )


def _seeds(method: str, plan: Plan) -> int:
    """With how many seeds a method is trained: the probe has none."""
    return 1 if method == "head" else plan.seeds


def _grid(method: str, centre: float, rates: int) -> list[float]:
    """Equal tuning: as many rates for each, spaced around where its best one is known to be; from low to high."""
    middle, step = (10.0, _CS) if method == "head" else (centre * (_FULL_SHARE if method == "full" else 1), _STEP)
    return [middle * step ** (i - (rates - 1) / 2) for i in range(rates)]


def _chosen_by(
    folder: Path, layered: Layered, trial: Trial, metric: str, tell: Callable[[str], None]
) -> tuple[float, float]:
    """What chooses a rate, as it chooses the epoch: the metric of the evaluation rows, then their loss.

    A trial that diverges comes last.
    """
    try:
        metrics = _carry_out(folder, layered, trial, tell)
    except DivergedError:
        tell(f"trial   {trial.name}: diverged")
        return -math.inf, -math.inf
    return metrics[f"chosen_on_{metric}"] * (-1 if metric == "loss" else 1), -metrics["chosen_on_loss"]


def _carry_out(folder: Path, layered: Layered, trial: Trial, tell: Callable[[str], None]) -> dict[str, Any]:
    """The metrics of a trial, trained now unless that was done before.

    Raises:
        TrimtabError: the trial failed; what it said is in the message.
    """
    place = RunDir(folder / "trials" / trial.name)
    if place.metrics.is_file():
        return _metrics(place)
    began = time.monotonic()
    metrics = _train(place, layered, trial)
    tell(
        f"trial   {trial.name}: accuracy {metrics['chosen_on_accuracy']:.3f} on the evaluation rows, "
        f"{time.monotonic() - began:.0f} s"
    )
    return metrics


def _train(place: RunDir, layered: Layered, trial: Trial) -> dict[str, Any]:
    values: dict[str, object] = {"train.seed": trial.seed}
    if trial.method in LORA:
        values |= {"lora.variant": trial.method, "train.learning_rate": trial.rate}
        return train_once(place, layered.override(values, "compare"))
    if trial.method == "full":
        values |= {"train.learning_rate": trial.rate, "train.save_every_s": 600.0}  # a checkpoint is the whole model
    if not place.recipe.is_file():
        recipe = config.dump(resolve(layered.override(values, "compare")).layered)
        durable.make_folder(place.path)
        rundir.write_json(place.path / "method.json", {"method": trial.method, "c": trial.rate})
        durable.replace(place.recipe, recipe.encode())
    return _finish(place, ["trimtab.rivals", str(place.path)])


def train_once(place: RunDir, layered: Layered) -> dict[str, Any]:
    """The metrics of the run at this place: read, or gone on with, or trained from the start; in a process of its own.

    Raises:
        ArtefactError: it failed; what it said is in the message.
    """
    if place.metrics.is_file():
        return _metrics(place)
    if place.recipe.is_file():
        return _finish(place, ["trimtab", "train", "--resume", str(place.path)])
    recipe = place.path.with_name(f"{place.path.name}.toml")
    durable.make_folder(recipe.parent)
    durable.replace(recipe, config.dump(resolve(layered).layered).encode())
    return _finish(place, ["trimtab", "train", "--recipe", str(recipe), "--out", str(place.path)])


def _finish(place: RunDir, arguments: Sequence[str]) -> dict[str, Any]:
    """Runs a module of Python's to the end, with a log beside its folder; what diverged before is not tried again."""
    log, mark = (place.path.with_name(f"{place.path.name}.{what}") for what in ("log", "diverged"))
    if mark.is_file():
        raise _failed(place, DivergedError.exit_code, mark.read_text("utf-8"), log)
    before = log.stat().st_size if log.exists() else 0
    code = _in_a_process([sys.executable, "-P", "-m", *arguments], log)
    if code == 0 and place.metrics.is_file():
        return _metrics(place)
    said = log.read_bytes()[before:].decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
    told = next((i for i in reversed(range(len(said))) if said[i].startswith("error [")), len(said) - 1)
    reason = " ".join(line.strip() for line in said[told:])
    if code == DivergedError.exit_code:
        durable.replace(mark, reason.encode())
    raise _failed(place, code, reason, log)


def _failed(place: RunDir, code: int, reason: str, log: Path) -> TrimtabError:
    mend = "mend what it says and give the same command again: what has finished is not repeated"
    if code == DivergedError.exit_code:
        mend = "other settings, as it says, with another --out: the same ones diverge again and are not tried"
    return _ERRORS.get(code, ArtefactError)(
        "trial.failed",
        f"The training {place.path.name} ended with exit code {code}: {reason}",
        where=str(log),
        mend=mend,
    )


_ERRORS: dict[int, type[TrimtabError]] = {
    kind.exit_code: kind for kind in (RecipeError, DataError, BaseModelError, ResourceError, DivergedError)
}


def _metrics(place: RunDir) -> dict[str, Any]:
    """What a trial's metrics.json says.

    Raises:
        ArtefactError: it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads(place.metrics.read_text("utf-8"))
        found["accuracy"], found["per_class"]
        return found
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(place, f"metrics.json: {type(error).__name__}: {error}") from None


def _damaged(place: RunDir, what: str) -> ArtefactError:
    return ArtefactError(
        "trial.damaged",
        f"A trial that had finished is damaged: {what}",
        where=str(place.path),
        mend=f"delete the folder {place.path}, and the same command trains it again",
    )


def _in_a_process(command: Sequence[str], log: Path) -> int:
    """Runs a command to its end and returns its exit code; so a trial's memory and processor time are its own.

    Raises:
        Interrupted: a signal asked to stop; it was passed on, and the trial has saved what it can go on from.
    """
    with log.open("ab") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        try:
            return process.wait()
        except interrupts.Interrupted:
            process.terminate()  # a second Ctrl-C reaches it too: terminal and handlers end both at once
            process.wait()
            raise


def _compare(folder: Path, done: dict[str, list[Trial]], plan: Plan) -> dict[str, Any]:
    """The table of all methods from the trials' files."""
    right: dict[str, np.ndarray[Any, np.dtype[np.bool_]]] = {}
    methods: list[dict[str, Any]] = []
    judged_on: tuple[tuple[str, ...], list[int]] | None = None
    for method, trials in done.items():
        places = [RunDir(folder / "trials" / trial.name) for trial in trials]
        answers = [_answers(place) for place in places]
        for place, answer in zip(places, answers, strict=True):
            rows = (answer.rows.texts, answer.rows.truth.tolist())
            if rows != (judged_on := judged_on or rows):
                raise _damaged(place, "it was judged on other rows than the trials before it")
        right[method] = np.stack([one.rows.told == one.rows.truth for one in answers])
        metrics = [_metrics(place) for place in places]
        mean, ci95 = mean_over_seeds(right[method])
        accuracies = right[method].mean(axis=1)
        methods.append(
            {
                "method": method,
                "rate": trials[0].rate,
                "at_edge": plan.rates > 1 and _is_at_edge(folder, method, trials[0]),
                "seeds": [trial.seed for trial in trials],
                "accuracies": [float(accuracy) for accuracy in accuracies],
                "accuracy": mean,
                "std": float(accuracies.std(ddof=1)) if len(trials) > 1 else None,
                "ci95": list(ci95),
                "macro_f1": float(np.mean([one["macro_f1"] for one in metrics])),
                **{
                    key: float(np.mean([one[key] for one in metrics]))
                    for key in ("trainable_parameters", "adapter_bytes", "core_seconds", "peak_rss_bytes")
                },
            }
        )
    first = next(iter(done))
    for one in methods[1:]:
        ours, theirs = right[one["method"]], right[first]
        against = paired_over_seeds(ours, theirs)
        one |= {
            "difference": against.difference,
            "difference_ci95": list(against.ci95),
            "difference_p": against.p,
            "verdict": against.verdict(plan.margin),
        }
    return {"plan": asdict(plan), "test_rows": int(right[first].shape[1]), "methods": methods}


def _is_at_edge(folder: Path, method: str, best: Trial) -> bool:
    """Whether the best rate is the lowest or the highest of those that were tried."""
    tried = sorted(float(path.parent.name) for path in (folder / "trials" / method).glob(f"*/seed-{best.seed}"))
    return not tried[0] < float(f"{best.rate:.2g}") < tried[-1]


def _answers(place: RunDir) -> Answers:
    try:
        return read_answers(place.path)
    except ArtefactError as error:
        raise _damaged(place, error.what) from None


def _told(one: dict[str, Any]) -> tuple[str, str, str]:
    """Deviation over seeds, interval, and difference to the first method, as both tables have them."""
    low, high = one["ci95"]
    std, against = "-" if one["std"] is None else f"{one['std']:.4f}", ""
    if "verdict" in one:
        below, above = one["difference_ci95"]
        against = f"{one['difference']:+.4f} ({below:+.4f} to {above:+.4f})"
    return std, f"{low:.4f} to {high:.4f}", against


def table_lines(found: dict[str, Any]) -> list[str]:
    """The comparison for people."""
    first = found["methods"][0]["method"]
    lines = [
        f"{found['test_rows']:,} test rows, {found['plan']['seeds']} seeds. Against {first}: the difference of "
        "accuracy, its 95 % interval over seeds and rows, and what follows",
        f"(same: the whole interval is within {found['plan']['margin']:g} of zero; "
        "not resolved: more rows or seeds are needed)",
        f"{'method':<8} {'rate':>8} {'accuracy':>9} {'std':>7}  {'95 % interval':<16} {'against ' + first:<46} "
        f"{'parameters':>12} {'bytes':>12} {'core-s':>8} {'GB':>6}",
    ]
    for one in found["methods"]:
        std, interval, against = _told(one)
        judged = f"{against} {one.get('verdict', '')}"
        lines.append(
            f"{one['method']:<8} {one['rate']:>8.2g} {one['accuracy']:>9.4f} {std:>7}  "
            f"{interval:<16} {judged:<46} {one['trainable_parameters']:>12,.0f} "
            f"{one['adapter_bytes']:>12,.0f} {one['core_seconds']:>8,.0f} {one['peak_rss_bytes'] / 1e9:>6.2f}"
        )
    if edge := [one["method"] for one in found["methods"] if one["at_edge"]]:
        lines.append(f"! the best rate of {some(edge)} is at an edge of those tried: --rates 5 looks further")
    return [*lines, *_diverged_lines(found), f"all of it in {found['folder']}: comparison.json, comparison.md, trials/"]


def markdown_lines(found: dict[str, Any]) -> list[str]:
    """The comparison as a Markdown table."""
    first = found["methods"][0]["method"]
    lines = [
        f"{found['test_rows']:,} test rows, {found['plan']['seeds']} seeds, {found['plan']['rates']} rates each.",
        "",
        f"| method | rate | accuracy | std | 95 % interval | against {first} | verdict | trained parameters | bytes | "
        "core-seconds | peak memory, GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found["methods"]:
        std, interval, against = _told(one)
        lines.append(
            f"| {one['method']} | {one['rate']:.2g} | {one['accuracy']:.4f} | {std} | {interval} | "
            f"{against} | {one.get('verdict', '')} | {one['trainable_parameters']:,.0f} | "
            f"{one['adapter_bytes']:,.0f} | {one['core_seconds']:,.0f} | {one['peak_rss_bytes'] / 1e9:.2f} |"
        )
    return lines + [part for line in _diverged_lines(found) for part in ("", line)]


def _diverged_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"! {one['method']} diverged at its best rate, {one['rate']:.2g}, with seed {one['seed']}: it is not compared"
        for one in found["diverged"]
    ]
