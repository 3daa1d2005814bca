import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import config, errors
from trimtab.config import Layered, Recipe, assemble, dump, load_recipe, parse_settings
from trimtab.errors import RecipeError, TrimtabError


def value_of(recipe: Recipe, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def recipe_file(content: str | bytes) -> str:
    Path("my.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    return "my.toml"


def refusal(*settings: str, recipe: str = "default") -> str:
    with pytest.raises(RecipeError) as caught:
        assemble(recipe, settings=settings)
    assert caught.value.exit_code == 2
    return str(caught.value)


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "exit_code", "standard"),
    [
        ("RecipeError", 2, ValueError),
        ("MissingExtraError", 2, ImportError),
        ("DataError", 3, ValueError),
        ("BaseModelError", 4, OSError),
        ("ResourceError", 5, OSError),
        ("DivergedError", 6, ArithmeticError),
        ("ArtefactError", 7, ValueError),
    ],
)
def test_every_error_has_its_exit_code_and_survives_a_process_boundary(
    name: str, exit_code: int, standard: type[Exception]
) -> None:
    error = getattr(errors, name)("a.code", "what", where="a.csv, line 3", mend="do this")
    assert isinstance(error, TrimtabError)
    assert isinstance(error, standard)
    assert error.exit_code == exit_code
    assert str(error) == "what\n  where: a.csv, line 3\n  mend:  do this"
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.code) == (type(error), str(error), "a.code")


def test_did_you_mean_and_some() -> None:
    assert errors.did_you_mean("LABLE", ["text", "label"]) == ' Did you mean "label"?'
    assert errors.did_you_mean("zzz", ["text", "label"]) == ""
    assert errors.some(range(3)) == "0, 1, 2"
    assert errors.some(range(1_007)) == "0, 1, 2, 3, 4 and 1,002 more"


# -- recipes that come along -----------------------------------------------------------------------------------


def test_the_default_recipe_is_the_defaults() -> None:
    assert load_recipe("default") == Layered(Recipe())
    assert config.shipped_recipes() == ["default", "tutorial"]


def test_the_tutorial_to_the_letter() -> None:
    expected = {
        "base.model": "roberta-base",
        "base.dropout": "config",
        "data.limit_train": 1000,
        "data.limit_eval": 500,
        "data.max_length": 256,
        "data.keep": "start",
        "data.seed": 42,
        "lora.r": 8,
        "lora.lora_alpha": 32,
        "lora.lora_dropout": 0.1,
        "lora.target_modules": "query-value",
        "lora.variant": "lora",
        "train.learning_rate": 1e-3,
        "train.batch_size": 16,
        "train.gradient_accumulation_steps": 1,
        "train.num_epochs": 3,
        "train.weight_decay": 0.01,
        "train.warmup_ratio": 0.0,
        "train.max_grad_norm": 1.0,
        "train.metric_for_best_model": "loss",
        "train.early_stopping_patience": 0,
        "train.group_by_length": False,
        "train.head_start": "random",
        "train.refit": "off",
        "train.seed": 42,
    }
    recipe = load_recipe("tutorial").recipe
    assert {key: value_of(recipe, key) for key in expected} == expected
    elsewhere = config.keys().keys() - expected
    assert {key: value_of(recipe, key) for key in elsewhere} == {key: value_of(Recipe(), key) for key in elsewhere}


def test_every_setting_has_a_line_of_help() -> None:
    assert all(config.keys().values())


# -- round trip ------------------------------------------------------------------------------------------------

