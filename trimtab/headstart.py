"""A new head that begins with what the base knows instead of at random.

A new head is noise, and while it learns it pulls at features that were good. Fitted first, on the frozen base, it does
not (linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054). It matters most where rows are few and
labels many.

The heads of the BERT family are two layers over the first token. The first one stays as the base brought it; where it
is trained, it becomes the identity, scaled so that its activation bends little. The second one is what logistic
regression makes of what comes out.

A sentence encoder that speaks in the mean of its tokens was never taught to say anything in its first one. There LoRA
learns, before any label is looked at, to say in the first token what the frozen base says in the mean: a probe fitted
then is as good as one on sentence vectors.
"""

from collections.abc import Callable, Sequence
from itertools import chain, count, islice

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cosine_similarity

from trimtab import baselines, interrupts, logistic
from trimtab.batching import evaluation_plan
from trimtab.build import Ready
from trimtab.estimate import Ahead
from trimtab.fast import encoder
from trimtab.fast.encoder import Encoder
from trimtab.hub import pooling
from trimtab.loop import schedule
from trimtab.tokens import Encoded

_MOST_ROWS = 2_000  # that the probe learns from; more teach a head little that training does not
# A surer head leaves less to learn: on 1,000 short reviews a C of 10 cost one of two runs 2.4 points. Sentence vectors
# with few rows a label need it, and cross-validation sees that.
_CS = (1.0,)
_SENTENCE_STEPS = 100  # with which LoRA learns the sentence vectors
# At MiniLM's width, and less for wider bases, as rates go. With 10 rows a label, names and base dropout runs came to
# 0.836 with it and to 0.829 with 1e-3. The rate of the labels is not asked, so that rates are compared from one start.
_RATE, _WIDTH = 6e-3, 384
_WARMUP_RATIO = 0.1
_MAX_NORM = 1.0
_REACH = 0.5  # standard deviation of what goes into the activation: tanh is nearly straight there
_SEED = 0
_LIFT = {"distilbert": 3.0, "electra": 3.0}  # relu and gelu are straight above zero only


def work_ahead(ready: Ready) -> Ahead:
    """What `start_head` will compute, for an estimate."""
    if ready.job.recipe.train.head_start == "random" or not ready.head_is_new or ready.engine.encoder is None:
        return Ahead()
    return Ahead(probed=_probe_rows(ready.job.train.encoded), taught=_sentence_batches(ready))


def start_head(ready: Ready, tell: Callable[[str], object] = lambda line: None) -> None:
    """Fits the head of a model that is about to be trained; tells people what is done."""
    engine, encoded = ready.engine, ready.job.train.encoded
    if ready.job.recipe.train.head_start == "random":
        return
    if not ready.head_is_new:
        tell("the head starts as base or adapter brought it")
        return
    if engine.encoder is None:
        tell("the head starts at random: its layers are not known here")
        return
    cs: Sequence[float] = _CS
    if batches := _sentence_batches(ready):
        cs = logistic.CS
        tell(f"LoRA learns the base's sentence vectors, {len(batches)} steps without labels")
        _learn_sentences(ready, engine.encoder, batches)
    head, rows = engine.encoder.head, _probe_rows(encoded)
    states = _states(engine.encoder, encoded, rows)
    with torch.no_grad():
        if head.dense.weight.requires_grad:
            centre, spread = states.mean(axis=0), float(states.std(axis=0).mean())
            gain = _REACH / max(spread, 1e-6)
            head.dense.weight.copy_(torch.eye(states.shape[1]) * gain)
            head.dense.bias.copy_(torch.from_numpy(_LIFT.get(head.kind, 0.0) - gain * centre))
        inside = encoder.before_out(head, torch.from_numpy(states), training=False).numpy()
        weight, bias = _logistic(inside, encoded.labels[rows], len(ready.job.labels), cs)
        head.out.weight.copy_(torch.from_numpy(weight))
        head.out.bias.copy_(torch.from_numpy(bias))
    tell(f"the head starts as a linear probe on {len(rows):,} rows")


def _probe_rows(encoded: Encoded) -> npt.NDArray[np.int64]:
    return np.sort(np.random.default_rng(_SEED).permutation(len(encoded))[:_MOST_ROWS])


def _sentence_batches(ready: Ready) -> list[npt.NDArray[np.int64]]:
    """The batches of training rows whose sentence vectors LoRA learns; none where it learns none.

    LoRA of another adapter is not taught anew, and a base that speaks in its first token has nothing to learn.
    """
    job = ready.job
    if job.recipe.train.head_start != "sentence" or job.warm_start or pooling(job.base.folder) == "first":
        return []
    return list(islice(chain.from_iterable(job.batches(epoch) for epoch in count()), _SENTENCE_STEPS))


def sentence_rate(width: int) -> float:
    """The highest rate at which LoRA learns sentence vectors of so many numbers."""
    return _RATE * min(1.0, _WIDTH / width)


def _learn_sentences(ready: Ready, built: Encoder, batches: list[npt.NDArray[np.int64]]) -> None:
    """Teaches LoRA to say in the first token what the frozen base says in its sentence vector: 1 - cosine, AdamW."""
    assert ready.engine.vectors is not None
    encoded, matrices = ready.job.train.encoded, encoder.lora_matrices(built)
    rows = np.unique(np.concatenate(batches))
    vectors = torch.from_numpy(baselines.encoder(ready.engine.vectors, ready.job.base.folder)(encoded, rows))
    optimizer = torch.optim.AdamW(matrices, weight_decay=0.0)
    highest = sentence_rate(vectors.shape[1])
    for step, batch in enumerate(batches):
        interrupts.check()
        first = encoder.learning_first_tokens(built, encoder.cut(encoded.ids, encoded.offsets, batch))
        wanted = vectors[np.searchsorted(rows, batch)]
        (1 - cosine_similarity(first.float(), wanted)).mean().backward()  # type: ignore[no-untyped-call]
        if torch.nn.utils.clip_grad_norm_(matrices, _MAX_NORM).isfinite():
            optimizer.param_groups[0]["lr"] = highest * schedule(step, len(batches), _WARMUP_RATIO)
            optimizer.step()
        optimizer.zero_grad()


def _states(built: Encoder, encoded: Encoded, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """The states that the head will read in the first step: float32[n, D]."""
    found: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]] = []
    with torch.inference_mode():
        for places in evaluation_plan(encoded.lengths[rows]):
            interrupts.check()
            batch = encoder.cut(encoded.ids, encoded.offsets, rows[places])
            found.append((places, encoder.first_tokens(built, batch).float().numpy()))
    whole = np.zeros((len(rows), found[0][1].shape[1]), np.float32)
    for places, part in found:
        whole[places] = part
    return whole


def _logistic(
    inside: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], classes: int, cs: Sequence[float]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Weight [C, D] and bias [C] of logistic regression; a label without rows gets none and the lowest bias."""
    present = np.unique(labels)
    weight, bias = np.zeros((classes, inside.shape[1]), np.float32), np.zeros(classes, np.float32)
    if len(present) == 1:
        return weight, bias
    fitted, _ = logistic.fit(inside, labels, cs)
    if len(present) == 2:  # one row of coefficients stands for two labels
        weight[present], bias[present] = fitted.coef_ * [[-0.5], [0.5]], fitted.intercept_ * [-0.5, 0.5]
    else:
        weight[present], bias[present] = fitted.coef_, fitted.intercept_
    bias[np.setdiff1d(np.arange(classes), present)] = bias[present].min()
    return weight, bias
