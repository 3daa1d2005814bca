"""Findings to Markdown: what `trimtab report` prints, and the card that travels with an adapter.

Tables line up in a terminal, where Chinese takes two columns a character. Whatever comes from data stands in a code
span, in which Markdown, HTML, addresses and mentions are nothing but text.
"""

import re
from collections.abc import Callable, Sequence

from rich.cells import cell_len

from trimtab import findings, wording
from trimtab.findings import Bin, Contender, Example, Findings
from trimtab.wording import count, percent, say, score, signed

_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 60  # characters of the line of training losses
_MOST_NAMES = 100  # labels of a card
_WIDEST = 40  # a cell beyond this width does not widen its column

Lines = list[str]


def report(found: Findings, language: str = "en") -> str:
    """The whole report."""
    title = say("title", language) + (f" {code(found.run)}" if found.run else "")
    return "\n".join([f"# {title}", *_body(found, language, level=2)]) + "\n"


def card(found: Findings) -> str:
    """README.md of an adapter: what it is, how to use it, how good it is. The same recipe gives the same bytes."""
    found = findings.lasting(found)
    recipe, language = found.recipe, "en"
    train = next((part for part in found.parts if part.role == "train"), None)
    sums = dict(found.repeat.sums)
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {yaml(found.base)}",
        "pipeline_tag: text-classification",
        "tags: [lora, trimtab]",
        "---",
        "",
        f"# {say('card', language)}",
        "",
        *_verdict(found, language),
        f"## {say('use', language)}",
        "",
        "```python",
        "import trimtab",
        "",
        'classifier = trimtab.load("PATH/TO/THIS/FOLDER")',
        'print(classifier.predict(["a text"]))',
        "```",
        "",
    ]
    if found.base in sums:
        lines += [say("card_base", language, base=code(found.base), sha256=code(sums[found.base]))]
    lines += [
        say(
            "card_lora",
            language,
            variant=recipe.lora.variant,
            r=recipe.lora.r,
            alpha=recipe.lora.lora_alpha,
            targets=", ".join(map(code, recipe.lora.target_modules)),
        )
    ]
    if train:
        values = {
            "epochs": recipe.train.num_epochs,
            "done": len(found.evaluations),
            "batch": recipe.train.batch_size,
            "length": recipe.data.max_length,
        }
        rate = f"{recipe.train.learning_rate:g}"
        lines += [say("card_training", language, rows=count(train.used), rate=rate, **values)]
        if again := found.headline.refit_rows:
            lines += [say("card_refit", language, rows=count(again), epochs=found.headline.epoch)]
        if recipe.data.keep == "ends":
            lines += [say("card_ends", language)]
    lines += [""]
    if any(label.zh != label.en or label.value != label.en for label in found.labels):
        names = [[code(label.value), code(label.zh), code(label.en)] for label in found.labels[:_MOST_NAMES]]
        lines += [f"## {say('names', language)}", "", *_table([say("label", language), "zh", "en"], names), ""]
    return "\n".join([*lines, *_sections(found, language, level=2)]) + "\n"


def _body(found: Findings, language: str, level: int) -> Lines:
    return ["", *_verdict(found, language), *_sections(found, language, level)]


def _sections(found: Findings, language: str, level: int) -> Lines:
    """Every section that has something to tell, with its heading."""
    parts: list[tuple[str, Callable[[Findings, str], Lines]]] = [
        ("curves", _curves),
        ("matrix", _matrix),
        ("classes", _classes),
        ("mistakes", _mistakes),
        ("pairs", _pairs),
        ("doubts", _doubts),
        ("calibration", _calibration),
        ("data", _data),
        ("cost" if found.cost.seconds else "parameters", _cost),
        ("repeat", _repeat),
    ]
    lines: Lines = []
    for key, make in parts:
        if made := make(found, language):
            lines += [f"{'#' * level} {say(key, language)}", "", *made, ""]
    return lines[:-1]


def _verdict(found: Findings, language: str) -> Lines:
    lines = [f"**{wording.verdict(found, language)}** {' '.join(wording.notes(found, language))}", ""]
    if len(found.contenders) > 1:
        heads = [say(key, language) for key in ("contender", "accuracy", "macro_f1", "difference", "judged")]
        rows = [
            [
                say(one.name, language),
                score(one.accuracy),
                "" if one.macro_f1 is None else score(one.macro_f1),
                _difference(one),
                wording.judged(one, language),
            ]
            for one in found.contenders
        ]
        about = " ".join(say(f"about_{one.name}", language) for one in found.contenders[1:])
        lines += [*_table(heads, rows, right=(1, 2, 3)), "", about, ""]
    return lines


def _difference(one: Contender) -> str:
    if one.difference is None:
        return ""
    interval = f" ({' … '.join(map(signed, one.difference_interval))})" if one.difference_interval else ""
    return signed(one.difference) + interval