TEXT = st.text() | st.sampled_from(
    ["差评/negative", 'a "quoted" word', "C:\\data\\new.csv", "'''", "#", "\x7f\x85\u2028"]
)
FRACTION = st.floats(0, 1, exclude_max=True)
SEED = st.integers(0, 2**63 - 1)
VALUES: dict[str, st.SearchStrategy[object]] = {
    "data.train": st.lists(TEXT).map(tuple),
    "data.eval": st.lists(TEXT).map(tuple),
    "data.test": st.lists(TEXT).map(tuple),
    "data.text": TEXT,
    "data.label": TEXT,
    "data.names": st.dictionaries(TEXT, TEXT),
    "data.eval_fraction": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "data.limit_train": st.integers(0),
    "data.limit_eval": st.integers(0),
    "data.max_length": st.just("auto") | st.integers(16, 8_192),
    "data.keep": st.sampled_from(["start", "ends"]),
    "data.label_names": st.sampled_from(["auto", "on", "off"]),
    "data.bad_rows": st.sampled_from(["error", "skip"]),
    "data.seed": SEED,
    "base.model": TEXT.filter(bool),
    "base.dropout": st.sampled_from(["auto", "config"]) | FRACTION,
    "lora.r": st.integers(1, 65_536),
    "lora.lora_alpha": st.integers(1, 1_000_000),
    "lora.lora_dropout": FRACTION,
    "lora.target_modules": st.sampled_from(["all-linear", "query-value"]) | st.lists(TEXT, min_size=1).map(tuple),
    "lora.modules_to_save": st.just("auto") | st.lists(TEXT).map(tuple),
    "lora.layers": st.just("all") | st.integers(1).map("top:{}".format),
    "lora.variant": st.sampled_from(["lora", "rslora", "dora"]),
    "lora.init_from": TEXT,
    "train.num_epochs": st.just("auto") | st.integers(1),
    "train.batch_size": st.integers(1),
    "train.gradient_accumulation_steps": st.integers(1),
    "train.learning_rate": st.just("auto") | st.floats(1e-12, 10),
    "train.weight_decay": st.floats(0, allow_infinity=False),
    "train.warmup_ratio": FRACTION,
    "train.max_grad_norm": st.floats(0, allow_infinity=False),
    "train.early_stopping_patience": st.integers(0),
    "train.metric_for_best_model": st.sampled_from(["auto", "loss", "accuracy", "macro_f1"]),
    "train.class_weights": st.sampled_from(["none", "auto"]),
    "train.group_by_length": st.booleans(),
    "train.baselines": st.booleans(),
    "train.head_start": st.sampled_from(["auto", "random", "probe", "sentence"]),
    "train.refit": st.sampled_from(["auto", "on", "off"]),
    "train.log_every_steps": st.integers(1),
    "train.save_every_s": st.floats(0, exclude_min=True, allow_infinity=False),
    "train.seed": SEED,
    "runtime.device": st.sampled_from(["auto", "cpu", "cuda", "mps"]),
    "runtime.threads": st.integers(0, 4_096),
    "runtime.fast": st.sampled_from(["auto", "on", "off"]),
    "runtime.dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
    "runtime.trunk_cache": st.sampled_from(["auto", "on", "off"]),
    "runtime.trunk_cache_gb": st.floats(0, exclude_min=True, allow_infinity=False),
}


@settings(deadline=None)
@given(values=st.fixed_dictionaries({}, optional=VALUES), sums=st.dictionaries(TEXT.filter(bool), TEXT, max_size=3))
def test_what_dump_writes_load_reads(values: dict[str, object], sums: dict[str, str]) -> None:
    layered = Layered(Recipe()).override({**values, **{f"sha256.{path}": v for path, v in sums.items()}}, "--set")
    assert {key: value_of(layered.recipe, key) for key in values} == values
    assert load_recipe(recipe_file(dump(layered))).recipe == layered.recipe


def test_the_round_trip_covers_every_setting() -> None:
    assert VALUES.keys() == config.keys().keys()


def test_dump_tells_where_a_value_is_from() -> None:
    lines = dump(assemble("tutorial", {"base.model": "x"}, ["lora.r=4"])).splitlines()
    told = {line.split(" = ")[0]: line.rpartition("# ")[2] for line in lines if " = " in line}
    assert (told["model"], told["r"], told["lora_alpha"], told["log_every_steps"], told["variant"]) == (
        "--base", "--set", "recipe tutorial", "recipe tutorial", "default",
    )  # fmt: skip


