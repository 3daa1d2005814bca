"""Values to SVG strings: small charts that a page holds inline, drawn in the colours of the page around them.

Each has a title and a description with the figures that matter, for readers who hear it. Colours are classes, so that
both colour schemes and print are the stylesheet's; series differ in shape too, for whoever sees no colours. All words
come from `wording`, and nothing of the data stands in a chart but numbers.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

from trimtab.findings import Bin, Contender, Evaluation, Findings
from trimtab.wording import count, duration, percent, say, score

_WIDTH = 440  # in the units of a chart; two stand side by side on a wide page, one fills a narrow one
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 26, 34
_MOST_TOLD = 20  # evaluations in a description


def standing(contenders: Sequence[Contender], language: str) -> str:
    """Accuracies as dots with their 95 % intervals, one line each."""
    row, left = 28, 96
    height = row * len(contenders) + 30
    low = min(one.interval[0] if one.interval else one.accuracy for one in contenders)
    high = max(one.interval[1] if one.interval else one.accuracy for one in contenders)
    ticks = _ticks(max(0.0, low - 0.02), min(1.0, high + 0.02), 5)
    x = _scale(ticks[0], ticks[-1], left, _WIDTH - 48)
    bottom = height - 22
    parts = [_vertical_grid(x, ticks, 4, bottom)]
    told = []
    for i, one in enumerate(contenders):
        y, name, kind = row * i + 18, say(one.name, language), "ours" if one.name == "adapter" else "theirs"
        parts.append(_text(left - 10, y + 4, name, "end", "word"))
        if one.interval:
            a, b = x(one.interval[0]), x(one.interval[1])
            parts.append(f'<path class="whisker {kind}" d="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 4}v8M{b:.1f} {y - 4}v8"/>')
        parts.append(f'<circle class="dot {kind}" cx="{x(one.accuracy):.1f}" cy="{y}" r="4.5"/>')
        parts.append(_text(_WIDTH, y + 4, score(one.accuracy), "end", "figure"))
        values = {"name": name, "accuracy": score(one.accuracy)}
        if one.interval:
            ends = {"low": score(one.interval[0]), "high": score(one.interval[1])}
            told.append(say("standing_interval", language, **values, **ends))
        else:
            told.append(say("standing_one", language, **values))
    text = say("semicolon", language).join(told) + say("stop", language)
    return _svg(height, say("standing_title", language), text, parts)


def loss(found: Findings, language: str) -> str:
    """Training loss by step and evaluation loss by epoch; empty where neither has two points."""
    if max(len(found.steps), len(found.evaluations)) < 2:
        return ""
    trained = [(one.epoch, one.loss) for one in found.steps]
    evaluated = [(float(one.epoch), one.loss) for one in found.evaluations]
    text = []
    if found.steps:
        first, last = found.steps[0], found.steps[-1]
        values = {"first": score(first.loss), "last": score(last.loss)}
        text.append(say("desc_train", language, **values, first_step=count(first.step), last_step=count(last.step)))
    text += _told(found, "desc_eval", lambda one: {"loss": score(one.loss)}, language)
    series = [("train_loss", "train", trained), ("eval_loss", "ours", evaluated)]
    return _curves(say("loss_title", language), text, series, found.headline.epoch, language, floor=0.0)


def scores(found: Findings, language: str) -> str:
    """Accuracy and macro F1 on the evaluation rows by epoch; empty for a single epoch."""
    if len(found.evaluations) < 2:
        return ""
    text = _told(
        found,
        "desc_score",
        lambda one: {"accuracy": score(one.accuracy), "macro_f1": score(one.macro_f1)},
        language,
    )
    series = [
        ("accuracy", "ours", [(float(one.epoch), one.accuracy) for one in found.evaluations]),
        ("macro_f1", "second", [(float(one.epoch), one.macro_f1) for one in found.evaluations]),
    ]
    return _curves(say("score_title", language), text, series, found.headline.epoch, language)


def reliability(bins: Sequence[Bin], error: float, which: str, language: str) -> str:
    """Accuracy of each bin as a bar against the diagonal, and below it how many rows the bin has."""
    height, strip = 300, 34
    floor = height - _BOTTOM - strip - 6
    x, y = _scale(0, 1, _LEFT, _WIDTH - _RIGHT), _scale(0, 1, floor, 10)
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    parts = [_horizontal_grid(y, ticks, _LEFT, _WIDTH - _RIGHT)]
    most = max(one.rows for one in bins) or 1
    told = []
    for one in bins:
        if not one.rows:
            continue
        left, width = x(one.low) + 1, x(one.high) - x(one.low) - 2
        top, middle = y(one.accuracy), y(one.confidence)
        parts.append(f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{floor - top:.1f}"/>')
        # The mean confidence of the bin: the bar should end here.
        parts.append(f'<path class="meant" d="M{left:.1f} {middle:.1f}h{width:.1f}"/>')
        share = strip * math.sqrt(one.rows / most)  # the root: bins of ten rows stay visible beside ten thousand
        base = height - _BOTTOM
        parts.append(
            f'<rect class="amount" x="{left:.1f}" y="{base - share:.1f}" width="{width:.1f}" height="{share:.1f}"/>'
        )
        values = {"low": f"{one.low:.2f}", "high": f"{one.high:.2f}", "rows": count(one.rows)}
        told.append(say("desc_bin", language, **values, accuracy=score(one.accuracy)))
    parts.append(f'<path class="diagonal" d="M{x(0):.1f} {y(0):.1f}L{x(1):.1f} {y(1):.1f}"/>')
    parts += [_text(x(tick), height - _BOTTOM + 14, f"{tick:.1f}", "middle", "tick") for tick in ticks]
    parts.append(_text(_WIDTH - _RIGHT, height - 4, say("confidence", language), "end", "axis"))
    parts.append(_text(_LEFT + 8, 22, which, "start", "word"))
    title = say("reliability_title", language, which=which)
    return _svg(height, title, " ".join([say("desc_error", language, error=score(error)), *told]), parts)


def shares(seconds: Sequence[tuple[str, float]], language: str) -> str:
    """Where the time went, as one bar with a legend below."""
    whole = sum(value for _, value in seconds) or 1.0
    parts, told, left, line = [], [], 0.0, 0
    for i, (name, value) in enumerate(seconds):
        width = _WIDTH * value / whole
        words = f"{say(name, language)} {duration(value)} ({percent(value / whole)})"
        parts.append(
            f'<rect class="part part-{i}" x="{left:.1f}" y="0" width="{max(width - 1, 0.5):.1f}" height="16"/>'
        )
        parts.append(f'<rect class="part part-{i}" x="0" y="{28 + 20 * line}" width="10" height="10"/>')
        parts.append(_text(18, 37 + 20 * line, words, "start", "word"))
        told.append(words)
        left, line = left + width, line + 1
    text = say("semicolon", language).join(told) + say("stop", language)
    return _svg(28 + 20 * line, say("time_title", language), text, parts)


def _told(found: Findings, key: str, values: Callable[[Evaluation], dict[str, str]], language: str) -> list[str]:
    lines = [say(key, language, epoch=one.epoch, **values(one)) for one in found.evaluations[:_MOST_TOLD]]
    return [*lines, say("desc_chosen", language, epoch=found.headline.epoch)]


def _curves(
    title: str,
    text: Sequence[str],
    series: Sequence[tuple[str, str, list[tuple[float, float]]]],
    chosen: int,
    language: str,
    floor: float | None = None,
) -> str:
    """Lines over epochs; each of `series` is the key of its name, its class, and its points (epoch, value)."""
    height = 240
    drawn = [one for one in series if one[2]]
    epochs, values = zip(*(point for _, _, points in drawn for point in points), strict=True)
    ticks = _ticks(min(values) if floor is None else floor, max(values), 5)
    x = _scale(0.0 if floor is not None else 1.0, max(epochs), _LEFT, _WIDTH - _RIGHT)
    y = _scale(ticks[0], ticks[-1], height - _BOTTOM, _TOP)
    parts = [_horizontal_grid(y, ticks, _LEFT, _WIDTH - _RIGHT)]
    every = math.ceil(max(epochs) / 10)
    whole = range(0 if floor is not None else 1, int(max(epochs)) + 1, every)
    parts += [_text(x(epoch), height - _BOTTOM + 16, str(epoch), "middle", "tick") for epoch in whole]
    parts.append(_text(_WIDTH - _RIGHT, height - 2, say("epoch", language), "end", "axis"))
    parts.append(f'<path class="chosen" d="M{x(chosen):.1f} {_TOP}V{height - _BOTTOM}"/>')
    left = _LEFT
    for key, kind, points in drawn:
        line = "M" + "L".join(f"{x(epoch):.1f} {y(value):.1f}" for epoch, value in points)
        parts.append(f'<path class="line {kind}" d="{line}"/>')
        if kind != "train":
            parts += [f'<circle class="dot {kind}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"/>' for a, b in points]
        parts.append(f'<path class="line {kind}" d="M{left} 9h18"/>')
        if kind != "train":
            parts.append(f'<circle class="dot {kind}" cx="{left + 9}" cy="9" r="3.5"/>')
        parts.append(_text(left + 24, 13, say(key, language), "start", "word"))
        left += 150
    return _svg(height, title, " ".join(text), parts)


def _svg(height: float, title: str, text: str, parts: Sequence[str]) -> str:
    return (
        f'<svg role="img" viewBox="0 0 {_WIDTH} {height:.0f}">'
        f"<title>{escape(title)}</title><desc>{escape(text)}</desc>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _horizontal_grid(y: Callable[[float], float], ticks: Sequence[float], left: float, right: float) -> str:
    lines = "".join(f"M{left} {y(tick):.1f}H{right}" for tick in ticks)
    digits = _digits(ticks)
    words = "".join(_text(left - 8, y(tick) + 4, f"{tick:.{digits}f}", "end", "tick") for tick in ticks)
    return f'<path class="grid" d="{lines}"/>{words}'


def _vertical_grid(x: Callable[[float], float], ticks: Sequence[float], top: float, bottom: float) -> str:
    lines = "".join(f"M{x(tick):.1f} {top}V{bottom}" for tick in ticks)
    digits = _digits(ticks)
    words = "".join(_text(x(tick), bottom + 16, f"{tick:.{digits}f}", "middle", "tick") for tick in ticks)
    return f'<path class="grid" d="{lines}"/>{words}'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Values low..high to places start..end; where they are one value, to the middle."""
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round values that enclose low..high, at most `most` steps apart by 1, 2 or 5 times a power of ten."""
    span = max(high - low, 1e-3)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * by for by in (1, 2, 5, 10) if span / (power * by) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def _digits(ticks: Sequence[float]) -> int:
    """Decimals that tell neighbouring ticks apart."""
    return max(0, -math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9))
