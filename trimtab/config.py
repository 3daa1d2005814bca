"""The recipe: everything that decides a run, declared once.

One field here is at the same time a TOML key (`[lora] r`), a setting (`--set lora.r=16`), a line of help, a
line of `--dry-run` and a line of the run's `recipe.toml`. The defaults below are the `default` recipe. A
recipe file states only what differs. Recipes hold values, never code; unknown keys are errors.
"""

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from trimtab.errors import RecipeError, did_you_mean

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


def _as_tuple(value: object) -> object:
    """A comma-separated string from the command line becomes a tuple; `auto` and presets stay words."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _as_targets(value: object) -> object:
    return value if value in ("all-linear", "query-value") else _as_tuple(value)


def _as_modules(value: object) -> object:
    return value if value == "auto" else _as_tuple(value)


def _as_layers(value: object) -> object:
    """`all`, or `top:4` with at least one layer."""
    if not isinstance(value, str) or not re.fullmatch(r"all|top:0*[1-9][0-9]*", value, re.ASCII):
        raise ValueError('"all", or "top:4" for the top 4 layers, with at least one')
    return value


def _as_names(value: object) -> object:
    return read_names(value) if isinstance(value, str) else value


def read_names(value: str) -> dict[str, str]:
    """`0=差评/negative,1=好评/positive` as a dict from label to its names.

    Raises:
        ValueError: it is not of that form, or a label has two names.
    """
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    bad = [label for label, sign, names in pairs if not sign or not names.strip()]
    if bad:
        raise ValueError(f'"{bad[0]}" is not LABEL=NAME, as in 0=差评/negative,1=好评/positive')
    found: dict[str, str] = {}
    for label, _, names in pairs:
        if found.setdefault(label.strip(), names.strip()) != names.strip():
            raise ValueError(f'one name for each label; "{label.strip()}" has two names')
    return found


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Auto = Literal["auto"]
MOST_THREADS = 4_096
Keep = Literal["start", "ends"]
"""What is left of a text that is cut."""


class Section(BaseModel):
    """A table of a recipe: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("something else than true or false")
        return value


class DataSettings(Section):
    """Which rows are read, and how they are cut."""

    train: Paths = Field((), description="Training files: parquet, CSV, TSV, JSONL, also .gz, a glob or hf://.")
    eval: Paths = Field((), description="Files that choose the epoch; empty: a part of the training rows.")
    test: Paths = Field((), description="Files that are scored once, at the end.")
    text: str = Field("auto", description="Column with the text; auto: found by its name.")
    label: str = Field("auto", description="Column with the label; auto: found by its name.")
    names: Annotated[dict[str, str], BeforeValidator(_as_names)] = Field(
        default_factory=dict, description="Display names of labels, zh/en: 0=差评/negative,1=好评/positive."
    )
    eval_fraction: float = Field(0.1, gt=0, lt=1, description="Share of rows kept for evaluation, by class.")
    limit_train: int = Field(0, ge=0, description="At most this many rows of the training files, drawn; 0: all.")
    limit_eval: int = Field(0, ge=0, description="At most this many evaluation rows, drawn at random; 0: all.")
    max_length: Annotated[int, Field(ge=8)] | Auto = Field(
        "auto", description="Tokens a text is cut at; auto: 99 of 100 texts fit, in steps of 32, at most 256."
    )
    keep: Keep = Field(
        "ends",
        description="What is left of a text that is cut: start; or ends, a quarter of it the start, the rest the end.",
    )
    label_names: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether names of labels, such as card_arrival, are training rows too; "
        "auto: with fewer than 50 rows a label, where head_start is sentence.",
    )
    bad_rows: Literal["error", "skip"] = Field("error", description="Rows that cannot be used: stop, or set aside.")
    seed: int = Field(42, ge=0, description="Seed of the split and of the drawn rows.")


class BaseSettings(Section):
    """The frozen model."""

    model: str = Field(MINILM, description="A folder or a hub id.")
    dropout: Annotated[float, Field(ge=0, lt=1)] | Literal["auto", "config"] = Field(
        "auto",
        description="Dropout in the base while training; config: as the model's config says; "
        "auto: 0.1 where LoRA reaches the lowest layer, else 0.",
    )


