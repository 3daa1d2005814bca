"""Recipe + files + base -> a job: data checked, base found, every `auto` settled, texts encoded.

An adapter to start from settles what the recipe leaves at its default; where both say something, they must agree.

Nothing is written and no weight is read here, so whatever is wrong is found in seconds and leaves nothing behind.
`trimtab train --dry-run` stops after this.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab import adapter, batching, data, labelnames, preflight, rundir, tokens
from trimtab.adapter import Adapter
from trimtab.classification import Labels, make_labels
from trimtab.config import Keep, Layered, Recipe
from trimtab.data import Example, Rows
from trimtab.device import Placement, place
from trimtab.errors import ArtefactError, DataError, RecipeError, some
from trimtab.hub import Base, find_base, pooling
from trimtab.model import (
    adapted,
    by_layers,
    empty_model,
    head_modules,
    load_config,
    longest_input,
    lowest_block,
    on_layers,
    outside_blocks,
    resolve_targets,
)
from trimtab.tokens import Encoded, Tokenizer

_MOST_EPOCHS = 20
_FEWEST_STEPS = 200  # 400 came to no better score on 1,000 short reviews
_FEW_ROWS = 100  # one row is a point of accuracy then
# A label, from which on the first token learns by itself: at 450 sentence vectors brought nothing, at 10 three points.
_MANY_ROWS = 200
# Below, label names are rows too, and the kept tenth is learned from in the end: each is worth 0.8 to 1 point at 10.
# From 100 on the tenth brought nothing that could be seen, for twice the time; in between it is not known.
_FEW_A_LABEL = 50
# From here on, of 50 rows at least, twice the rate: with base dropout half a point at 77 labels of 90 rows; at 77 of 9,
# as at 2 labels, it was a quarter of a point worse.
_MANY_LABELS = 20
_MOST_TOKENS = 256  # of `auto`: twice the length costs over twice the time, and 256 is what MiniLM was trained with


@dataclass(frozen=True)
class Part:
    """The rows of one role, as texts and as tokens."""

    examples: list[Example]
    encoded: Encoded
    known: npt.NDArray[np.bool_]
    """bool[n]: whether a row's text stands in a file that taught or chose before; all False for the training rows."""


@dataclass(frozen=True)
class WarmStart:
    """An adapter that training starts from."""

    adapter: Adapter
    factor: float
    """What its B is multiplied by: its scaling / ours, so that the first answers are its own."""
    same_labels: bool
    """In the same order: only then its head says anything here."""


