"""Every sentence of the report, in English and Chinese, in this one place.

Both languages have the same keys and the same gaps. Values are put in by `str.format`; numbers look alike in both.
Page, charts and Markdown take their words from here.
"""

from collections.abc import Callable, Sequence
from typing import Any

from trimtab.findings import Contender, Findings

LANGUAGES = ("en", "zh")

_EN = {
    "title": "Report of a run",
    "switch": "Language",
    "started": "started {when}",
    "about_base": "LoRA adapter on {base}",
    # The verdict.
    "verdict": "Verdict",
    "beats": "The adapter beats {names}",
    "undecided": "These rows do not show that the adapter beats {names}",
    "loses": "The adapter does worse than {names}",
    "beats_too": "it does beat {names}",
    "undecided_too": "against {names} these rows do not decide",
    "accuracy_on": ": accuracy {accuracy} (95 % interval {low} to {high}) on {rows} {part}, against {others}.",
    "accuracy_alone": "Accuracy {accuracy} (95 % interval {low} to {high}) on {rows} {part}.",
    "against": "{accuracy} ({name})",
    "and": " and ",
    "comma": ", ",
    "listed": ", ",
    "last": " and ",
    "semicolon": "; ",
    "stop": ".",
    "test_rows": "test rows",
    "eval_rows": "evaluation rows",
    "macro_f1_is": "Macro F1 {macro_f1}, mean loss {loss}, after epoch {epoch}.",
    "test_note": "The test rows were scored once, at the end: nothing was chosen on them.",
    "known_test_note": "The test rows were scored once, at the end, but {rows} of them stand in the files that the run "
    "was trained or chosen on.",
    "no_baselines_note": "What simpler methods come to was not computed: the commonest label alone stands beside.",
    "refit_test_note": "After the epoch was chosen, the adapter was trained once more, on {rows} rows: those "
    "kept for evaluation too.",
    "refit_eval_note": "After the epoch was chosen, the adapter was trained once more, on {rows} rows: these too. "
    "The scores here are of the model before that, which had not learned from them.",
    "eval_note": "These rows also chose the epoch, so the score leans to the good side; rows that nobody looks at "
    "before the end go to --test.",
    "clean_note": "On the {rows} rows whose texts stand in no other file of the run: accuracy {accuracy}.",
    "adapter": "adapter",
    "probe": "probe",
    "tfidf": "TF-IDF",
    "majority": "majority",
    "the_probe": "a linear probe",
    "the_tfidf": "TF-IDF",
    "the_majority": "the commonest label",
    "about_probe": "Probe: logistic regression on the frozen base.",
    "about_tfidf": "TF-IDF: logistic regression on counted words, without the base.",
    "about_majority": "Majority: always the commonest label of these rows.",
    "contender": "model",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "difference": "adapter minus this (95 %)",
    "judged": "the adapter is",
    "better": "better",
    "worse": "worse",
    "not resolved": "not resolved",
    "by_chance": "not resolved: few rows differ, McNemar p {p}",
    "standing_title": "Accuracy of the adapter and of the baselines",
    "standing_one": "{name} {accuracy}",
    "standing_interval": "{name} {accuracy} (95 % interval {low} to {high})",
    # Curves.
    "curves": "Training",
    "loss": "loss",
    "epoch": "epoch",
    "step": "step",
    "train_loss": "training loss",
    "eval_loss": "evaluation loss",
    "chosen": "chosen",
    "loss_title": "Loss by epoch",
    "score_title": "Accuracy and macro F1 on the evaluation rows by epoch",
    "desc_train": "Training loss goes from {first} at step {first_step} to {last} at step {last_step}.",
    "desc_eval": "Epoch {epoch}: evaluation loss {loss}.",
    "desc_score": "Epoch {epoch}: accuracy {accuracy}, macro F1 {macro_f1}.",
    "desc_chosen": "Epoch {epoch} was chosen.",
    "one_evaluation": "After epoch {epoch} (step {step}) the evaluation rows had loss {loss}, accuracy {accuracy} and "
    "macro F1 {macro_f1}.",
    # The matrix.
    "matrix": "Confusion matrix",
    "matrix_note": "A row is a label, a column an answer; each cell has the number of rows, and below it their share "
    "of the label. A cell opens its examples.",
    "matrix_note_text": "A row is a label, a column an answer; each cell has the number of rows and their share of the "
    "label.",
    "matrix_left_out": "Of {all} labels, the {shown} with the most mistakes are shown; the other {left_out}, with "
    "{rows} rows, share the last row and column.",
    "label_answer": "label \\ answer",
    "others": "{n} others",
    "rows": "rows",
    "cell_title": "Label {label}, answered {answer}",
    "cell_count": "{n} of the label's {rows} rows ({share}).",
    "cell_some": "Shown: {shown}.",
    "close": "Close",
    # Classes.
    "classes": "By label",
    "classes_left_out": "{n} labels with a higher F1 are left out.",
    "label": "label",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "train_rows": "training rows",
    # Mistakes.
    "mistakes": "Worst mistakes",
    "mistakes_note": "{n} of {rows} answers are wrong; these {shown} were given with the most confidence.",
    "mistakes_all": "{n} of {rows} answers are wrong, the surest first.",
    "answer": "answer",
    "text": "text",
    "place": "file, line",
    "pairs": "Most confused pairs",
    "both_ways": "both ways",
    "arrow_note": "label → answer",
    # Doubts.
    "doubts": "Likely label errors",
    "doubts_note": "In {n} rows the model contradicts the label, and is at least as sure as it is on average where "
    "rows carry the label that it proposes (confident learning, Northcutt et al. 2021). Some of them are its own "
    "mistakes: look at them before you change one.",
    "doubts_some": "The clearest {shown} are shown.",
    "doubts_above": "The clearest {shown} of them are the first {shown} of the worst mistakes above.",
    "threshold": "threshold",
    # Calibration.
    "calibration": "Calibration",
    "calibration_note": "Answers in 15 bins of confidence: where bars reach the diagonal, 80 % sure is right in 80 of "
    "100 cases. The strip below has the number of rows.",
    "calibration_fitted": "A temperature of {temperature}, fitted on {rows} rows, changes the expected calibration "
    "error from {before} to {after}.",
    "calibration_halves": "Both errors were measured on the half that did not fit the temperature, in turn, over ten "
    "draws of the halves; the diagram shows all rows.",
    "calibration_error": "The expected calibration error is {error}.",
    "before": "as trained",
    "after": "with temperature {temperature}",
    "reliability_title": "Accuracy by confidence, {which}",
    "confidence": "confidence",
    "desc_bin": "Confidence {low} to {high}: {rows} rows, accuracy {accuracy}.",
    "desc_error": "Expected calibration error {error}.",
    # Data.
    "data": "Data",
    "train": "training",
    "eval": "evaluation",
    "test": "test",
    "split": "split from the training files",
    "files": "files",
    "rows_in": "rows read",
    "skipped": "set aside",
    "used": "used",
    "label_names": "label names beside them",
    "labels": "labels",
    "majority_share": "share of the commonest label",
    "duplicates": "rows that repeat another",
    "conflicts": "texts with several labels",
    "overlap": "rows known before",
    "tokens": "tokens",
    "texts_cut": "texts cut",
    "tokens_cut": "tokens cut",
    "warnings": "Told before training",
    # Cost.
    "cost": "Cost",
    "parameters": "Parameters",
    "base_parameters": "full fine-tuning would train",
    "lora_parameters": "LoRA alone",
    "head_parameters": "head, trained in full",
    "trainable_parameters": "trained together",
    "adapter_bytes": "adapter files",
    "time_title": "Where the time went",
    "search": "search for the learning rate",
    "load": "reading and loading",
    "trunk": "the frozen layers, once for all epochs",
    "baselines": "baselines",
    "verify": "verification",
    "other": "everything else",
    "total": "the last process, in all",
    "estimated": "estimated before: {value}",
    "peak": "memory at most",
    "speed": "speed",
    "tokens_per_s": "{n} tokens/s",
    "padding": "padding",
    "reload": "largest difference of a logit after loading again",
    # Repeating.
    "repeat": "Repeat it",
    "repeat_from_run": "From this run directory, to the byte:",
    "repeat_anew": "From the files:",
    "setting": "setting",
    "value": "value",
    "default": "default",
    "settings_note": "Settings that are not the default, with every auto settled:",
    "sums": "sha256",
    "sums_left_out": "and {n} more, in recipe.toml",
    "versions": "versions",
    # The card.
    "card": "LoRA adapter for text classification",
    "card_base": "Base: {base}, weights sha256 {sha256}.",
    "card_lora": "{variant} with r={r}, lora_alpha={alpha} on {targets}.",
    "card_training": "Trained on {rows} rows: {done} of at most {epochs} epochs, batches of {batch}, learning rate "
    "{rate}, texts cut at {length} tokens.",
    "card_refit": "Then once more from the start on {rows} rows, those kept for evaluation too: {epochs} epochs.",
    "card_ends": "Of a longer text, a quarter of these are its first tokens and three quarters its last.",
    "use": "How to use it",
    "names": "Labels",
}