class LoraSettings(Section):
    """The two thin matrices, W + (lora_alpha / r) B A (Hu et al. 2021, arXiv 2106.09685)."""

    r: int = Field(8, ge=1, le=65_536, description="Rank: the number of rows of A and columns of B.")
    lora_alpha: int = Field(16, ge=1, le=1_000_000, description="Scale: B A is multiplied by lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before A.")
    target_modules: Annotated[tuple[str, ...] | Literal["all-linear", "query-value"], BeforeValidator(_as_targets)] = (
        Field("all-linear", description="Weights that get a B A: all-linear, query-value, or names.")
    )
    modules_to_save: Annotated[tuple[str, ...] | Auto, BeforeValidator(_as_modules)] = Field(
        "auto", description="Modules trained in full; auto: those that the base did not bring, the head."
    )
    layers: Annotated[str, BeforeValidator(_as_layers)] = Field(
        "all", description="Layers that get LoRA: all, or top:4 for the 4 nearest to the head."
    )
    variant: Literal["lora", "rslora", "dora"] = Field("lora", description="lora, rslora or dora.")
    init_from: str = Field(
        "", description="A run or an adapter whose A and B training starts from, and its head where the labels fit."
    )

    @property
    def top(self) -> int:
        """How many layers get LoRA, counted from the head; 0: all."""
        return 0 if self.layers == "all" else int(self.layers.removeprefix("top:"))

    @property
    def also_saved(self) -> tuple[str, ...]:
        """Modules to train in full besides the head."""
        return () if self.modules_to_save == "auto" else self.modules_to_save

    @property
    def scaling(self) -> float:
        """What B A is multiplied by: lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.variant == "rslora" else self.r)


class TrainSettings(Section):
    """The loop."""

    num_epochs: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="auto: 3, more where 200 steps need it, at most 20."
    )
    batch_size: int = Field(16, ge=1, description="Rows a step.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Batches an optimizer step.")
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] | Literal["auto", "search"] = Field(
        "auto",
        description="auto: 1e-3, 5e-4 from width 768, 3e-4 from 1024, twice that from 20 labels of 50 rows on; "
        "search: tries three around that.",
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, on matrices only.")
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="Share of steps of warm-up; above 0: at least 10.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient norm is clipped at this; 0: never.")
    early_stopping_patience: int = Field(
        0, ge=0, description="Epochs without a better score, or a loss lower by 0.0001; 0: never."
    )
    metric_for_best_model: Literal["auto", "loss", "accuracy", "macro_f1"] = Field(
        "auto",
        description="Keeps the epoch of the lowest loss, or the latest within a standard error of the highest score. "
        "auto: accuracy, macro_f1 where the largest class is over 3 times the smallest.",
    )
    class_weights: Literal["none", "auto"] = Field(
        "none", description="auto: a row weighs n / (classes x rows of its class); evaluation is never weighed."
    )
    head_start: Literal["auto", "random", "probe", "sentence"] = Field(
        "auto",
        description="How a new head begins: at random; as a linear probe of the base; as one after LoRA learned the "
        "base's sentence vectors. auto: sentence for a base that takes the mean of its tokens, below 200 rows a label.",
    )
    refit: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Train once more on all rows, those kept for evaluation too, for as many epochs as were best; "
        "auto: with fewer than 50 training rows a label, where LoRA is on all layers.",
    )
    baselines: bool = Field(True, description="Judge counted words and the untrained base on the same rows.")
    group_by_length: bool = Field(True, description="Put texts of similar length into a batch.")
    log_every_steps: int = Field(10, ge=1, description="Optimizer steps between two log lines.")
    save_every_s: float = Field(30.0, gt=0, description="Seconds between two checkpoints; each epoch has one too.")
    seed: int = Field(42, ge=0, lt=2**63, description="Seed of the head, of A, of row order and of dropout.")


class RuntimeSettings(Section):
    """The machine."""

    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, mps, else cpu.")
    threads: int = Field(
        0, ge=0, le=MOST_THREADS, description="CPU threads; 0: OMP_NUM_THREADS, else the cores we may use."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 with AVX-512's instructions."
    )
    fast: Literal["auto", "on", "off"] = Field("auto", description="The fast forward of the BERT family on a CPU.")
    trunk_cache: Literal["auto", "on", "off"] = Field(
        "auto", description="Frozen layers below LoRA computed once and kept; auto: from 2 epochs on, where it fits."
    )
    trunk_cache_gb: float = Field(10.0, gt=0, description="Most that kept layers take on the disk, all runs together.")


class Recipe(Section):
    """A complete description of a run."""

    data: DataSettings = DataSettings()
    base: BaseSettings = BaseSettings()
    lora: LoraSettings = LoraSettings()
    train: TrainSettings = TrainSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    sha256: dict[str, str] = Field(default_factory=dict, description="Path of data or base -> sha256.")

    def with_values(self, values: Mapping[str, object]) -> Self:
        """Returns a copy in which dotted keys have new values, checked like any other.

        Raises:
            RecipeError: a key does not exist or its value cannot be.
        """
        tables = self.model_dump()
        for key, value in values.items():
            section, _, name = key.partition(".")
            if not isinstance(tables.get(section), dict) or not name:
                raise _unknown(key)
            tables[section][name] = value
        return type(self).model_validate(tables)


@dataclass(frozen=True)
class Layered:
    """A recipe together with where each value came from: `default`, a recipe, a flag, or a finding."""

    recipe: Recipe
    origins: dict[str, str] = field(default_factory=dict)

    def override(self, values: Mapping[str, object], origin: str | Mapping[str, str]) -> "Layered":
        """Returns the layer above this one; `origin` is one text for all keys or one per key."""
        try:
            recipe = self.recipe.with_values(values)
        except ValidationError as error:
            raise _explain(error, origin if isinstance(origin, str) else "") from None
        told = {key: origin if isinstance(origin, str) else origin[key] for key in values}
        return Layered(recipe, {**self.origins, **told})


def keys() -> dict[str, str]:
    """Every dotted key of a recipe with its help text."""
    return {
        f"{section}.{name}": info.description or ""
        for section, table in Recipe.model_fields.items()
        if isinstance(table.annotation, type) and issubclass(table.annotation, Section)
        for name, info in table.annotation.model_fields.items()
    }


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("trimtab") / "recipes"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def recipe_of_run(file: Path) -> Layered:
    """The recipe of a run, in which nothing is left to `auto`; one of before there was `train.refit` has it off.

    Raises:
        RecipeError: as `load_recipe`.
    """
    layered = load_recipe(str(file))
    if layered.recipe.train.refit != "auto":
        return layered
    return layered.override({"train.refit": "off"}, "a run from before this setting")


def load_recipe(name_or_file: str) -> Layered:
    """Reads a shipped recipe by name, or a TOML file by path.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key, or a value that cannot be.
    """
    if name_or_file in shipped_recipes():
        text = (resources.files("trimtab") / "recipes" / f"{name_or_file}.toml").read_text("utf-8")
        origin = f"recipe {name_or_file}"
    else:
        path = Path(name_or_file)
        if os.path.isdir(path) and (path / "recipe.toml").is_file():
            path = path / "recipe.toml"
        if not os.path.isfile(path):  # and not path.is_file(), which raises where the name is too long
            raise RecipeError(
                "recipe.missing",
                f'There is no recipe "{name_or_file}": neither a file nor one of those that come with trimtab '
                f"({', '.join(shipped_recipes())}).{did_you_mean(name_or_file, shipped_recipes())}",
                mend="trimtab train FILE --recipe tutorial",
            )
        origin = f"recipe {path.name}"
        try:
            text = path.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(
                "recipe.encoding", "A recipe is a UTF-8 text.", where=f"{path}: {error}", mend="save it as UTF-8"
            ) from None
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            "recipe.toml",
            f"This recipe is not TOML: {error}",
            where=name_or_file,
            mend='a text stands in quotes: text = "review"',
        ) from None
    values: dict[str, object] = {}
    for section, table in tables.items():
        if section not in Recipe.model_fields:
            raise _unknown(section, origin)
        if not isinstance(table, dict):
            raise RecipeError(
                "recipe.key",
                f'"{section}" is a table, not a value.',
                where=origin,
                mend=f"[{section}] on a line of its own, and its keys below",
            )
        values.update({f"{section}.{name}": value for name, value in table.items()})
    return Layered(Recipe()).override(values, origin)


def assemble(
    recipe: str = "default", flags: Mapping[str, object] | None = None, settings: Sequence[str] = ()
) -> Layered:
    """Layers a recipe, flags such as `{"data.train": ("a.csv",)}`, and settings such as `["lora.r=16"]`.

    Raises:
        RecipeError: as `load_recipe`, and for settings that do not exist.
    """
    flags = flags or {}
    origins = {key: _FLAGS.get(key, "--" + key.rpartition(".")[2]) for key in flags}
    return load_recipe(recipe).override(flags, origins).override(parse_settings(settings), "--set")


_FLAGS = {"data.train": "FILE", "base.model": "--base", "data.bad_rows": "--bad-rows"}


def parse_settings(settings: Sequence[str]) -> dict[str, object]:
    """`["lora.r=16"]` -> `{"lora.r": 16}`. Values are TOML where they can be, else the text as it stands."""
    values: dict[str, object] = {}
    for setting in settings:
        key, sign, raw = setting.partition("=")
        if not sign:
            raise RecipeError("recipe.set", f'"{setting}" is not KEY=VALUE.', mend="--set lora.r=16")
        try:
            read = tomllib.loads(f"value = {raw}")
        except (ValueError, RecursionError):  # no TOML, or a number or nesting beyond what Python reads
            read = {"value": raw}
        # A line break in a value may begin more TOML: then it was a text.
        values[key.strip()] = read["value"] if len(read) == 1 else raw
    return values


def dump(layered: Layered) -> str:
    """The whole recipe as TOML, every default written out, each line with its origin as a comment."""
    lines: list[str] = []
    for section, table in layered.recipe.model_dump().items():
        lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        for name, value in table.items():
            entry = f"{_toml_key(name)} = {as_toml(value)}"
            origin = "" if section == "sha256" else layered.origins.get(f"{section}.{name}", "default")
            lines.append(f"{entry:<40} # {origin}" if origin else entry)
    return "\n".join(lines) + "\n"


def _toml_key(name: str) -> str:
    return name if name.isidentifier() and name.isascii() else as_toml(name)


def as_toml(value: object) -> str:
    """A value of a setting as TOML, which `--set` reads too."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(str(k))} = {as_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    # JSON's strings, numbers and booleans are TOML's too, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")