def _curves(found: Findings, language: str) -> Lines:
    lines = []
    if len(found.steps) > 1:
        first, last = found.steps[0], found.steps[-1]
        values = {"first": score(first.loss), "last": score(last.loss)}
        told = say("desc_train", language, **values, first_step=count(first.step), last_step=count(last.step))
        lines += [told, "", code(_sparks([one.loss for one in found.steps])), ""]
    if found.evaluations:
        trained = any(one.train_loss is not None for one in found.evaluations)
        heads = ["epoch", *(["train_loss"] if trained else []), "eval_loss", "accuracy", "macro_f1"]
        rows = [
            [
                str(one.epoch),
                *(["" if one.train_loss is None else score(one.train_loss)] if trained else []),
                score(one.loss),
                score(one.accuracy),
                score(one.macro_f1),
                say("chosen", language) if one.epoch == found.headline.epoch else "",
            ]
            for one in found.evaluations
        ]
        lines += _table([*(say(key, language) for key in heads), ""], rows, right=range(len(heads)))
    return lines if found.evaluations else lines[:-1]


def _sparks(values: Sequence[float]) -> str:
    """A line of bars, from the least value to the largest."""
    each = max(1, -(-len(values) // _SPARKS))
    means = [sum(group) / len(group) for group in (values[i : i + each] for i in range(0, len(values), each))]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int((value - low) / span * len(_BARS)))] for value in means)


def _matrix(found: Findings, language: str) -> Lines:
    if (m := found.matrix) is None:
        return []
    note = say("matrix_note_text", language)
    if m.left_out:
        values = {"all": len(found.labels), "shown": len(m.shown), "left_out": m.left_out}
        note += " " + say("matrix_left_out", language, **values, rows=count(m.left_out_rows))
    names = [_name(found, i, language) for i in m.shown]
    names += [say("others", language, n=m.left_out)] if m.left_out else []
    rows = []
    for name, row in zip(names, m.counts, strict=True):
        total = sum(row)
        cells = [f"{count(n)} ({percent(n / total)})" if n else "0" for n in row]
        rows.append([name, *cells, count(total)])
    heads = [say("label_answer", language).replace("\\", "\\\\"), *names, say("rows", language)]
    return [note, "", *_table(heads, rows, right=range(1, len(heads)))]


def _classes(found: Findings, language: str) -> Lines:
    if not found.classes:
        return []
    note = [say("classes_left_out", language, n=count(found.classes_left_out)), ""] if found.classes_left_out else []
    trained = any(one.train_rows is not None for one in found.classes)
    heads = ["label", "precision", "recall", "f1", "rows", *(["train_rows"] if trained else [])]
    rows = [
        [
            _name(found, one.label, language),
            score(one.precision),
            score(one.recall),
            score(one.f1),
            count(one.rows),
            *(["" if one.train_rows is None else count(one.train_rows)] if trained else []),
        ]
        for one in found.classes
    ]
    return [*note, *_table([say(key, language) for key in heads], rows, right=range(1, len(heads)))]


def _mistakes(found: Findings, language: str) -> Lines:
    if not found.mistakes:
        return []
    values = {"n": count(found.mistake_rows), "rows": count(found.headline.rows)}
    if found.mistake_rows > len(found.mistakes):
        note = say("mistakes_note", language, **values, shown=len(found.mistakes))
    else:
        note = say("mistakes_all", language, **values)
    heads = [say(key, language) for key in ("confidence", "label", "answer", "place", "text")]
    rows = [[score(one.confidence), *_row(found, one, language)] for one in found.mistakes]
    return [note, "", *_table(heads, rows, right=(0,))]


def _pairs(found: Findings, language: str) -> Lines:
    rows = []
    for one in found.pairs:
        first, second = _name(found, one.first, language), _name(found, one.second, language)
        there, back = count(one.first_as_second), count(one.second_as_first)
        rows.append([f"{first} → {second}", there, f"{second} → {first}", back, count(one.rows)])
    heads = [say(key, language) for key in ("arrow_note", "rows", "arrow_note", "rows", "both_ways")]
    return _table(heads, rows, right=(1, 3, 4)) if rows else []


def _doubts(found: Findings, language: str) -> Lines:
    if not found.doubts:
        return []
    note = say("doubts_note", language, n=count(found.doubt_rows))
    if found.doubts_are_mistakes:
        return [f"{note} {say('doubts_above', language, shown=len(found.doubts))}"]
    if found.doubt_rows > len(found.doubts):
        note += " " + say("doubts_some", language, shown=len(found.doubts))
    heads = [say(key, language) for key in ("confidence", "threshold", "label", "answer", "place", "text")]
    rows = [
        [score(one.example.confidence), score(one.threshold), *_row(found, one.example, language)]
        for one in found.doubts
    ]
    return [note, "", *_table(heads, rows, right=(0, 1))]


def _row(found: Findings, one: Example, language: str) -> list[str]:
    return [_name(found, one.label, language), _name(found, one.answer, language), code(one.place), code(one.text)]