_ZH = {
    "title": "运行报告",
    "switch": "语言",
    "started": "开始于 {when}",
    "about_base": "基座模型 {base} 上的 LoRA 适配器",
    "verdict": "结论",
    "beats": "适配器优于{names}",
    "undecided": "凭这些行还看不出适配器优于{names}",
    "loses": "适配器不如{names}",
    "beats_too": "但优于{names}",
    "undecided_too": "与{names}相比，这些行分不出高下",
    "accuracy_on": "：在 {rows} 条{part}上准确率为 {accuracy}（95 % 区间 {low} 至 {high}），对比{others}。",
    "accuracy_alone": "在 {rows} 条{part}上准确率为 {accuracy}（95 % 区间 {low} 至 {high}）。",
    "against": "{name} {accuracy}",
    "and": "和",
    "comma": "、",
    "listed": "、",
    "last": "、",
    "semicolon": "；",
    "stop": "。",
    "test_rows": "测试行",
    "eval_rows": "评估行",
    "macro_f1_is": "宏平均 F1 为 {macro_f1}，平均损失 {loss}，取自第 {epoch} 轮之后。",
    "test_note": "测试行只在最后计分一次，没有任何选择依据过它们。",
    "known_test_note": "测试行只在最后计分一次，但其中 {rows} 行也出现在训练或选择所用的文件里。",
    "no_baselines_note": "没有计算更简单的方法能做到多少：旁边只有最常见标签。",
    "refit_test_note": "选定轮次之后，适配器又用 {rows} 行（包括留作评估的行）重新训练了一次。",
    "refit_eval_note": "选定轮次之后，适配器又用 {rows} 行（包括这些行）重新训练了一次；"
    "这里的得分属于在那之前、没有学过这些行的模型。",
    "eval_note": "这些行也用来挑选轮次，所以得分偏高；想要到最后才查看的行，请交给 --test。",
    "clean_note": "只看文本不在本次运行其他文件里的 {rows} 行，准确率为 {accuracy}。",
    "adapter": "适配器",
    "probe": "线性探针",
    "tfidf": "TF-IDF",
    "majority": "多数类",
    "the_probe": "线性探针",
    "the_tfidf": "词频法（TF-IDF）",
    "the_majority": "总答最常见标签的做法",
    "about_probe": "线性探针：在冻结的基座上做逻辑回归。",
    "about_tfidf": "TF-IDF：不用基座，只在词频上做逻辑回归。",
    "about_majority": "多数类：一律回答这些行里最常见的标签。",
    "contender": "模型",
    "accuracy": "准确率",
    "macro_f1": "宏平均 F1",
    "difference": "适配器高出（95 % 区间）",
    "judged": "适配器",
    "better": "更好",
    "worse": "更差",
    "not resolved": "分不出",
    "by_chance": "分不出：答案不同的行太少，McNemar p = {p}",
    "standing_title": "适配器与各基线的准确率",
    "standing_one": "{name} {accuracy}",
    "standing_interval": "{name} {accuracy}（95 % 区间 {low} 至 {high}）",
    "curves": "训练过程",
    "loss": "损失",
    "epoch": "轮次",
    "step": "步",
    "train_loss": "训练损失",
    "eval_loss": "评估损失",
    "chosen": "选用",
    "loss_title": "各轮的损失",
    "score_title": "各轮在评估行上的准确率和宏平均 F1",
    "desc_train": "训练损失从第 {first_step} 步的 {first} 到第 {last_step} 步的 {last}。",
    "desc_eval": "第 {epoch} 轮：评估损失 {loss}。",
    "desc_score": "第 {epoch} 轮：准确率 {accuracy}，宏平均 F1 {macro_f1}。",
    "desc_chosen": "选用第 {epoch} 轮。",
    "one_evaluation": "第 {epoch} 轮结束时（第 {step} 步），评估行的损失为 {loss}，"
    "准确率 {accuracy}，宏平均 F1 {macro_f1}。",
    "matrix": "混淆矩阵",
    "matrix_note": "行是标签，列是回答；每格是行数，下面是占该标签的比例。点开一格可看例子。",
    "matrix_note_text": "行是标签，列是回答；每格是行数和占该标签的比例。",
    "matrix_left_out": "共 {all} 个标签，这里列出错误最多的 {shown} 个；"
    "其余 {left_out} 个（{rows} 行）合在最后一行和最后一列。",
    "label_answer": "标签 \\ 回答",
    "others": "其余 {n} 个",
    "rows": "行数",
    "cell_title": "标签 {label}，回答 {answer}",
    "cell_count": "该标签的 {rows} 行里有 {n} 行（{share}）。",
    "cell_some": "这里列出 {shown} 行。",
    "close": "关闭",
    "classes": "各标签",
    "classes_left_out": "F1 更高的 {n} 个标签没有列出。",
    "label": "标签",
    "precision": "精确率",
    "recall": "召回率",
    "f1": "F1",
    "train_rows": "训练行数",
    "mistakes": "最严重的错误",
    "mistakes_note": "{rows} 个回答里错了 {n} 个；下面是其中最自信的 {shown} 个。",
    "mistakes_all": "{rows} 个回答里错了 {n} 个，最自信的排在最前。",
    "answer": "回答",
    "text": "文本",
    "place": "文件和行号",
    "pairs": "最易混淆的标签",
    "both_ways": "合计",
    "arrow_note": "标签 → 回答",
    "doubts": "可能标错的行",
    "doubts_note": "有 {n} 行，模型的回答与标签相反，而且把握不低于它在带有该回答标签的行上的平均把握"
    "（置信学习，Northcutt 等，2021）。其中也有模型自己的错：改标签之前请先看一眼。",
    "doubts_some": "这里列出最明显的 {shown} 行。",
    "doubts_above": "其中最明显的 {shown} 行，就是上面最严重的错误中的前 {shown} 行。",
    "threshold": "阈值",
    "calibration": "校准",
    "calibration_note": "按置信度把回答分成 15 格：柱子够到对角线，就是说有 80 % 把握的回答，"
    "100 次里对 80 次。下方的窄条是行数。",
    "calibration_fitted": "温度 {temperature}（在 {rows} 行上拟合）使期望校准误差从 {before} 变为 {after}。",
    "calibration_halves": "两个误差都是在没有参与拟合的那一半上轮流测得的（对半抽取十次取平均）；图中是全部的行。",
    "calibration_error": "期望校准误差为 {error}。",
    "before": "训练所得",
    "after": "温度 {temperature}",
    "reliability_title": "各置信度的准确率，{which}",
    "confidence": "置信度",
    "desc_bin": "置信度 {low} 至 {high}：{rows} 行，准确率 {accuracy}。",
    "desc_error": "期望校准误差 {error}。",
    "data": "数据",
    "train": "训练",
    "eval": "评估",
    "test": "测试",
    "split": "从训练文件中分出",
    "files": "文件",
    "rows_in": "读入行数",
    "skipped": "放到一边",
    "used": "使用",
    "label_names": "另加标签名称",
    "labels": "标签数",
    "majority_share": "最常见标签的占比",
    "duplicates": "重复的行",
    "conflicts": "带有多种标签的文本",
    "overlap": "之前已见过的行",
    "tokens": "token 数",
    "texts_cut": "被截断的文本",
    "tokens_cut": "被截掉的 token",
    "warnings": "训练前的提醒（原文为英文）",
    "cost": "开销",
    "parameters": "参数",
    "base_parameters": "全量微调要训练",
    "lora_parameters": "只算 LoRA",
    "head_parameters": "分类头（全部训练）",
    "trainable_parameters": "一共训练",
    "adapter_bytes": "适配器文件",
    "time_title": "时间用在哪里",
    "search": "搜索学习率",
    "load": "读取和加载",
    "trunk": "冻结层，为所有轮次只算一次",
    "baselines": "基线",
    "verify": "验证",
    "other": "其他",
    "total": "最后一个进程，总共",
    "estimated": "事前估计：{value}",
    "peak": "内存峰值",
    "speed": "速度",
    "tokens_per_s": "每秒 {n} 个 token",
    "padding": "填充",
    "reload": "重新加载后 logit 的最大差异",
    "repeat": "重新做一遍",
    "repeat_from_run": "从这个运行目录，逐字节相同：",
    "repeat_anew": "从数据文件：",
    "setting": "设置",
    "value": "值",
    "default": "默认值",
    "settings_note": "与默认值不同的设置（auto 都已确定）：",
    "sums": "sha256",
    "sums_left_out": "另有 {n} 个，见 recipe.toml",
    "versions": "版本",
    "card": "文本分类的 LoRA 适配器",
    "card_base": "基座：{base}，权重的 sha256 为 {sha256}。",
    "card_lora": "{variant}，r={r}，lora_alpha={alpha}，作用于 {targets}。",
    "card_training": "在 {rows} 行上训练：最多 {epochs} 轮，实际 {done} 轮，每批 {batch} 行，学习率 {rate}，"
    "文本在 {length} 个 token 处截断。",
    "card_refit": "随后用 {rows} 行（包括留作评估的行）从头再训练一次：{epochs} 轮。",
    "card_ends": "更长的文本保留两端：四分之一取自开头，四分之三取自结尾。",
    "use": "怎样使用",
    "names": "标签",
}

