"""A head that begins as a linear probe of the base instead of at random.

A new head is noise, and while it learns it pulls at features that were good. Fitted first, on the frozen base, it does
not (linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054). It matters most where rows are few and
labels many.

The heads of the BERT family are two layers over the first token. The first one stays as the base brought it; where it
is trained, it becomes the identity, scaled so that its activation bends little. The second one is what logistic
regression makes of what comes out.
"""

import warnings

import numpy as np
import numpy.typing as npt
import torch

from trimtab import interrupts
from trimtab.batching import evaluation_plan
from trimtab.build import Ready
from trimtab.fast import encoder
from trimtab.fast.encoder import Encoder, Head
from trimtab.tokens import Encoded

_MOST_ROWS = 2_000  # that the probe learns from; more teach a head little that training does not
_C = 1.0
_REACH = 0.5  # standard deviation of what goes into the activation: tanh is nearly straight there
_SEED = 0
_LIFT = {"distilbert": 3.0, "electra": 3.0}  # relu and gelu are straight above zero only


def start_head(ready: Ready) -> str:
    """Fits the head of a model that is about to be trained; returns what was done, for people."""
    engine, recipe = ready.engine, ready.job.recipe
    if recipe.train.head_start == "random":
        return ""
    if not ready.head_is_new:
        return "the head starts as base or adapter brought it"
    if engine.encoder is None:
        return "the head starts at random: its layers are not known here"
    head, encoded = engine.encoder.head, ready.job.train.encoded
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(encoded))[:_MOST_ROWS])
    states = _states(engine.encoder, encoded, rows)
    with torch.no_grad():
        if head.dense.weight.requires_grad:
            centre, spread = states.mean(axis=0), float(states.std(axis=0).mean())
            gain = _REACH / max(spread, 1e-6)
            head.dense.weight.copy_(torch.eye(states.shape[1]) * gain)
            head.dense.bias.copy_(torch.from_numpy(_LIFT.get(head.kind, 0.0) - gain * centre))
        inside = _activated(head, torch.from_numpy(states)).numpy()
        weight, bias = _logistic(inside, encoded.labels[rows], len(ready.job.labels))
        head.out.weight.copy_(torch.from_numpy(weight))
        head.out.bias.copy_(torch.from_numpy(bias))
    return f"the head starts as a linear probe on {len(rows):,} rows"


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


def _activated(head: Head, states: torch.Tensor) -> torch.Tensor:
    """What the second layer of a head sees: float32[n, D]."""
    inside = torch.nn.functional.linear(states, head.dense.weight, head.dense.bias)
    if head.kind == "distilbert":
        return torch.relu(inside)
    return torch.nn.functional.gelu(inside) if head.kind == "electra" else torch.tanh(inside)


def _logistic(
    inside: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], classes: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Weight [C, D] and bias [C] of logistic regression; a label without rows gets none and the lowest bias."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present = np.unique(labels)
    weight, bias = np.zeros((classes, inside.shape[1]), np.float32), np.zeros(classes, np.float32)
    if len(present) == 1:
        return weight, bias
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=_C, max_iter=500).fit(inside, labels)
    if len(present) == 2:  # one row of coefficients stands for two labels
        weight[present], bias[present] = fitted.coef_ * [[-0.5], [0.5]], fitted.intercept_ * [-0.5, 0.5]
    else:
        weight[present], bias[present] = fitted.coef_, fitted.intercept_
    bias[np.setdiff1d(np.arange(classes), present)] = bias[present].min()
    return weight, bias
