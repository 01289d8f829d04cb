"""How many rows each code has, and their sum: what k-means and EMA codebooks are updated with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise import _backend, reference
from tilewise.ops import _arguments
from tilewise.ops._register import register
from tilewise.reference._precision import accumulate_dtype
from tilewise.reference._shapes import flat, rows
from tilewise.reference.code_sums import CodeSums


def code_sums(
    x: Tensor, index: Tensor, num_codes: int, per_head: bool = False
) -> CodeSums:
    r"""Counts and sums of the rows that share a code, without a one-hot matrix.

        counts[k] = #{i : index_i = k}        sums[k] = sum_{i : index_i = k} x_i

    Args:
        x: (..., D), float16, bfloat16, float32 or float64.
        index: (...), integers: the code of each row. Rows with a negative index are left out.
        num_codes: K.
        per_head: whether the first dimension of `x` and `index` is that of separate codebooks.

    Returns:
        (counts, sums): counts (K,) int64, sums (K, D) float32 (float64 for float64 rows); with
        `per_head` (H, K) and (H, K, D). The same bits for every number of threads.

    Differentiable in `x`, any number of times.

    Cost: time and traffic O(N * D), memory O(K * D + N).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the text;
            on CPU, an index of `num_codes` or more (on a GPU such rows are left out: looking would
            stall it).
        RuntimeError: inside a torch.func transform.

    Paper: Lloyd, Least squares quantization in PCM, 1982; its moving average: van den Oord et al.,
    Neural Discrete Representation Learning, NeurIPS 2017, appendix A.1.
    """
    _arguments.check_floating("x", x)
    num_codes = _arguments.integer("num_codes", num_codes, least=0)
    if not isinstance(index, Tensor):
        raise TypeError(f"index: expected a tensor of integers, got {type(index).__name__}")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"index: expected a tensor of integers, got {index.dtype}")
    if x.dim() < 1 + per_head or index.shape != x.shape[:-1]:
        raise ValueError(
            f"index: expected shape {tuple(x.shape[:-1])} for x of {tuple(x.shape)}, "
            f"got {tuple(index.shape)}"
        )
    if index.device != x.device:
        raise ValueError(f"index: expected on {x.device} like x, got {index.device}")
    index = index.long()

    op = _backend.operator("code_sums", x.device, x.dtype)
    if op is None:
        return reference.code_sums(x, index, num_codes, per_head)
    if per_head:
        x, index = rows(x, len(x)), flat(index, len(x))
    elif x.dim() != 2:
        x, index = rows(x, 1)[0], flat(index, 1)[0]
    return CodeSums(*op(x, index, num_codes))


def _fake(x, index, num_codes):
    dtype = accumulate_dtype(x)
    *h, _, d = x.shape  # a number of heads, or none
    return index.new_empty(*h, num_codes), x.new_empty(*h, num_codes, d, dtype=dtype)


def _gradient(ops, d_sums, index):
    codes = d_sums.shape[-2]
    out = (index < 0) | (index >= codes)  # the latter on a GPU, which does not raise
    padded = F.pad(d_sums, (0, 0, 0, 1))  # one more code, for these
    place = index.masked_fill(out, codes)
    if index.dim() == 1:
        return padded[place]  # (N, D); autograd rounds it
    head = torch.arange(padded.shape[0], device=padded.device)[:, None]
    return padded[head, place]  # (H, N, D)


register(
    "code_sums",
    "(Tensor x, Tensor index, SymInt num_codes) -> (Tensor counts, Tensor sums)",
    _fake,
    "(Tensor d_sums, Tensor index) -> (Tensor d_x)",
    _gradient,
)
