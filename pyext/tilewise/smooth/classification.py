"""Metrics of classifiers: accuracy, top-k accuracy, F1 and the area under the ROC curve.

The dimension before the classes counts samples; those before it count problems of their own, so
that one call serves many folds, groups or heads. `x.flatten(0, -2)` makes them one problem.
"""

import torch
from torch import Tensor

from tilewise.reference._precision import accumulate_dtype
from tilewise.smooth import _pairs, _temperature
from tilewise.smooth.ranking import topk


def accuracy(
    logits: Tensor, labels: Tensor, tau: Tensor | float = 1.0, *, mask: Tensor | None = None
) -> Tensor:
    r"""The share of samples whose largest logit is the label's, smoothly.

        accuracy = 1/N sum_n softmax(logits_n / tau)_{y_n}

    At tau = 1 it is the expected accuracy of classes that are drawn from the softmax.

    Args:
        logits: (..., N, K), float16, bfloat16, float32 or float64. -inf masks a class.
        labels: (..., N) int64, from 0 to K - 1.
        tau: a float, at least 0, or a tensor of one element above 0, which may learn.
        mask: (..., N) bool, True where a sample counts. Labels may be anything where it is False.

    Returns:
        (...), float32 (float64 for float64), from 0 to 1. NaN where no sample counts. Among m
        equally large logits the label's counts 1/m: a collapsed model has the accuracy of chance.

    Rate: off by at most the mean of (K - 1) exp(-gap_n / tau), with each sample's gap from the
    largest logit to the next smaller one.

    Cost: a few readings of the logits; memory of the logits.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
    """
    tau = _temperature.temperature(tau, "logits", logits)
    logits, labels, weight = _samples(logits, labels, mask)
    values, counts = _temperature.elements("logits", logits, -1, None)
    chosen = _temperature.softmax(values, counts, tau)
    return _mean(chosen.gather(-1, labels[..., None]).squeeze(-1), weight)


