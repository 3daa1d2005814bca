"""The command line: parse -> call one function -> print. No logic lives here, and nothing heavy is imported early."""

import codecs
import errno
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.errors import (
    MissingExtraError,
    RecipeError,
    ResourceError,
    TrimtabError,
    install_extra,
    plain,
    quoted,
    some,
)

if TYPE_CHECKING:
    from trimtab.config import RuntimeSettings
    from trimtab.loop import Observer

app = typer.Typer(
    help="Fine-tune, judge and use LoRA adapters for text classification.\n\n"
    "Start with: trimtab demo, or trimtab train FILE",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Data for programs on stdout, nothing else.")]
Text = Annotated[str | None, typer.Option("--text", help="Name of the text column; else found by its name.")]
Label = Annotated[str | None, typer.Option("--label", help="Name of the label column; else found by its name.")]
BaseOption = Annotated[str | None, typer.Option("--base", help="Base model: a folder or a hub id.")]
BadRows = Annotated[
    str | None,
    typer.Option("--bad-rows", metavar="error|skip", help="Rows that cannot be used: stop, or set aside."),
]
Files = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FILE...]", help="Labelled rows: parquet, CSV, TSV, JSONL, .gz, a glob or hf://datasets/..."
    ),
]
EvalFiles = Annotated[
    list[str] | None,
    typer.Option("--eval", metavar="FILE", help="Rows that choose the epoch; else a tenth of FILE."),
]
TestFiles = Annotated[
    list[str] | None,
    typer.Option("--test", metavar="FILE", help="Rows scored once, at the end: then the headline."),
]
RecipeOption = Annotated[
    str,
    typer.Option("--recipe", metavar="NAME|FILE", help="default, tutorial, or a TOML file such as RUN/recipe.toml."),
]
Budget = Annotated[
    str,
    typer.Option(
        "--budget",
        metavar="TIME",
        help="5m, 90s, 1h30m: learning twice, epochs, the start of the head and rows give way to fit.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the recipe, as in lora.r=16; again for more."),
]
RawScores = Annotated[
    bool, typer.Option("--raw-scores", help="Scores as the model gives them, without the adapter's temperature.")
]
Runtime = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="runtime.KEY=VALUE", help="Device, threads, dtype, fast: runtime.threads=1."),
]


@app.command()
def train(
    files: Files = None,
    eval_files: EvalFiles = None,
    test_files: TestFiles = None,
    text: Text = None,
    label: Label = None,
    names: Annotated[
        str | None,
        typer.Option(metavar="LABEL=ZH/EN,...", help="Display names: 0=差评/negative,1=好评/positive"),
    ] = None,
    base: BaseOption = None,
    recipe: RecipeOption = "default",
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="The run directory; else a new one under ./runs.")
    ] = None,
    settings: Settings = None,
    budget: Budget = "",
    bad_rows: BadRows = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run that was stopped.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the data, print the recipe with the origin of each value, stop."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune an adapter on labelled files."""
    from trimtab import config, console, training

    given = _given(files, eval_files, test_files, text, label, base, bad_rows, names)
    if resume and (given or settings or out or dry_run or budget or recipe != "default"):
        raise RecipeError(
            "usage",
            "--resume goes on as the run's own recipe.toml says; it takes no file, setting or flag but --json.",
            mend=f"trimtab train --resume {quoted(resume)}",
        )
    layered = config.assemble(recipe, given, settings or [])
    if dry_run and budget:
        raise RecipeError(
            "usage", "--dry-run measures nothing, and --budget must.", mend=f"trimtab estimate FILE --budget {budget}"
        )
    if dry_run:
        from trimtab.resolve import resolve

        job = resolve(layered)
        if as_json:
            _json(
                {
                    "recipe": job.recipe.model_dump(mode="json"),
                    "origins": job.layered.origins,
                    "warnings": job.warnings,
                }
            )
        else:
            taught = console.rows_to_train_on(len(job.train.examples), job.data_report["train"]["label_names"])
            print(f"# {taught}, {len(job.eval.examples):,} to evaluate", end="")
            print(f", {len(job.test.examples):,} to test" if job.test else "", end="")
            print(f"; {len(job.labels)} labels")
            print(config.dump(job.layered), end="")
            for warning in job.warnings:
                print(f"! {warning}", file=sys.stderr)
        return
    with console.progress() as printed, _resume_hint(resume or "") as noted:
        observe = _both(noted, _json_event if as_json else printed)
        if resume:
            run = training.resume(resume, observe=observe)
        else:
            run = training.train(layered, out=out, budget=budget, observe=observe)
    if not as_json:
        shown = _shown(run.path)
        with suppress(OSError):  # the run is done, whoever still listens
            print(f'all of it in {shown}, report.html first; try it:\n  trimtab predict {shown} "a text of yours"')