def _unknown(key: str, origin: str = "") -> RecipeError:
    if key in Recipe.model_fields:
        inner = next((full for full in keys() if full.startswith(f"{key}.")), f"{key}.PATH")
        return RecipeError("recipe.key", f'"{key}" is a table, no setting.', where=origin, mend=f"--set {inner}=VALUE")
    by_name = [full for full in keys() if full.partition(".")[2] == key.rpartition(".")[2]]
    # A table is proposed to the header of one only: [loar].
    guess = did_you_mean(key, [*keys(), *([] if "." in key or not origin else Recipe.model_fields)])
    if by_name:
        guess = f' Did you mean "{by_name[0]}"?'
    return RecipeError(
        "recipe.unknown_key",
        f'There is no setting "{key}".{guess}',
        where=origin,
        mend="trimtab train FILE --dry-run shows every setting",
    )


def _explain(error: ValidationError, origin: str) -> RecipeError:
    """All problems of a recipe in one message, in the words of the recipe."""
    problems: list[dict[str, Any]] = [dict(item) for item in error.errors()]
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            return _unknown(".".join(str(part) for part in problem["loc"]), origin)
    by_key: dict[str, list[str]] = {}
    for problem in problems:
        key = ".".join(str(part) for part in problem["loc"][:2])
        by_key.setdefault(key, []).append(problem["msg"].removeprefix("Value error, ").removeprefix("Input should be "))
    given = {".".join(map(str, problem["loc"][:2])): problem["input"] for problem in problems}
    what = "; ".join(f"{key} = {given[key]!r} cannot be: expected {' or '.join(m)}" for key, m in by_key.items())
    return RecipeError(
        "recipe.value", what, where=origin, mend=f"{next(iter(by_key))}: {keys().get(next(iter(by_key)), '')}"
    )