def _calibration(found: Findings, language: str) -> Lines:
    if (c := found.calibration) is None:
        return []
    if not c.after or c.error_after is None or c.temperature is None:
        note = say("calibration_error", language, error=score(c.error_before))
        return [note, "", *_bins([(c.before, "before", "")], language)]
    temperature = f"{c.temperature:.2f}"
    values = {"temperature": temperature, "before": score(c.error_before), "after": score(c.error_after)}
    note = say("calibration_fitted", language, rows=count(c.fitted_rows), **values)
    if c.reported_on == "halves":
        note += " " + say("calibration_halves", language)
    return [note, "", *_bins([(c.before, "before", ""), (c.after, "after", temperature)], language)]


def _bins(columns: Sequence[tuple[Sequence[Bin], str, str]], language: str) -> Lines:
    """Accuracy of each bin that has rows, a pair of columns for each set of bins."""
    heads, rows = [say("confidence", language)], []
    for _, key, temperature in columns:
        heads += [say("rows", language), f"{say('accuracy', language)} · {say(key, language, temperature=temperature)}"]
    for bins in zip(*(bins for bins, _, _ in columns), strict=True):
        if any(one.rows for one in bins):
            cells = [cell for one in bins for cell in (count(one.rows), score(one.accuracy) if one.rows else "")]
            rows.append([f"{bins[0].low:.2f} … {bins[0].high:.2f}", *cells])
    return _table(heads, rows, right=range(1, len(heads)))


def _data(found: Findings, language: str) -> Lines:
    if not found.parts:
        return []
    files = [", ".join(map(code, part.files)) or say("split", language) for part in found.parts]
    rows = [[say("files", language), *files]]
    rows += [[say(key, language), *cells] for key, cells in wording.profile(found)]
    heads = ["", *(say(part.role, language) for part in found.parts)]
    lines = _table(heads, rows, right=range(1, len(heads)))
    if found.warnings:
        lines += ["", say("warnings", language), "", *(f"- {code(line)}" for line in found.warnings)]
    return lines


def _cost(found: Findings, language: str) -> Lines:
    rows = [list(line) for line in wording.costs(found, language)]
    lines = _table(["", "", ""], rows, right=(1,)) if rows else []
    if found.cost.machine:
        lines += ["", " · ".join(map(code, found.cost.machine))]
    return lines


def _repeat(found: Findings, language: str) -> Lines:
    repeat, lines = found.repeat, []
    for key, command in (("repeat_from_run", repeat.from_run), ("repeat_anew", repeat.command)):
        if command:
            lines += [say(key, language), "", *_fenced(command), ""]
    if repeat.settings:
        heads = [say(key, language) for key in ("setting", "value", "default")]
        rows = [[code(cell) for cell in setting] for setting in repeat.settings]
        lines += [say("settings_note", language), "", *_table(heads, rows), ""]
    if repeat.sums:
        lines += [*_table(["", say("sums", language)], [[code(name), code(sha)] for name, sha in repeat.sums]), ""]
        lines += [say("sums_left_out", language, n=count(repeat.sums_left_out)), ""] if repeat.sums_left_out else []
    if repeat.versions:
        lines += [", ".join(f"{code(name)} {code(version)}" for name, version in repeat.versions), ""]
    return lines[:-1]


def code(text: str) -> str:
    """A code span that shows exactly this text, in a table too; the empty text stays empty."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    gap = " " if text.startswith("`") or text.endswith("`") or (text != text.strip() and text.strip()) else ""
    # A pipe would end a cell even here; with its backslash it is a pipe again. Behind a backslash of the text's own
    # some readers would see that one escaped and not the pipe, so a space goes between.
    return f"{fence}{gap}{text}{gap}{fence}".replace("\\|", "\\ |").replace("|", "\\|") if text else ""


def yaml(text: str) -> str:
    """A scalar of the front matter: plain where that is safe, else in quotes."""
    if re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in (
        "true",
        "false",
        "null",
        "yes",
        "no",
        "on",
        "off",
    ):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _fenced(text: str) -> Lines:
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return [f"{fence}bash", text, fence]


def _name(found: Findings, i: int, language: str) -> str:
    label = found.labels[i]
    return code({"zh": label.zh, "en": label.en}[language])


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Lines:
    """A table whose columns line up; the last is not padded, and columns in `right` stand to the right."""
    cells = [heads, *rows]
    widths = [max(3, *(min(_WIDEST, cell_len(row[i])) for row in cells)) for i in range(len(heads))]

    def line(row: Sequence[str]) -> str:
        shown = []
        for i, cell in enumerate(row):
            space = " " * max(0, widths[i] - cell_len(cell))
            shown.append(space + cell if i in right else cell if i == len(heads) - 1 else cell + space)
        return "| " + " | ".join(shown) + " |"

    rule = [
        "-" * (widths[i] - 1) + ":" if i in right else "-" * (3 if i == len(heads) - 1 else widths[i])
        for i in range(len(heads))
    ]
    return [line(heads), "| " + " | ".join(rule) + " |", *map(line, rows)]