CATALOGUE: dict[str, dict[str, str]] = {"en": _EN, "zh": _ZH}


def say(key: str, language: str, **values: Any) -> str:
    """One sentence with its values put in."""
    return CATALOGUE[language][key].format(**values)


def verdict(found: Findings, language: str) -> str:
    """The run in one sentence: what the adapter beats and what it does not, the bad news first."""
    headline, against = found.headline, found.contenders[1:]
    figures = {
        "accuracy": score(headline.accuracy),
        "low": score(headline.interval[0]),
        "high": score(headline.interval[1]),
        "rows": count(headline.rows),
        "part": say(f"{headline.scored_on}_rows", language),
    }
    if not against:
        return say("accuracy_alone", language, **figures)
    sides = {side: [say(f"the_{one.name}", language) for one in against if one.verdict == side] for side in _SIDES}
    first, *rest = [side for side in _SIDES if sides[side]]
    others = [say("against", language, accuracy=score(one.accuracy), name=say(one.name, language)) for one in against]
    clauses = [
        say(_SIDES[side][side != first], language, names=_joined(sides[side], language, "comma", "and"))
        for side in (first, *rest)
    ]
    return say("semicolon", language).join(clauses) + say(
        "accuracy_on", language, **figures, others=_joined(others, language, "listed", "last")
    )


