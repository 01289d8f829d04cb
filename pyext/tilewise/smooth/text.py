"""BLEU of a text that is a distribution over words at each place."""

import math

import torch
from torch import Tensor

from tilewise import _numbers
from tilewise.ops import _arguments
from tilewise.smooth import _temperature


def bleu(
    logits: Tensor,
    references: Tensor,
    tau: Tensor | float = 1.0,
    *,
    max_n: int = 4,
    smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    r"""BLEU of N texts beside their references, with the expected number of n-grams that match.

        count(g) = sum_t prod_{i < n} p_{t+i}(g_i)            p_t = softmax(logits_t / tau)
        matches_n = sum over the references' different n-grams g of min(count(g), largest number
                    of times that a reference of the text has g)
        BLEU = min(1, exp(1 - r / c)) (prod_n matches_n / total_n)^(1 / max_n)

    with sums over the texts, c and total_n the number of words and n-grams of the texts, and r that
    of their references (of several, the one closest in length). count(g) is an expectation over
    texts whose words are drawn independently; matches_n is at least the expected number of matches,
    since a minimum is concave.

    Args:
        logits: (..., N, T, V) of words, float16, bfloat16, float32 or float64; log-probabilities at
            tau = 1 stand for the probabilities. Or (..., N, T) int64, words: the BLEU of a text. A
            BLEU of each text is that of corpora of one: logits[:, None].
        references: (..., N, L) int64, or (..., N, R, L) where a text has R of them. Negative words
            are none: they fill what is shorter, and stand behind the others.
        tau: a float, at least 0, or a tensor of one element above 0, which may learn.
        max_n: the longest n-grams.
        smoothing: added to matches and totals of n >= 2, for BLEU of short texts. (1: Lin and Och.)
        mask: (..., N, T) bool, True for a text's words; those behind it are False.

    Returns:
        (...), float32 (float64 for float64), from 0 to 1. 0 where a total or the matches are 0.

    Rate: matches_n is off by at most 2 n sum_t (V - 1) exp(-gap_t / tau), with each place's gap
    from the largest logit to the next smaller one.

    Cost: a text needs T R L numbers, and (R L)^2 for equal n-grams; nothing of the size V^n.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.

    Paper: Papineni et al., BLEU: a Method for Automatic Evaluation of Machine Translation, ACL
    2002; expected matches: Zhukov and Kretov, Differentiable Lower Bound for Expected BLEU Score,
    2017 (arXiv 1712.04708).
    """
    max_n = _arguments.integer("max_n", max_n, least=1)
    smoothing = _numbers.between("smoothing", smoothing, 0, math.inf)
    references, mask = _texts(logits, references, mask)
    found = _chosen(logits, references, mask, tau)  # (..., N, T, R, L)
    same = references[..., :, :, None, None] == references[..., None, None, :, :]
    same = same & (references >= 0)[..., None, None]  # (..., N, R, L, R, L)
    grams, equal = found, same
    log_precision, nothing = found.new_zeros(()), mask.new_zeros(())
    for n in range(1, max_n + 1):
        if n > 1:  # a longer n-gram is a shorter one and the word behind it
            grams = grams[..., :-1, :, :-1] * found[..., n - 1 :, :, n - 1 :]
            equal = equal[..., :-1, :, :-1] & same[..., n - 1 :, :, n - 1 :]
        matches = _matches(grams, equal).sum(-1)  # over the texts
        total = (mask.sum(-1) - (n - 1)).clamp(min=0).sum(-1).to(found.dtype)
        more = smoothing if n > 1 else 0.0
        smallest = torch.finfo(found.dtype).tiny
        ratio = (matches + more) / (total + more).clamp(min=smallest)
        log_precision = log_precision + ratio.clamp(min=smallest).log() / max_n
        # The logarithm's floor would leave a root of it, not 0.
        nothing = nothing | (ratio <= smallest)
    words = mask.sum(-1)
    length = _closest(words, (references >= 0).sum(-1)).sum(-1).to(found.dtype)
    penalty = (1 - length / words.sum(-1).clamp(min=1)).clamp(max=0.0)
    return torch.where(nothing, 0.0, (log_precision + penalty).exp())


def _chosen(
    logits: Tensor, references: Tensor, mask: Tensor, tau: Tensor | float
) -> Tensor:
    """The probability of each reference's words at each place: (..., N, T, R, L)."""
    flat = references.clamp(min=0).flatten(-2)[..., None, :]
    if not logits.is_floating_point():
        chosen = (logits[..., None] == flat).float()
    else:
        tau = _temperature.temperature(tau, "logits", logits)
        logits = torch.where(mask[..., None], logits, 0.0)
        values, counts = _temperature.elements("logits", logits, -1, None)
        p = _temperature.softmax(values, counts, tau)
        chosen = p.gather(-1, flat.expand(*p.shape[:-1], -1))
    chosen = chosen.unflatten(-1, references.shape[-2:])
    there = mask[..., None, None] & (references >= 0)[..., None, :, :]
    return torch.where(there, chosen, 0.0)


def _matches(grams: Tensor, equal: Tensor) -> Tensor:
    """Of one n, for each text: (..., N).

    Args:
        grams: (..., T, R, L), the probability that the place has the reference's n-gram.
        equal: (..., R, L, R, L), which of the references' n-grams are equal.
    """
    expected = grams.sum(-3)  # (..., R, L)
    most = equal.sum(-1).amax(-1)  # the number in the reference that has the most
    times = equal.sum((-2, -1))  # that it is met below, once of which is to count
    return (torch.minimum(expected, most.to(expected.dtype)) / times.clamp(min=1)).sum((-2, -1))


def _closest(words: Tensor, lengths: Tensor) -> Tensor:
    """The length of the reference closest to the text's, of two the shorter: (..., N)."""
    distance = (lengths - words[..., None]).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    return lengths.masked_fill(~nearest, torch.iinfo(torch.int64).max).amin(-1)


def _texts(
    logits: Tensor, references: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """References (..., N, R, L), with R = 1 where there is one; which words count (..., N, T)."""
    if not isinstance(logits, Tensor) or logits.dtype != torch.int64:
        _arguments.check_floating("logits", logits)
    texts = logits[..., 0] if logits.is_floating_point() and logits.dim() else logits
    if texts.dim() < 2:
        raise ValueError(
            "logits: expected (..., N, T, V) floats or (..., N, T) int64, "
            f"got {logits.dtype} {tuple(logits.shape)}"
        )
    if not isinstance(references, Tensor) or references.dtype != torch.int64:
        got = references.dtype if isinstance(references, Tensor) else type(references).__name__
        raise TypeError(f"references: expected an int64 tensor, got {got}")
    whole = references[..., None, :] if references.dim() == texts.dim() else references
    if whole.shape[:-2] != texts.shape[:-1] or whole.shape[-2] == 0:
        raise ValueError(
            f"references: expected {tuple(texts.shape[:-1])} texts and (L) or (R, L), "
            f"got {tuple(references.shape)}"
        )
    everything = torch.ones_like(texts, dtype=torch.bool)
    mask = everything if mask is None else _temperature.bool_like("mask", mask, texts)
    return whole.to(logits.device), mask