@app.command()
def estimate(
    files: Files = None,
    eval_files: EvalFiles = None,
    test_files: TestFiles = None,
    text: Text = None,
    label: Label = None,
    base: BaseOption = None,
    recipe: RecipeOption = "default",
    settings: Settings = None,
    budget: Budget = "",
    bad_rows: BadRows = None,
    as_json: Json = False,
) -> None:
    """Tell how long training would take, and how much memory; nothing is written."""
    from trimtab import config, console, training

    given = _given(files, eval_files, test_files, text, label, base, bad_rows)
    planned = training.plan(config.assemble(recipe, given, settings or []), budget)
    if as_json:
        _json(planned.as_dict())
    else:
        for line in console.plan_lines(planned.as_dict()):
            print(line)


@app.command()
def predict(
    path: Annotated[
        str,
        typer.Argument(metavar="RUN|ADAPTER", help="A run directory such as runs/latest, or an adapter folder."),
    ],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT...]", help="Texts; none: lines from stdin.")
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="FILE", help="Texts from a file, any format that train reads."),
    ] = None,
    text: Text = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write CSV, JSONL or parquet: the input's columns and the answers."),
    ] = None,
    lang: Annotated[str, typer.Option(metavar="zh|en", help="Language of the label names.")] = "",
    min_score: Annotated[
        float, typer.Option("--min-score", metavar="0..1", help='Answers with a lower score get the label "unsure".')
    ] = 0.0,
    raw_scores: RawScores = False,
    base: BaseOption = None,
    settings: Runtime = None,
    as_json: Json = False,
) -> None:
    """Label texts with an adapter."""
    if lang not in ("", "zh", "en"):
        raise RecipeError("usage", f'--lang is zh or en, not "{lang}".', mend="--lang zh")
    if bool(texts) + bool(file) > 1:
        raise RecipeError("usage", "Texts and --file were given, where one is expected.", mend="leave one of them out")
    if texts and len(texts) == 1 and os.path.isfile(texts[0]):
        raise RecipeError(
            "usage",
            f"{texts[0]} is a file, and was given as a text.",
            mend=f"--file {quoted(texts[0])}; or pipe the text in",
        )
    if text and not file:
        raise RecipeError(
            "usage", "--text names a column of --file, which is not there.", mend="--file FILE --text COLUMN"
        )
    with _nothing_is_garbage():
        from trimtab import files as answer_files
        from trimtab.predict import load

        tables = (
            answer_files.read(file, text or "auto")
            if file
            else iter([answer_files.as_table(list(texts or _stdin_lines()))])
        )
        if out:
            answer_files.check_writable(out)
        classifier = load(path, base=base, runtime=_runtime(settings))
    if out:
        rows = 0
        with answer_files.writing(out) as append:
            for table in tables:
                append(table, classifier.predict(table.texts, min_score=min_score, raw_scores=raw_scores))
                rows += len(table.texts)
        print(f"{rows:,} rows in {out}", file=sys.stderr)
        return
    for table in tables:
        predictions = classifier.predict(table.texts, min_score=min_score, raw_scores=raw_scores)
        if as_json:
            for prediction in predictions:
                name = {"name": classifier.labels.shown(prediction.label, lang)} if lang else {}
                _json(asdict(prediction) | name)
        else:
            for line in answer_files.table_lines(predictions, classifier.labels, lang):
                print(line)


data_app = typer.Typer(help="Look at labelled files.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")