def judged(one: Contender, language: str) -> str:
    """The verdict against a baseline, and where the interval alone says more than it, why."""
    if one.chance_decides:
        return say("by_chance", language, p=f"{one.p:.2g}")
    return say(one.verdict, language) if one.verdict else ""


# The clause that begins with a verdict, and the one that follows another.
_SIDES = {
    "worse": ("loses", "loses"),
    "not resolved": ("undecided", "undecided_too"),
    "better": ("beats", "beats_too"),
}


def standing(found: Findings) -> str:
    """The worst verdict of the adapter against a baseline; empty where there is none."""
    verdicts = [one.verdict for one in found.contenders[1:]]
    return next((side for side in _SIDES if side in verdicts), "")


def notes(found: Findings, language: str) -> list[str]:
    """What to know of the headline."""
    headline = found.headline
    lines = [
        say(
            "macro_f1_is", language, macro_f1=score(headline.macro_f1), loss=score(headline.loss), epoch=headline.epoch
        ),
        say("known_test_note", language, rows=count(headline.overlap_rows))
        if headline.scored_on == "test" and headline.overlap_rows
        else say(f"{headline.scored_on}_note", language),
    ]
    if all(one.name != "tfidf" for one in found.contenders):
        lines.append(say("no_baselines_note", language))
    if headline.refit_rows:
        lines.append(say(f"refit_{headline.scored_on}_note", language, rows=count(headline.refit_rows)))
    if headline.clean_rows:
        lines.append(
            say(
                "clean_note",
                language,
                rows=count(headline.clean_rows),
                accuracy=score(headline.clean_accuracy),
            )
        )
    return lines