# -- settings --------------------------------------------------------------------------------------------------


def test_a_setting_beats_a_flag_beats_a_recipe_beats_the_default() -> None:
    path = recipe_file("[lora]\nr = 2\nlora_alpha = 2\nlora_dropout = 0.2\n")
    recipe = assemble(path, {"lora.r": 3, "lora.lora_alpha": 3}, ["lora.r=4"]).recipe
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout, recipe.train.batch_size) == (4, 3, 0.2, 16)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lora.r=16", 16),
        (" lora.r = 16 ", 16),
        ("train.learning_rate=5e-4", 5e-4),
        ("train.learning_rate=auto", "auto"),
        ("data.max_length=128", 128),
        ("train.group_by_length=false", False),
        ("lora.target_modules=query, value", ("query", "value")),
        ('lora.target_modules=["query", "value"]', ("query", "value")),
        ("lora.target_modules=query-value", "query-value"),
        ("lora.modules_to_save=", ()),
        ("data.test=a.csv,b.csv", ("a.csv", "b.csv")),
        ("data.text=评论", "评论"),
        ('data.text="2024"', "2024"),
        ("data.names=0=差评/negative,1=好评/positive", {"0": "差评/negative", "1": "好评/positive"}),
        ('data.names={0="a, b"}', {"0": "a, b"}),
    ],
)
def test_settings_as_they_are_typed(setting: str, value: object) -> None:
    layered = assemble(settings=[setting])
    key = setting.partition("=")[0].strip()
    assert value_of(layered.recipe, key) == value
    assert layered.origins == {key: "--set"}