@data_app.command("check")
def data_check(
    files: Files = None,
    eval_files: EvalFiles = None,
    test_files: TestFiles = None,
    text: Text = None,
    label: Label = None,
    base: BaseOption = None,
    bad_rows: BadRows = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Check labelled files as training would, and say what to know of them; nothing is written."""
    from trimtab import config, report
    from trimtab.resolve import resolve

    given = _given(files, eval_files, test_files, text, label, base, bad_rows)
    found = resolve(config.assemble(flags=given, settings=settings or [])).data_report
    if as_json:
        _json(found)
        return
    for line in report.data_lines(found):
        print(line)
    for warning in found["warnings"]:
        print(f"! {warning}")


@app.command("eval")
def evaluate(
    path: Annotated[str, typer.Argument(metavar="RUN|ADAPTER")],
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Labelled rows.")],
    text: Text = None,
    label: Label = None,
    base: BaseOption = None,
    bad_rows: BadRows = None,
    raw_scores: RawScores = False,
    settings: Runtime = None,
    as_json: Json = False,
) -> None:
    """Score an adapter on labelled files."""
    from trimtab import evaluation, report

    if bad_rows not in (None, "error", "skip"):
        raise RecipeError("usage", f'--bad-rows is error or skip, not "{bad_rows}".', mend="--bad-rows skip")
    scores = evaluation.evaluate(
        path,
        files,
        base=base,
        text=text or "auto",
        label=label or "auto",
        skip_bad=bad_rows == "skip",
        raw_scores=raw_scores,
        runtime=_runtime(settings),
    )
    if as_json:
        _json(scores)
    else:
        for line in report.score_lines(scores):
            print(line)


@app.command()
def compare(
    items: Annotated[
        list[str],
        typer.Argument(metavar="RUN RUN...|FILE...", help="Finished runs; or, with --methods, labelled rows."),
    ],
    methods: Annotated[
        str, typer.Option(metavar="NAME,...", help="Train these on FILE and compare: lora,dora,rslora,head,full.")
    ] = "",
    metric: Annotated[str, typer.Option(metavar="accuracy|macro_f1", help="What runs are compared by.")] = "accuracy",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method, at its best rate.")] = 5,
    rates: Annotated[int, typer.Option(min=1, max=9, help="Learning rates tried for each method.")] = 3,
    margin: Annotated[float, typer.Option(help="Methods whose difference lies within it are the same.")] = 0.01,
    eval_files: EvalFiles = None,
    test_files: Annotated[
        list[str] | None,
        typer.Option("--test", metavar="FILE", help="Rows that decide; else a fifth of FILE is kept for it."),
    ] = None,
    text: Text = None,
    label: Label = None,
    base: BaseOption = None,
    recipe: RecipeOption = "default",
    settings: Settings = None,
    bad_rows: BadRows = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where trials go; the same DIR again goes on with them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare finished runs on the same rows; or train methods over seeds and compare those."""
    from trimtab.comparison import compare as compare_runs
    from trimtab.comparison import compare_lines

    given = _given(None, eval_files, test_files, text, label, base, bad_rows)
    if not methods:
        files = [item for item in items if os.path.isfile(item) and Path(item).name != "latest"]
        if given or settings or out or recipe != "default" or (seeds, rates, margin) != (5, 3, 0.01) or files:
            raise RecipeError(
                "usage",
                f"{files[0]} is a file of rows: methods are trained on it, and none is named."
                if files
                else "Finished runs are compared as they are; the other flags belong to --methods.",
                mend="--methods lora,full trains on a file; or RUN RUN, with --metric alone",
            )
        found = compare_runs(items, metric)
        lines = compare_lines(found)
    else:
        from trimtab import config, trials

        if metric != "accuracy":
            raise RecipeError("usage", "Methods are compared by accuracy.", where="--metric", mend="leave --metric out")
        layered = config.assemble(recipe, given | {"data.train": tuple(items)}, settings or [])
        wanted = trials.Plan(tuple(name.strip() for name in methods.split(",")), seeds, rates, margin)
        with _stop_hint(lambda: _TRIALS_HINT):
            found = trials.run(layered, wanted, out=out, tell=_say)
        lines = trials.table_lines(found)
    if as_json:
        _json(found)
    else:
        for line in lines:
            print(line)


@app.command()
def tune(
    files: Files = None,
    trials: Annotated[int, typer.Option(min=1, help="Recipes to try, those of an earlier call included.")] = 20,
    eval_files: EvalFiles = None,
    test_files: TestFiles = None,
    text: Text = None,
    label: Label = None,
    base: BaseOption = None,
    recipe: RecipeOption = "default",
    settings: Settings = None,
    bad_rows: BadRows = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where trials go; the same DIR again goes on with them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search for a better recipe: learning rate, rank, targets, epochs. Needs the extra `tune`."""
    from trimtab import config, tuning

    given = _given(files, eval_files, test_files, text, label, base, bad_rows)
    with _stop_hint(lambda: _TRIALS_HINT):
        found = tuning.tune(config.assemble(recipe, given, settings or []), trials, out=out, tell=_say)
    if as_json:
        _json(found)
    else:
        print(f"best    {found['metric']} {found['best']:.4f} on the evaluation rows, which chose it; use it:")
        print(f"  trimtab train --recipe {_shown(Path(found['recipe']))}")


@app.command()
def report(
    path: Annotated[str, typer.Argument(metavar="RUN", help="A run directory such as runs/latest.")],
    lang: Annotated[str, typer.Option(metavar="en|zh", help="Language of what is printed; the page has both.")] = "en",
) -> None:
    """Print the report of a finished run, and write its report.html anew."""
    from trimtab import markdown, runreport
    from trimtab.rundir import RunDir, locate

    if lang not in ("en", "zh"):
        raise RecipeError("usage", f'--lang is en or zh, not "{lang}".', mend="--lang zh")
    found = runreport.read(path)
    print(markdown.report(found, lang), end="")
    run = RunDir(locate(path))
    runreport.write(run, found)
    print(f"as a page: {_shown(run.report)}", file=sys.stderr)


@app.command()
def params(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A folder or a hub id.")],
    settings: Settings = None,
    labels: Annotated[int, typer.Option(min=2, help="Number of labels of the head.")] = 2,
    as_json: Json = False,
) -> None:
    """Count what LoRA would train on a base, without training."""
    from trimtab import config, report, training

    parameters = training.count_parameters(config.assemble(flags={"base.model": base}, settings=settings or []), labels)
    if as_json:
        _json(parameters)
    else:
        for line in [*report.layer_lines(parameters), *report.parameter_lines(parameters)]:
            print(line)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="RUN|ADAPTER")],
    base: BaseOption = None,
    as_json: Json = False,
) -> None:
    """Compute an adapter's stored answers again and compare."""
    from trimtab import evaluation

    found = evaluation.verify(path, base=base)
    if as_json:
        _json({"ok": found.ok, **asdict(found)})
    else:
        verdict = "good" if found.ok else "BAD"
        print(f"{verdict}: {found.rows} stored answers, largest difference {found.largest_difference:.2g}")
    if not found.ok:
        raise typer.Exit(7)


@app.command()
def demo(
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="The run directory; else a new one under ./runs.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Fine-tune on real film reviews and label five sentences; needs no hub and no file."""
    from trimtab import console, report, training
    from trimtab import demo as parts
    from trimtab import files as answer_files
    from trimtab.config import parse_settings
    from trimtab.predict import load

    train_file, eval_file = parts.prepare(Path("runs/demo-data"))
    print(f"data    {_shown(train_file)} (20,000 reviews) and {_shown(eval_file)} (5,000)")
    print("recipe  tutorial, on all-MiniLM-L6-v2 instead of roberta-base: 5.5 times smaller, and it needs no hub")
    layered = parts.recipe(train_file, eval_file).override(parse_settings(settings or []), "--set")
    with console.progress(sys.stdout) as printed, _resume_hint() as noted:
        run = training.train(layered, out=out, observe=_both(noted, printed))
    shown = _shown(run.path)
    classifier = load(run.path)
    print(f"\n$ trimtab predict {shown} ...   (five sentences that nobody trained on)")
    predictions = classifier.predict(list(parts.SENTENCES.values()))
    for line in answer_files.table_lines(predictions, classifier.labels, "", notes=list(parts.SENTENCES)):
        print(line)
    for line in report.next_steps(shown):
        print(line)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell whether this machine is ready, and what to mend."""
    from trimtab import doctor as checks

    found = checks.diagnose()
    if as_json:
        _json({"checks": [asdict(check) for check in found]})
    else:
        for check in found:
            print(f"{check.level:<9} {check.name:<16} {check.found}")
            if check.mend:
                print(f"{'':<26} mend: {check.mend}")
        bad = sum(check.level == "bad" for check in found)
        doubtful = sum(check.level == "doubtful" for check in found)
        print(f"{len(found) - bad - doubtful} good, {doubtful} doubtful, {bad} bad")
    if any(check.level == "bad" for check in found):
        raise typer.Exit(5)


@app.command()
def adopt(
    source: Annotated[str, typer.Argument(metavar="PEFT_DIR", help="The folder that save_pretrained of peft wrote.")],
    names: Annotated[
        str | None, typer.Option(metavar="A,B|0=ZH/EN,...", help="The labels in the order of the logits (id2label).")
    ] = None,
    out: Annotated[
        str | None, typer.Option(metavar="DIR", help="The adapter folder to write; else adapters/NAME.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Its base; else the one that its config names.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", help="Tokens at which training cut texts; else as its tokenizer, or the base, does."
        ),
    ] = None,
    settings: Runtime = None,
    as_json: Json = False,
) -> None:
    """Make an adapter that plain peft trained one of ours: with labels, base, tokenizer and checked answers."""
    from trimtab import adopt as adopting

    found = adopting.adopt(source, out, names=names, base=base, max_length=max_length, runtime=_runtime(settings))
    shown = _shown(found.folder)
    if as_json:
        _json(
            {
                "adapter": str(found.folder),
                "base": found.base.recorded_as,
                "labels": list(found.labels.values),
                "max_length": found.max_length,
                "largest_difference": found.difference,
                "answers": [{"text": text, "label": label, "score": score} for text, label, score in found.answers],
            }
        )
        return
    print(f"adopted   {source} -> {shown}")
    print(f"base      {found.base.name}; texts are cut at {found.max_length} tokens ({found.cut_by})")
    print("labels    " + ", ".join(f"{i} = {found.labels.name(i)}" for i in range(len(found.labels))))
    print(f"checked   it answers as under plain peft; largest difference of a logit {found.difference:.1g}")
    for text, label, score in found.answers:  # labels in the wrong order are seen here
        print(f"          {found.labels.name(label)}  {score:.3f}  {text}")
    print(
        f'try it:\n  trimtab predict {shown} "a text of yours"'
        + (f"\n  trimtab serve {shown}" if found.is_served else "")
    )


@app.command()
def serve(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN|ADAPTER...]", help="Runs or adapter folders; NAME=PATH gives one a name."),
    ] = None,
    adapter_dir: Annotated[
        str | None, typer.Option("--adapter-dir", metavar="DIR", help="Each folder in it is an adapter of that name.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model; else the adapters' own.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any that is free.")] = 8080,
    tokens: Annotated[
        str | None, typer.Option(metavar="FILE", help="Who may ask which adapters; any other host needs it.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure-no-auth", help="Another host without tokens: anyone who reaches it may ask.")
    ] = False,
    admin: Annotated[bool, typer.Option("--admin", help="Allow to add, replace and remove adapters by HTTP.")] = False,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For adapters, such as 4GB; else half of what is free.")
    ] = None,
    watch: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How often DIR is looked at for changes; 0: never.")
    ] = 5.0,
    drain: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long accepted requests may take once it stops.")
    ] = 30.0,
    settings: Runtime = None,
) -> None:
    """Serve any number of adapters on one base over HTTP.

    Needs the extra `serve`. Make installs it; without make, in the clone: pip install -c constraints.txt ".[serve]"
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would fight with those that compute
    try:
        from trimtab.serving import server
    except ImportError as error:
        raise MissingExtraError(
            "serve.extra",
            f"Serving needs what is not installed: {error.name}.",
            mend=install_extra("serve"),
        ) from None
    server.serve(
        server.Options(
            adapters=tuple(adapters or ()),
            directory=adapter_dir,
            base=base,
            host=host,
            port=port,
            tokens=tokens,
            insecure=insecure,
            admin=admin,
            memory=memory,
            watch_s=watch,
            drain_s=drain,
            runtime=_runtime(settings),
        ),
        _say,
    )
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # all is answered and closed; threads that hang on a disk would be waited for


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Handle --version."""
    if version:
        from trimtab import __version__

        print(f"trimtab {__version__}")
        raise typer.Exit


def main() -> None:
    """Run a command; every error of ours becomes its message and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A console that cannot show a character gets a question mark, never a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    code: int | str | None = 0
    try:
        app(standalone_mode=True)
    except TrimtabError as error:
        code = _failed(error)
    except SystemExit as end:
        code = end.code
    except OSError as error:
        if error.filename is None and error.errno not in _OF_A_STREAM:
            raise
        code = _failed(_system_error(error))
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError as error:  # what is left in the stream would make Python end with 120 and words of its own
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout and not code and error.errno != errno.EPIPE:
                code = _failed(_system_error(error))
    sys.exit(code)


_OF_A_STREAM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _system_error(error: OSError) -> TrimtabError:
    """What the system refused, and nobody nearer has told."""
    if error.filename is None:
        return ResourceError(
            "output",
            f"The output cannot be written: {error.strerror or error}.",
            mend="make room where it goes, or send it elsewhere",
        )
    return ResourceError(
        "system", f"{error.strerror}.", where=str(error.filename), mend="see to it that this can be read and written"
    )


def _failed(error: TrimtabError) -> int:
    """Tells an error on both streams, as far as they take it; returns the exit code."""
    with suppress(OSError):
        for line in f"error [{error.code}]: {error}".split("\n"):
            print(plain(line), file=sys.stderr, flush=True)
    if "--json" in sys.argv:
        with suppress(OSError):
            _json({"error": {"code": error.code, "message": error.what, "where": error.where, "mend": error.mend}})
    return error.exit_code


def _json(value: object) -> None:
    # Programs read this: where the stream cannot hold a character, its escape and never a question mark.
    utf8 = codecs.lookup(getattr(sys.stdout, "encoding", None) or "ascii").name == "utf-8"
    print(json.dumps(value, ensure_ascii=not utf8), flush=True)


def _json_event(event: Mapping[str, Any]) -> None:
    if event["event"] != "progress":
        _json(event)


def _given(
    files: list[str] | None,
    eval_files: list[str] | None,
    test_files: list[str] | None,
    text: str | None,
    label: str | None,
    base: str | None,
    bad_rows: str | None,
    names: str | None = None,
) -> dict[str, object]:
    """The flags that were used, as keys of the recipe."""
    flags = {
        "data.train": tuple(files or ()),
        "data.eval": tuple(eval_files or ()),
        "data.test": tuple(test_files or ()),
        "data.text": text,
        "data.label": label,
        "data.names": names,
        "base.model": base,
        "data.bad_rows": bad_rows,
    }
    return {key: value for key, value in flags.items() if value}


_TRIALS_HINT = "what has finished stays: the same command goes on, with --out DIR of the folder named above"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _both(first: "Observer", second: "Observer") -> "Observer":
    def observe(event: Mapping[str, Any]) -> None:
        first(event)
        second(event)

    return observe


def _runtime(settings: list[str] | None) -> "RuntimeSettings":
    """The `runtime` settings of a command that uses an adapter; its other settings are the adapter's own."""
    from trimtab import config

    taken = ("runtime.device", "runtime.threads", "runtime.dtype", "runtime.fast")
    if other := [setting for setting in settings or [] if setting.partition("=")[0].strip() not in taken]:
        raise RecipeError(
            "usage",
            f'"{other[0]}" is of training, and was settled then.',
            where="--set",
            mend=f"here --set takes {some(taken)}",
        )
    return config.assemble(settings=settings or []).recipe.runtime


def _stdin_lines() -> list[str]:
    from trimtab.data import decode

    if sys.stdin is None:
        return []
    if sys.stdin.isatty():
        print("one text a line, then Ctrl-D:", file=sys.stderr)
    text, _ = decode(Path("stdin"), sys.stdin.buffer.read())
    lines = text.replace("\r\n", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]  # an empty line is a text too: answers stand beside the lines


@contextmanager
def _nothing_is_garbage() -> Iterator[None]:
    """Within it no garbage is looked for; afterwards again, but not among what was made here, if all went well.

    The libraries make a million objects that stay: looking among them for garbage took a quarter of five answers.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


def _shown(path: Path) -> str:
    """A path as a user would type it from here."""
    try:
        return quoted(str(path.relative_to(Path.cwd())))
    except ValueError:
        return quoted(path)


@contextmanager
def _resume_hint(run: str = "") -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Says how to go on when a signal stops a run that has begun, or `run`, which is resumed."""

    def note(event: Mapping[str, Any]) -> None:
        nonlocal run
        run = str(event.get("run", run))

    def hint() -> str:
        return f"go on with:\n  trimtab train --resume {_shown(Path(run))}" if run else "nothing was written"

    with _stop_hint(hint):
        yield note


@contextmanager
def _stop_hint(hint: Callable[[], str]) -> Iterator[None]:
    """Ends the command where a signal asked to stop, with what to do then."""
    from trimtab.interrupts import Interrupted

    try:
        yield
    except KeyboardInterrupt as stop:
        by = f" by {stop.name}" if isinstance(stop, Interrupted) else ""
        with suppress(OSError):  # the terminal may be what went away
            print(f"\nstopped{by}; {hint()}", file=sys.stderr)
        sys.exit(stop.exit_code if isinstance(stop, Interrupted) else 130)