def profile(found: Findings) -> list[tuple[str, list[str]]]:
    """The table of the data: the key of each line's name, and its cells; lines that are not known or nothing but 0 go.

    A part that was split from the training files has no rows read and none set aside of its own.
    """
    parts = found.parts
    lines = [
        ("rows_in", ["" if one.rows_in is None else count(one.rows_in) for one in parts]),
        ("skipped", [count(one.skipped) for one in parts]),
        ("used", [count(one.used) for one in parts]),
        ("label_names", [count(one.label_names) for one in parts]),
        ("labels", [count(one.labels) for one in parts]),
        ("majority_share", [percent(one.majority_share) for one in parts]),
        ("duplicates", [count(one.duplicates) for one in parts]),
        ("conflicts", [count(one.conflicts) for one in parts]),
        ("overlap", ["" if one.overlap is None else count(one.overlap) for one in parts]),
        ("tokens", ["" if one.tokens is None else count(one.tokens) for one in parts]),
        ("texts_cut", [percent(one.texts_cut) for one in parts]),
        ("tokens_cut", [percent(one.tokens_cut) for one in parts]),
    ]
    return [(key, cells) for key, cells in lines if not {"", "0", percent(0)}.issuperset(cells)]


def costs(found: Findings, language: str) -> list[tuple[str, str, str]]:
    """What the run took, line by line: name, value, remark; what is not known is left out."""
    cost = found.cost
    lines: list[tuple[str, str, str]] = []

    def add(key: str, value: float | None, shown: Callable[[Any], str], aside: str = "") -> None:
        if value is not None:
            lines.append((say(key, language), shown(value), aside))

    def before(value: float | None, shown: Callable[[float], str]) -> str:
        return say("estimated", language, value=shown(value)) if value is not None else ""

    add("base_parameters", cost.base_parameters, count)
    for key in ("lora_parameters", "head_parameters", "trainable_parameters"):
        value = getattr(cost, key)
        add(
            key,
            value,
            count,
            f"{100 * value / cost.total_parameters:.2f} %" if value is not None and cost.total_parameters else "",
        )
    add("adapter_bytes", cost.adapter_bytes, size)
    for name, seconds in cost.seconds:
        aside = before(cost.estimated_train_seconds, duration) if name == "train" else ""
        add(name, seconds, duration, aside)
    add("total", cost.total_seconds, duration)
    add("peak", cost.peak_rss_bytes, size, before(cost.estimated_peak_bytes, size))
    add("speed", cost.tokens_per_s, lambda value: say("tokens_per_s", language, n=count(round(value))))
    add("padding", cost.padding_pct, lambda value: percent(value / 100))
    add("reload", cost.largest_difference, lambda value: f"{value:.1g}")
    return lines


def _joined(words: Sequence[str], language: str, between: str, last: str) -> str:
    head, tail = words[:-1], words[-1]
    return say(between, language).join(head) + (say(last, language) if head else "") + tail


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3_600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3_600} h {whole % 3_600 // 60} min"


def score(value: float) -> str:
    """A share between 0 and 1, or a loss, with three decimals."""
    return f"{value:.3f}"


def percent(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    """A difference with its sign, the minus as long as the plus."""
    return f"{value:+.3f}".replace("-", "−")


def count(value: int) -> str:
    """A whole number."""
    return f"{value:,}"


def size(value: float) -> str:
    """Bytes."""
    return (
        f"{value / 1e9:,.2f} GB"
        if value >= 1e9
        else f"{value / 1e6:,.1f} MB"
        if value >= 1e6
        else f"{value / 1e3:,.0f} kB"
    )
