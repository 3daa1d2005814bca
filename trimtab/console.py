"""What people see of a run: one live line on a terminal, a line now and then elsewhere. Made from events alone."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from trimtab.errors import plain
from trimtab.report import calibration_lines, data_lines, parameter_lines, score_line, verdict_lines
from trimtab.trunk import size_text
from trimtab.wording import duration

_SPARSE_S = 10.0  # seconds between two step lines where there is no live line


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields an observer that prints events to `stream` (stderr by default); the live line is gone at the end."""
    # A notebook paints stderr red, as an error.
    target = stream or (sys.stdout if "ipykernel" in sys.modules else sys.stderr)
    live = _LiveLine(target) if target.isatty() else None
    last = 0.0

    def observe(event: Mapping[str, Any]) -> None:
        nonlocal last
        if event["event"] == "progress":
            if live:
                live.show(_progress_text(event))
            return
        if event["event"] == "step":
            if live or time.monotonic() - last < _SPARSE_S:
                return
            last = time.monotonic()
        if live:
            live.clear()
        for line in event_lines(event):
            print(plain(line), file=target, flush=True)

    try:
        yield observe
    finally:
        with suppress(OSError):  # the terminal may be gone
            if live:
                live.clear()


class _LiveLine:
    """One line that is written over; a carriage return and blanks are all it needs, on any terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.length, self.last = stream, 0, 0.0

    def show(self, text: str) -> None:
        if time.monotonic() - self.last < 0.2:
            return
        self.last = time.monotonic()
        line = text[: shutil.get_terminal_size().columns - 1]  # a line that wraps cannot be written over
        self.stream.write("\r" + line + " " * max(0, self.length - len(line)))
        self.stream.flush()
        self.length = len(line)

    def clear(self) -> None:
        if self.length:
            self.stream.write("\r" + " " * self.length + "\r")
            self.stream.flush()
            self.length = 0


def _progress_text(event: Mapping[str, Any]) -> str:
    if "doing" in event:
        return f"  {event['doing']}"
    if "kept" in event:
        return f"  lower layers of {event['kept']:,} of {event['rows']:,} rows"
    if "evaluated" in event:
        return f"  evaluating {event['evaluated']:,} of {event['eval_rows']:,} rows"
    share, what = event["step"] / event["steps"], "once more: step" if event.get("refit") else "step"
    return (
        f"  [{'#' * int(20 * share):<20}] {what} {event['step']:,}/{event['steps']:,}  loss {event['loss']:.3f}  "
        f"{event['tokens_per_s']:,.0f} tokens/s  {duration(event['remaining_s'])} left"
    )


_WITH_TEXT = {"warning": "! ", "head": "head    ", "search": "search  "}


def event_lines(event: Mapping[str, Any]) -> list[str]:
    """The lines that an event is worth on paper."""
    kind = event["event"]
    if kind == "start":
        return _start_lines(event)
    if kind in _WITH_TEXT:
        return [f"{_WITH_TEXT[kind]}{event['text']}"]
    if kind == "trunk":
        return [_trunk_line(event)]
    if kind == "resume":
        return [f"resume  from {event['path']}{' of the training on all rows' if event.get('refit') else ''}"]
    if kind == "forecast":
        return [f"plan    after {event['step']} steps: {duration(event['remaining_s'])} of training left"]
    if kind == "not_finite":
        return [
            f"! step {event['step']:,} changed nothing: loss {event['loss']}, gradient norm {event['gradient_norm']}"
        ]
    if kind == "step":
        return [
            f"step    {event['step']:,}/{event['steps']:,}  loss {event['loss']:.4f}  "
            f"learning rate {event['learning_rate']:.2e}  {event['tokens_per_s']:,.0f} tokens/s"
        ]
    if kind == "refit":
        return [
            f"refit   once more from the start, {event['epochs']} epochs; "
            f"{rows_to_train_on(event['rows'], event['label_names'])}, those kept for evaluation too"
        ]
    if kind == "eval":
        return [
            f"epoch   {event['epoch']}  evaluation loss {event['loss']:.4f}  accuracy {event['accuracy']:.4f}  "
            f"macro F1 {event['macro_f1']:.4f}{'  kept' if event['best'] else ''}"
        ]
    if kind == "end":
        return _end_lines(event)
    return []


def _trunk_line(event: Mapping[str, Any]) -> str:
    """What goes to the cache or comes from it."""
    layers = f"the lower {event['depth']} of {event['layers']} layers of {event['rows']:,} rows"
    if not event["bytes_written"]:
        return f"trunk   {layers}: {size_text(event['bytes'])} are in {event['folder']} already"
    return (
        f"trunk   {layers}, computed once: {size_text(event['bytes_written'])} go to {event['folder']}, where "
        f"{size_text(event['limit_bytes'])} may lie (runtime.trunk_cache=off keeps nothing)"
    )


def rows_to_train_on(rows: int, named: int) -> str:
    """`847 rows to train on (77 of them label names)`."""
    return f"{rows:,} rows to train on" + (f" ({named:,} of them label names)" if named else "")


def _start_lines(event: Mapping[str, Any]) -> list[str]:
    recipe = event["recipe"]
    labels = event["labels"]
    shown = ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
    return [
        f"run     {event['run']}",
        f"data    {rows_to_train_on(event['rows'], event['data']['train']['label_names'])}, "
        f"{event['eval_rows']:,} to evaluate"
        + (f", {event['test_rows']:,} to test" if event["test_rows"] else "")
        + f"; text <- {recipe['data']['text']}, label <- {recipe['data']['label']}",
        *(f"        {line}" for line in data_lines(event["data"], whole=False)),
        f"labels  {len(labels)}: {shown}",
        f"base    {event['base_line']}",
        *([f"from    {event['warm_start']}"] if event["warm_start"] else []),
        f"on      {event['placement']}",
        *(f"        {line}" for line in parameter_lines(event["parameters"])),
        f"plan    {recipe['train']['num_epochs']} epochs of {event['steps_per_epoch']:,} steps, batches of "
        f"{recipe['train']['batch_size']}, learning rate {recipe['train']['learning_rate']:g}, "
        f"cut at {recipe['data']['max_length']} tokens",
        *_cost_lines(event),
    ]


def plan_lines(planned: Mapping[str, Any]) -> list[str]:
    """What `trimtab estimate` says; `planned` is `Planned.as_dict()`."""
    found = planned["estimate"]
    each = planned["tokens"] / planned["rows"]
    return [
        f"data    {rows_to_train_on(planned['rows'], planned['label_names'])}, {each:.0f} tokens each, "
        f"{planned['eval_rows']:,} to evaluate"
        + (f", {planned['test_rows']:,} to test" if planned["test_rows"] else ""),
        f"on      {planned['on']}",
        f"plan    {found['epochs']} epochs, {found['steps']:,} steps: {duration(found['epoch_seconds'])} an epoch, "
        f"{duration(found['eval_seconds'])} its evaluation",
        *_cost_lines(planned),
    ]


def _cost_lines(event: Mapping[str, Any]) -> list[str]:
    """Time and memory, and what a budget has chosen; nothing where a run goes on."""
    lines = []
    if event["budget"]:
        chosen = ", ".join(f"{key} = {value}" for key, value in event["budget"].items())
        lines.append(f"budget  {chosen}")
    if found := event["estimate"]:
        parts = [
            f"{name} {duration(found[key])}"
            for key, name in (
                ("trunk_seconds", "the lower layers"),
                ("head_start_seconds", "the head's start"),
                ("refit_seconds", "once more on all rows"),
            )
            if found[key]
        ]
        lines.append(
            f"        about {duration(found['trunk_seconds'] + found['train_seconds'])} of training "
            + (f"({', '.join(parts)}) " if parts else "")
            + f"and {found['peak_bytes'] / 1e9:.1f} GB of "
            f"memory ({found['available_bytes'] / 1e9:.1f} GB are free)"
        )
    return lines


def _end_lines(event: Mapping[str, Any]) -> list[str]:
    scores = event["metrics"]
    where = "test rows, seen once" if scores["scored_on"] == "test" else "evaluation rows, which also chose the epoch"
    if scores.get("refit_rows") and scores["scored_on"] == "eval":
        where += ", before it was trained once more on these too"
    return [
        f"done    {score_line(scores)}",
        *(f"        {line}" for line in verdict_lines(scores)),
        *(f"        {line}" for line in calibration_lines(scores)),
        f"        on the {where}; epoch {scores['epoch']}; "
        f"{duration(scores['train_seconds'])} of training, {scores['peak_rss_bytes'] / 1e9:.2f} GB at most",
        f"        adapter of {scores['adapter_bytes'] / 1e3:,.0f} kB, loaded again in a fresh process: "
        f"largest difference {scores['largest_difference_after_reload']:.1g}",
    ]