def topk_accuracy(
    logits: Tensor, labels: Tensor, k: int, tau: Tensor | float = 1.0,
    *, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""The share of samples whose label is among the k largest logits, smoothly.

        topk_accuracy = 1/N sum_n topk(logits_n, k, tau)_{y_n}

    Args:
        logits, labels, tau, mask: as in `accuracy`.
        k: how many, at most K.

    Returns:
        As `accuracy`. k = 1 has the limit of `accuracy`, but is no softmax: see `topk`.

    Rate: off by at most the mean of sqrt(k (K - k)) exp(-gap_n / (2 tau)), with each sample's gap
    from the k-th largest logit to the next smaller one.

    Cost: that of `topk`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.

    Paper: Amos, Koltun and Kolter, The Limited Multi-Label Projection Layer, 2019.
    """
    tau = _temperature.temperature(tau, "logits", logits)
    logits, labels, weight = _samples(logits, labels, mask)
    chosen = topk(logits.to(accumulate_dtype(logits)), k, tau)
    return _mean(chosen.gather(-1, labels[..., None]).squeeze(-1), weight)


def f1(
    logits: Tensor,
    labels: Tensor,
    tau: Tensor | float = 1.0,
    *,
    average: str | None = "macro",
    mask: Tensor | None = None,
) -> Tensor:
    r"""The harmonic mean of precision and recall, smoothly.

        F1 = 2 sum_n p_n y_n / sum_n (p_n + y_n)    of each class,
        p = softmax(logits / tau) for labels,  sigmoid(logits / tau) for yes/no answers

    Args:
        logits: (..., N, K), float16, bfloat16, float32 or float64. -inf masks a class.
        labels: (..., N) int64, from 0 to K - 1; or (..., N, K) bool, where a sample has any number
            of classes and each logit says yes above 0. (N, 1) is a binary problem.
        tau: as in `accuracy`.
        average: "macro", the mean over the classes; "micro", sums over all classes, which for
            labels is the accuracy; None, each class's own.
        mask: (..., N) bool, True where a sample counts. Labels may be anything where it is False.

    Returns:
        (...), or (..., K) where average is None; float32 (float64 for float64), from 0 to 1. A
        class that is neither there nor chosen has 0, as with scikit-learn's `zero_division=0`.

    Rate: a class that has N_k samples is off by at most 3 / N_k sum_n (K - 1) exp(-gap_n / tau),
    with each sample's gap as in `accuracy`. (For yes/no answers K is 2, and the gap |logit|.)

    Cost: a few readings of the logits; memory of the logits.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
    """
    if average not in ("macro", "micro", None):
        raise ValueError(f'average: expected "macro", "micro" or None, got {average!r}')
    tau = _temperature.temperature(tau, "logits", logits)
    yes_no = isinstance(labels, Tensor) and labels.dtype == torch.bool
    logits, labels, weight = _samples(logits, labels, mask, yes_no)
    values, counts = _temperature.elements("logits", logits, -1, None)
    if yes_no:
        chosen, truth = _temperature.step(values, tau) * counts, labels.to(values.dtype)
    else:
        chosen = _temperature.softmax(values, counts, tau)
        truth = torch.zeros_like(chosen).scatter_(-1, labels[..., None], 1.0)
    matches = (weight[..., None] * chosen * truth).sum(-2)
    total = (weight[..., None] * (chosen + truth)).sum(-2)
    if average == "micro":
        matches, total = matches.sum(-1), total.sum(-1)
    score = 2 * matches / torch.where(total > 0, total, 1.0)
    return score.mean(-1) if average == "macro" else score


def auc(
    scores: Tensor, labels: Tensor, tau: Tensor | float = 1.0, *, mask: Tensor | None = None
) -> Tensor:
    r"""The area under the ROC curve, smoothly: how many pairs are in the right order.

        AUC = mean over positives i and negatives j of sigmoid((s_i - s_j) / tau)

    It is (sum_i rank_i - P (P + 1) / 2) / (P N) with `rank` of the same tau, of P positives and N
    negatives: Mann and Whitney's statistic.

    Args:
        scores: (..., N), float16, bfloat16, float32 or float64. Infinities are the lowest and the
            highest score.
        labels: (..., N) bool, True for positives.
        tau: as in `accuracy`.
        mask: (..., N) bool, True where a sample counts.

    Returns:
        (...), float32 (float64 for float64), from 0 to 1. Equal scores count 1/2. NaN without a
        positive or without a negative.

    Rate: off by at most the mean over the pairs of different scores of exp(-|s_i - s_j| / tau).

    Cost: N^2 sigmoids, in pieces: where there are more than 4 million, the backward pass makes them
    again, and memory is that of the scores. tau=0: one sort.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.

    Paper: Yan et al., Optimizing Classifier Performance via an Approximation to the
    Wilcoxon-Mann-Whitney Statistic, ICML 2003.
    """
    tau = _temperature.temperature(tau, "scores", scores)
    if scores.dim() == 0:
        raise ValueError("scores: expected (..., N), got ()")
    positive = _temperature.bool_like("labels", labels, scores)
    counts = torch.ones_like(positive)
    if mask is not None:
        counts = _temperature.bool_like("mask", mask, scores)
    wide = scores.to(accumulate_dtype(scores))
    limit = torch.finfo(wide.dtype).max / 4  # differences of infinities would be NaN
    wide = torch.where(counts, wide, 0.0).clamp(-limit, limit)
    positives, negatives = (x.to(wide.dtype) for x in (counts & positive, counts & ~positive))
    ordered = (positives * _pairs.count_below(wide, wide, negatives, tau)).sum(-1)
    return ordered / (positives.sum(-1) * negatives.sum(-1))


def _samples(
    logits: Tensor, labels: Tensor, mask: Tensor | None, yes_no: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and labels with harmless values in rows that do not count, and each row's weight."""
    if logits.dim() < 2:
        raise ValueError(f"logits: expected (..., N, K), got {tuple(logits.shape)}")
    dtype, shape = (torch.bool, logits.shape) if yes_no else (torch.int64, logits.shape[:-1])
    if not isinstance(labels, Tensor) or labels.dtype != dtype:
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected an int64 tensor of classes, got {got}")
    if labels.shape != shape:
        raise ValueError(
            f"labels: expected {tuple(shape)} for logits {tuple(logits.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    labels, rows = labels.to(logits.device), logits[..., 0]
    if mask is None:
        return logits, labels, torch.ones_like(rows, dtype=accumulate_dtype(rows))
    mask = _temperature.bool_like("mask", mask, rows)
    kept = mask[..., None] if yes_no else mask
    logits = torch.where(mask[..., None], logits, 0.0)
    return logits, labels.masked_fill(~kept, 0), mask.to(accumulate_dtype(rows))


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    """Over the last dimension; NaN without weight."""
    return (values * weight).sum(-1) / weight.sum(-1)