def test_a_setting_without_a_value() -> None:
    with pytest.raises(RecipeError, match=r'"lora\.r" is not KEY=VALUE'):
        parse_settings(["lora.r"])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("r", "lora.r"),
        ("batch_size", "train.batch_size"),
        ("lora.rank", "lora.r"),
        ("lora.alpha", "lora.lora_alpha"),
        ("train.epochs", "train.num_epochs"),
        ("train.learning_rte", "train.learning_rate"),
        ("lora.batch_size", "train.batch_size"),
        ("data.maxlength", "data.max_length"),
        ("lora.r.x", "lora.r"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_one_that_was_meant(key: str, meant: str) -> None:
    message = refusal(f"{key}=1")
    assert f'no setting "{key}"' in message
    assert f'Did you mean "{meant}"?' in message


@pytest.mark.parametrize(
    ("text", "wrong", "meant"),
    [
        ("[lora]\nrank = 3", "lora.rank", "lora.r"),
        ("[loar]\nr = 3", "loar", "lora"),
        ("learning_rate = 1e-3", "learning_rate", "train.learning_rate"),
    ],
)
def test_an_unknown_key_of_a_file_too(text: str, wrong: str, meant: str) -> None:
    message = refusal(recipe=recipe_file(text))
    assert f'"{wrong}". Did you mean "{meant}"?' in message
    assert "my.toml" in message


@pytest.mark.parametrize("key", ["train.lr", "rank", "lora", "sha256"])
def test_no_table_is_proposed_where_a_setting_is_wanted(key: str) -> None:
    assert not any(f'mean "{section}"' in refusal(f"{key}=1") for section in Recipe.model_fields)


@pytest.mark.parametrize(
    "setting",
    [
        "data.eval_fraction=0", "data.eval_fraction=1", "data.limit_train=-1", "data.max_length=0",
        "data.max_length=-5", "data.max_length=1", "data.max_length=many", "data.names=0", "data.names=bad",
        "data.names=0=", "data.seed=-1", "data.text=1",
        "data.train=3", "data.bad_rows=maybe", "base.dropout=1.5", "base.dropout=-0.1", "base.dropout=cfg", "lora.r=0",
        "lora.r=8.5", "lora.r=", "lora.r=true", "lora.lora_alpha=0", "lora.lora_dropout=1", "lora.variant=qlora",
        "lora.layers=top:0", "lora.layers=top", "lora.layers=top:-1", "lora.layers=4", "lora.layers=bottom:2",
        "runtime.trunk_cache=yes", "runtime.trunk_cache_gb=0",
        "train.num_epochs=0", "train.num_epochs=-1", "train.num_epochs=2.5", "train.batch_size=0",
        "train.learning_rate=0", "train.learning_rate=-1e-3", "train.learning_rate=nan", "train.learning_rate=true",
        "train.learning_rate=fast", "train.weight_decay=-1", "train.warmup_ratio=1", "train.max_grad_norm=-1",
        "train.group_by_length=2", "train.log_every_steps=0", "train.save_every_s=0", "train.save_every_s=inf",
        "train.metric_for_best_model=f1", f"train.seed={2**64}", "runtime.device=gpu", "runtime.threads=-1",
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_its_name(setting: str) -> None:
    key, _, value = setting.partition("=")
    message = refusal(setting)
    assert f"{key} = " in message
    assert value in message.replace("True", "true").replace("-0.001", "-1e-3")
    assert config.keys()[key] in message


@pytest.mark.parametrize(
    "setting",
    [
        "data.limit_train=1", "data.limit_eval=1", "data.max_length=8", "data.seed=0", "base.dropout=0", "lora.r=1",
        "lora.lora_alpha=1", "train.num_epochs=1", "train.weight_decay=0.5", "train.early_stopping_patience=1",
        "train.save_every_s=0.5", f"train.seed={2**63 - 1}", "runtime.threads=1",
    ],
)  # fmt: skip
def test_the_least_and_the_most_that_can_be(setting: str) -> None:
    key, _, value = setting.partition("=")
    assert value_of(assemble(settings=[setting]).recipe, key) == json.loads(value)


def test_all_wrong_values_of_a_file_are_told_at_once() -> None:
    message = refusal(recipe=recipe_file('[train]\nlearning_rate = "fast"\nbatch_size = 0\n[lora]\nr = 0\n'))
    assert all(key in message for key in ("train.learning_rate", "train.batch_size", "lora.r"))
    assert "my.toml" in message


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().lora.r = 4  # type: ignore[misc]


# -- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code", "word"),
    [
        ("[lora\nr = 3", "recipe.toml", "line 1"),
        ("[data]\ntext = review", "recipe.toml", "line 2"),
        ("[lora]\nr = 3\nr = 4", "recipe.toml", "overwrite"),
        ("lora = 3", "recipe.key", "[lora]"),
        ("[[lora]]\nr = 3", "recipe.key", "[lora]"),
        ("[data]\ntext = 'é'".encode("latin-1"), "recipe.encoding", "UTF-8"),
    ],
)
def test_a_file_that_is_no_recipe(content: str | bytes, code: str, word: str) -> None:
    with pytest.raises(RecipeError, match=r"my\.toml") as caught:
        load_recipe(recipe_file(content))
    assert caught.value.code == code
    assert word in str(caught.value)


def test_a_byte_order_mark_is_no_mistake() -> None:
    assert load_recipe(recipe_file(b"\xef\xbb\xbf[lora]\r\nr = 4\r\n")).recipe.lora.r == 4


def test_a_run_directory_is_its_recipe() -> None:
    Path("run").mkdir()
    Path("run/recipe.toml").write_text("[lora]\nr = 4\n")
    assert load_recipe("run").recipe.lora.r == 4


@pytest.mark.parametrize("name", ["tutoral", "missing.toml", "", ".", "a" * 300])
def test_no_such_recipe(name: str) -> None:
    message = refusal(recipe=name)
    assert "default, tutorial" in message
    assert ('mean "tutorial"' in message) == (name == "tutoral")