@dataclass(frozen=True)
class Job:
    """Everything that training needs, settled."""

    layered: Layered
    base: Base
    warm_start: WarmStart | None
    model_config: Any
    """transformers' config of the base, with our labels and dropout."""
    tokenizer: Tokenizer
    labels: Labels
    train: Part
    eval: Part
    test: Part | None
    all_rows: Part | None
    """With `train.refit`, what `train` and `eval` hold together; else None."""
    rejects: list[data.Reject]
    data_report: dict[str, Any]
    warnings: list[str]
    placement: Placement

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.layered.recipe

    @property
    def final(self) -> "Job":
        """The job whose training rows the adapter learns from in the end: with `train.refit`, all of them."""
        return replace(self, train=self.all_rows, all_rows=None) if self.all_rows else self

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """The batches of an epoch, as row numbers of `train`."""
        settings = self.recipe.train
        return batching.plan(
            self.train.encoded.lengths,
            settings.batch_size,
            seed=settings.seed,
            epoch=epoch,
            group_by_length=settings.group_by_length,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        settings = self.recipe.train
        batches = math.ceil(len(self.train.examples) / settings.batch_size)
        return math.ceil(batches / settings.gradient_accumulation_steps)


def resolve(layered: Layered) -> Job:
    """Reads and checks everything that a recipe names, and settles what it leaves open.

    Raises:
        RecipeError, DataError, BaseModelError: with file, line or setting, and the mend.
    """
    recipe = layered.recipe
    rows = read_rows(recipe)
    values = data.check_classes(rows["train"].examples)
    labels = make_labels(values, recipe.data.names)
    parts = _draw(recipe, rows)
    base = find_base(recipe.base.model)
    first = adapter_to_start_from(recipe)
    sums = _check_sums(recipe, rows, base, first)

    tokenizer = tokens.from_base(base.folder)
    described = partial(load_config, base.folder, num_labels=len(labels), pad_id=tokenizer.pad_id)
    skeleton = empty_model(described(dropout="config"))
    head = head_modules(skeleton, outside_blocks(skeleton), recipe.lora.also_saved)
    if first:
        layered = with_settings_of(layered, first, base, skeleton, head)
        recipe = layered.recipe
    targets = resolve_targets(skeleton, recipe.lora.target_modules, head)
    depth = lowest_block(skeleton, on_layers(skeleton, targets, recipe.lora, head), head)

    texts = [example.text for example in parts["train"]]
    limits = [limit for limit in (longest_input(skeleton), tokenizer.limit) if limit]
    limit = min(limits, default=0)
    found = _settle(recipe, rows["train"], texts, labels, targets, depth, tokenizer, limit, skeleton.config, base)
    settled = layered.override({key: value for key, (value, _) in found.items()}, {k: o for k, (_, o) in found.items()})
    paths = {f"data.{role}": [file["path"] for file in rows[role].files] for role in rows}
    paths["base.model"] = str(base.folder)  # type: ignore[assignment]
    if first:
        paths["lora.init_from"] = str(first.folder)  # type: ignore[assignment]
    settled = settled.override(paths, {key: layered.origins.get(key, "default") for key in paths})
    settled = Layered(settled.recipe.model_copy(update={"sha256": sums}), settled.origins)

    index = labels.index()
    max_length = int(settled.recipe.data.max_length)

    def encoded(examples: list[Example], known: npt.NDArray[np.bool_]) -> Part:
        numbers = [index[example.label] for example in examples]
        told = [example.text for example in examples]
        return Part(examples, tokens.encode(told, tokenizer, max_length, numbers, keep=recipe.data.keep), known)

    known = preflight.known_rows(rows, parts)
    as_read = {role: encoded(examples, known[role]) for role, examples in parts.items()}
    named: list[Example] = []
    if settled.recipe.data.label_names == "on":
        everything = (example.text for part in rows.values() for example in part.examples)
        named = labelnames.rows(labels, everything, tokenizer)

    def to_train_on(*some_parts: list[Example]) -> Part:
        examples = [*chain.from_iterable(some_parts), *named]
        return encoded(examples, np.zeros(len(examples), np.bool_))

    refit = settled.recipe.train.refit == "on"
    found_rows = preflight.report(rows, parts, known, labels.values)
    found_rows["train"]["label_names"] = len(named)
    _with_tokens(found_rows, rows, as_read)
    warnings = _warnings(rows, texts, tokenizer, as_read["train"].encoded, max_length, limit, recipe.data.keep, parts)
    warnings += preflight.warnings(found_rows)
    if first and "eval" not in rows:
        warnings.append(
            "the adapter to start from may have been trained on rows that choose the epoch here: give some that it "
            "never saw (--eval FILE), and others for a score to trust (--test FILE)"
        )
    placement = place(recipe.runtime)
    return Job(
        layered=settled,
        base=base,
        warm_start=WarmStart(
            first, first.lora.scaling / settled.recipe.lora.scaling, first.labels.values == labels.values
        )
        if first
        else None,
        model_config=described(dropout=settled.recipe.base.dropout),
        tokenizer=tokenizer,
        labels=labels,
        train=to_train_on(parts["train"]) if named else as_read["train"],
        eval=as_read["eval"],
        test=as_read.get("test"),
        all_rows=to_train_on(parts["train"], parts["eval"]) if refit else None,
        rejects=[reject for part in rows.values() for reject in part.rejects],
        data_report={"labels": list(labels.values), "warnings": warnings, **found_rows},
        warnings=[*warnings, *filter(None, [placement.throttled])],
        placement=placement,
    )


def read_rows(recipe: Recipe) -> dict[str, Rows]:
    """The rows of each role that the recipe names; evaluation and test files have the training file's columns.

    Raises:
        RecipeError, DataError: with file, line or setting, and the mend.
    """
    settings = recipe.data
    if not settings.train:
        raise RecipeError(
            "data.train", "No training file is named.", mend="trimtab train FILE, or data.train in the recipe"
        )
    if settings.eval and recipe.train.refit == "on":
        raise RecipeError(
            "train.refit",
            "Training once more takes in the training rows that are kept for evaluation; with evaluation files none "
            "are.",
            where=f"train.refit = on, data.eval = {settings.eval[0]}",
            mend="--set train.refit=auto; or leave --eval out",
        )
    skip = settings.bad_rows == "skip"
    rows = {"train": data.read_rows(settings.train, text=settings.text, label=settings.label, skip_bad=skip)}
    known = data.sorted_labels([example.label for example in rows["train"].examples])
    for role, paths in (("eval", settings.eval), ("test", settings.test)):
        if paths:
            rows[role] = data.read_rows(
                paths,
                text=rows["train"].text_column,
                label=rows["train"].label_column,
                skip_bad=skip,
                known_labels=known,
            )
    return rows


def _draw(recipe: Recipe, rows: dict[str, Rows]) -> dict[str, list[Example]]:
    settings = recipe.data
    parts = {role: part.examples for role, part in rows.items()}
    if "eval" not in parts:
        parts["train"], parts["eval"] = data.split(parts["train"], settings.eval_fraction, settings.seed)
        if not parts["eval"]:
            raise DataError(
                "data.too_few",
                f"No class has two different texts, so none can be kept for evaluation ({len(parts['train'])} rows).",
                where=str(settings.train[0]),
                mend="add rows, or give evaluation rows: --eval FILE",
            )
    parts["train"] = data.draw(parts["train"], settings.limit_train, settings.seed)
    parts["eval"] = data.draw(parts["eval"], settings.limit_eval, settings.seed)
    return parts


def adapter_to_start_from(recipe: Recipe) -> Adapter | None:
    """The adapter that the recipe names; None: it names none.

    Raises:
        ArtefactError: there is nothing, or it is damaged.
    """
    return adapter.read(rundir.adapter_in(recipe.lora.init_from)) if recipe.lora.init_from else None


_FITTING = ("r", "lora_alpha", "variant", "target_modules", "layers")
"""What the settings of LoRA say of A and B; of these, another lora_alpha can be made up for."""


def with_settings_of(layered: Layered, first: Adapter, base: Base, skeleton: Any, head: Sequence[str]) -> Layered:
    """The recipe with what it leaves at its defaults taken from the adapter that training starts from.

    Raises:
        ArtefactError: the adapter belongs to another base.
        RecipeError: what the recipe says itself does not fit the adapter's A and B.
    """
    for part, ours in (("weights", base.weights_sha256), ("tokenizer", base.tokenizer_sha256)):
        if ours != (theirs := first.base[f"{part}_sha256"]):
            raise ArtefactError(
                "adapter.other_base",
                f"The adapter to start from was trained on {first.base['name']}; the {part} of {base.name} are not the "
                f"same: sha256 {ours[:12]}, expected {theirs[:12]}.",
                where=f"lora.init_from = {first.folder}",
                mend=f"--base {first.base['name']}; or start anew: --set lora.init_from=",
            )
    names, layers = by_layers(skeleton, first.lora.target_modules, head)
    theirs_are = {**first.lora.model_dump(include=set(_FITTING)), "target_modules": names, "layers": layers}
    left = {f"lora.{key}": theirs_are[key] for key in _FITTING if f"lora.{key}" not in layered.origins}
    left |= {"data.keep": first.keep} if "data.keep" not in layered.origins else {}
    layered = layered.override(left, "as the adapter in lora.init_from")
    ours_is = layered.recipe.lora
    targets = on_layers(skeleton, resolve_targets(skeleton, ours_is.target_modules, head), ours_is, head)
    wanted = adapted(skeleton, targets, head).keys()
    there = adapted(skeleton, first.lora.target_modules, head).keys()
    problems = [
        f"lora.{key} = {getattr(ours_is, key)}, the adapter has {getattr(first.lora, key)}"
        for key in ("r", "variant")
        if getattr(ours_is, key) != getattr(first.lora, key)
    ]
    if wanted != there:
        problems.append(
            f"LoRA beside {len(wanted)} weights, the adapter has it beside {len(there)} "
            f"({some(sorted(wanted ^ there), 2)} stand in one alone)"
        )
    if problems:
        raise RecipeError(
            "lora.init_from",
            f"The recipe does not fit the adapter to start from: {'; '.join(problems)}.",
            where=f"lora.init_from = {first.folder}",
            mend="leave r, variant, target_modules and layers out, and the adapter's are taken; or: "
            f"--set lora.r={first.lora.r} --set lora.variant={first.lora.variant} "
            f"--set lora.target_modules={','.join(names)} --set lora.layers={layers}",
        )
    return layered


def _check_sums(recipe: Recipe, rows: dict[str, Rows], base: Base, first: Adapter | None) -> dict[str, str]:
    """sha256 of data, of the base's weights and of an adapter; where the recipe states one, it must be the same."""
    sums = {file["path"]: file["sha256"] for part in rows.values() for file in part.files}
    sums[str(base.folder)] = base.weights_sha256
    if first:
        sums[str(first.folder)] = first.sha256
    changed = [path for path, digest in sums.items() if recipe.sha256.get(path, digest) != digest]
    if changed:
        raise DataError(
            "data.changed",
            f"{changed[0]} is not what this recipe was written for: sha256 {sums[changed[0]][:12]}, "
            f"recipe {recipe.sha256[changed[0]][:12]}.",
            mend="bring the old file back; or, to train on the new one, delete its line under [sha256] in the recipe",
        )
    return sums


def _settle(
    recipe: Recipe,
    train: Rows,
    texts: Sequence[str],
    labels: Labels,
    targets: Sequence[str],
    depth: int,
    tokenizer: Tokenizer,
    limit: int,
    config: Any,
    base: Base,
) -> dict[str, tuple[object, str]]:
    """Every `auto` and every preset as (value, origin); settings that the recipe fixes are not in it."""
    found: dict[str, tuple[object, str]] = {}
    if recipe.data.text == "auto":
        found["data.text"] = (train.text_column, "auto: found by name")
    if recipe.data.label == "auto":
        found["data.label"] = (train.label_column, "auto: found by name")
    if isinstance(recipe.lora.target_modules, str):
        found["lora.target_modules"] = (
            tuple(targets),
            f"{recipe.lora.target_modules} for {config.model_type}",
        )
    most = min(_MOST_TOKENS, limit) if limit else _MOST_TOKENS
    if recipe.data.max_length == "auto":
        found["data.max_length"] = (
            tokens.fitting_length(texts, tokenizer, most=most),
            f"auto: 99 of 100 texts, at most {most}",
        )
    elif limit and recipe.data.max_length > limit:
        found["data.max_length"] = (limit, f"the base takes no more; asked: {recipe.data.max_length}")
    start: str = recipe.train.head_start
    if start == "auto":
        start, why = _head_start(recipe, base, len(texts), len(labels))
        found["train.head_start"] = (start, why)
    names: str = recipe.data.label_names
    if names == "auto":
        names = "on" if start == "sentence" and len(texts) < _FEW_A_LABEL * len(labels) else "off"
        why = f"auto: {len(texts) // len(labels):,} rows a label, the head starts with {start}"
        found["data.label_names"] = (names, why)
    if recipe.base.dropout == "auto":
        # Lower layers that are kept must say the same in every pass.
        found["base.dropout"] = (
            (0.0, "auto: LoRA leaves lower layers out") if depth else (0.1, "auto: LoRA on all layers")
        )
    rows = len(texts) + (len(labels) if names == "on" else 0)
    steps = math.ceil(rows / (recipe.train.batch_size * recipe.train.gradient_accumulation_steps))
    if recipe.train.num_epochs == "auto":
        found["train.num_epochs"] = (
            min(_MOST_EPOCHS, max(3, math.ceil(_FEWEST_STEPS / steps))),
            f"auto: {steps:,} steps an epoch",
        )
    found |= _refit(recipe, len(texts), len(labels), depth)
    width = int(getattr(config, "hidden_size", 0) or getattr(config, "dim", 0) or 768)
    if recipe.train.learning_rate == "auto":
        rate = 1e-3 if width < 768 else 5e-4 if width < 1024 else 3e-4
        rate *= 2 if len(labels) >= _MANY_LABELS and len(texts) >= _FEW_A_LABEL * len(labels) else 1
        why = f"auto: width {width:,}, {len(labels):,} labels of {len(texts) // len(labels):,} rows"
        found["train.learning_rate"] = (rate, why)
    if recipe.train.metric_for_best_model == "auto":
        counts = Counter(example.label for example in train.examples)
        ratio = max(counts.values()) / min(counts.values())
        found["train.metric_for_best_model"] = (
            "macro_f1" if ratio > 3 else "accuracy",
            f"auto: largest class {ratio:.1f} times the smallest",
        )
    return found


def _refit(recipe: Recipe, rows: int, labels: int, depth: int) -> dict[str, tuple[object, str]]:
    """Whether the adapter is trained once more on all rows, and why; nothing where the recipe says it."""
    if recipe.train.refit != "auto":
        return {}
    against = {
        "no training rows are kept for evaluation": bool(recipe.data.eval),
        "data.limit_train says how many rows train": recipe.data.limit_train > 0,
        "data.limit_eval leaves rows out": recipe.data.limit_eval > 0,
        "LoRA leaves lower layers out": depth > 0,
    }
    for why, stands in against.items():
        if stands:
            return {"train.refit": ("off", f"auto: {why}")}
    return {"train.refit": ("on" if rows < _FEW_A_LABEL * labels else "off", f"auto: {rows // labels:,} rows a label")}


def _head_start(recipe: Recipe, base: Base, rows: int, labels: int) -> tuple[str, str]:
    """How a new head begins, and why."""
    if recipe.runtime.fast == "off":
        return "random", "auto: the stock forward does not know the layers of a head"
    if recipe.lora.init_from:
        return "probe", "auto: LoRA is that of lora.init_from"
    if recipe.lora.top:
        return "probe", "auto: LoRA reaches the top layers alone"
    if pooling(base.folder) != "mean":
        return "probe", "auto: the base's folder does not say that it takes the mean of its tokens"
    if rows >= _MANY_ROWS * labels:
        return "probe", f"auto: {rows // labels:,} rows a label"
    return "sentence", f"auto: {rows // labels:,} rows a label, and a base that takes the mean of its tokens"


def _warnings(
    rows: dict[str, Rows],
    texts: Sequence[str],
    tokenizer: Tokenizer,
    train: Encoded,
    max_length: int,
    limit: int,
    keep: Keep,
    parts: dict[str, list[Example]],
) -> list[str]:
    """What a user should know before training, and what may stop nobody."""
    found = []
    if reasons := Counter(reject.reason for part in rows.values() for reject in part.rejects):
        counted = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
        found.append(f"{sum(reasons.values()):,} rows are set aside ({counted}); a run lists them in its rejects.csv")
    for file in (file for part in rows.values() for file in part.files):
        if file["encoding"].startswith("GB18030"):
            found.append(f"{file['path']} is no UTF-8 and was read as GB18030")
    if data.is_sorted_by_label(rows["train"].examples):
        found.append("the rows are sorted by label: they are shuffled before they are drawn or trained on")
    if script := tokens.foreign_script(texts, tokenizer):
        found.append(script)
    if (cut := float(np.mean(train.truncated))) > 0.01:
        share, more = 1 - len(train.ids) / int(train.full_lengths.sum()), min(limit or 512, 512)
        found.append(
            f"{cut:.1%} of the training texts are cut at {max_length} tokens ({share:.1%} of all tokens are lost, "
            f"{'in the middle' if keep == 'ends' else 'at the end'})"
            + (f": --set data.max_length={more} reads more and takes longer" if max_length < more else "")
        )
    if (eval_rows := len(parts["eval"])) < _FEW_ROWS:
        found.append(f"only {eval_rows} rows judge this run, so its score is a rough one; more rows, or --eval FILE")
    return found


def _with_tokens(found: dict[str, dict[str, Any]], rows: dict[str, Rows], parts: dict[str, Part]) -> None:
    """Adds to the report of each part what only its tokens tell."""
    for role, part in parts.items():
        source = rows.get(role, rows["train"])
        found[role] |= {
            "tokens": int(part.encoded.lengths.sum()),
            "tokens_cut": int((part.encoded.full_lengths - part.encoded.lengths).sum()),
            "rows_cut": int(part.encoded.truncated.sum()),
            "text_column": source.text_column,
            "label_column": source.label_column,
        }
