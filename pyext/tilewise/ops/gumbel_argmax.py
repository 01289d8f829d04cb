"""Sampling from a categorical distribution by the largest perturbed logit (Gumbel-max)."""

import torch
from torch import Tensor

from tilewise import _backend, reference
from tilewise.ops import _arguments
from tilewise.ops._register import register
from tilewise.reference._precision import accumulate_dtype
from tilewise.reference.gumbel_argmax import GumbelArgmax


def gumbel_argmax(
    logits: Tensor,
    k: int | None = None,
    dim: int = -1,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
    *,
    log_prob: bool = False,
) -> Tensor | GumbelArgmax:
    r"""Samples from the categorical distribution of the logits; only indices are written.

        index = argmax_j (logits_j + g_j),    so that    P(index = j) = softmax(logits)_j

    with independent Gumbel noise g. The k largest are a sample of k categories without replacement:
    the first is drawn from the softmax, the next from the softmax of those left, and so on.

    Args:
        logits: any shape, float16, bfloat16, float32 or float64. -inf masks a category.
        k: how many categories, in the order in which they are drawn. None: one, no dimension.
        dim: of the categories.
        seed, row_offset: as in `gumbel_softmax`, whose noise this is: for equal seeds,
            `gumbel_softmax(hard=True)` has its 1 where this points.
        log_prob: return log softmax(logits) at the indices as well.

    Returns:
        index, int64, as `logits` with `dim` removed, or of size k. With `log_prob`
        (index, log_prob), the second float32 (float64 for float64 logits). NaN never wins, equal
        values go to the lowest index, masked categories come last; where nothing is above -inf, the
        index is 0.

    `log_prob` is differentiable in `logits`, any number of times; the index is not.

    Cost: one reading of the logits (two with `log_prob`); most elements need no logarithm, because
    their random word already shows that they cannot win. Memory of the result, and k * 16 bytes for
    each thread; where threads share few wide rows (k up to 64), for each 4,096 columns.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text; k larger
            than the number of categories; no categories.
        RuntimeError: inside a torch.func transform.

    Paper: Maddison, Tarlow and Minka, A* Sampling, NeurIPS 2014; without replacement: Kool, van
    Hoof and Welling, Stochastic Beams and Where to Find Them, ICML 2019.
    """
    _arguments.check_floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits: expected at least one dimension, got ()")
    dim = _arguments.dimension("dim", dim, logits)
    count = 1 if k is None else _arguments.integer("k", k, least=1)
    if k is None and logits.shape[dim] == 0:
        raise ValueError(f"logits: expected at least one category, got {tuple(logits.shape)}")
    if count > logits.shape[dim]:
        raise ValueError(f"k: expected at most the {logits.shape[dim]} categories, got {count}")
    row_offset = _arguments.row_offset(row_offset)
    seed = _arguments.seed(seed, logits.device)

    op = _backend.operator("gumbel_argmax", logits.device, logits.dtype)
    if op is None:
        return reference.gumbel_argmax(logits, k, dim, seed, row_offset, log_prob=log_prob)
    if not log_prob:
        logits = logits.detach()  # an index has no gradient: nothing is kept for one
    index, value = op(logits, seed, row_offset, dim, count, bool(log_prob))
    if k is None:
        index, value = index.squeeze(dim), value.squeeze(dim) if log_prob else value
    return GumbelArgmax(index, value) if log_prob else index


def _fake(logits, seed, row_offset, dim, k, log_prob):
    shape = [*logits.shape[:dim], k, *logits.shape[dim + 1 :]]
    dtype = accumulate_dtype(logits)
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape if log_prob else 0, dtype=dtype),
    )


def _gradient(ops, d_log_prob, logits, index, dim):
    probabilities = torch.softmax(logits.to(d_log_prob.dtype), dim)
    d_logits = -d_log_prob.sum(dim, keepdim=True) * probabilities
    return d_logits.scatter_add(dim, index, d_log_prob).to(logits.dtype)


register(
    "gumbel_argmax",
    "(Tensor logits, Tensor seed, SymInt row_offset, int dim, int k, bool log_prob) "
    "-> (Tensor index, Tensor log_prob)",
    _fake,
    "(Tensor d_log_prob, Tensor logits, Tensor index, int dim) -> (Tensor d_logits)",
    _gradient,
)
