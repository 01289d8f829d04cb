"""Gradients through a choice of codes, straight-through or by rotation, and the commitment loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from tilewise import _backend
from tilewise.nn.quantizers._derivatives import in_functorch, refuse_second_derivative
from tilewise.nn.quantizers._unit import EPS, unit
from tilewise.ops import code_sums
from tilewise.ops._register import define


class Weights(NamedTuple):
    """How much the squared error pulls rows to codes (commitment) and codes to rows (codebook)."""

    commitment: float
    codebook: float


def straight_through(
    rows: Tensor,
    table: Tensor,
    index: Tensor,
    squared_error: Tensor,
    elements: Tensor | None,
    keep: Tensor | None,
    weights: Weights,
    rotate: bool,
) -> tuple[Tensor, Tensor]:
    """(quantized, loss) of rows whose codes were chosen.

        quantized_i = table[index_i]        loss = (w_commitment + w_codebook) / elements * error

    Backward, with g the gradient of quantized and e = 2 / elements * the gradient of loss,

        d rows_i  = R_i^T g_i + w_commitment * e * (rows_i - quantized_i)
        d table_k = w_codebook * e * sum_{i: index_i = k} (quantized_i - rows_i)

    with R_i = 1, or the rotation and scaling that turns rows_i into quantized_i.

    Args:
        rows: (M, D).
        table: (K, D), without the zero row that masked rows get.
        index: (M), -1 for masked rows.
        squared_error, elements: () float32, of how many elements it is. No elements: all of rows.
        keep: (M, 1) bool, False for masked rows; or None.
    """
    if in_functorch():
        return _differentiable(rows, table, index, elements, keep, weights, rotate)
    return StraightThrough.apply(
        rows, table, index, squared_error, elements, keep, weights, rotate
    )


class StraightThrough(torch.autograd.Function):
    """`straight_through` in as few passes as PyTorch allows.

    The backward pass needs `quantized`, into which a decoder may have written by then (it begins
    with ReLU(inplace=True)). A copy for all would cost a tenth of a step. So an alias is saved
    that autograd does not watch; where it was written to, it is gathered again, from the codes as
    they were.
    """

    @staticmethod
    def forward(ctx, rows, table, index, squared_error, elements, keep, weights, rotate):
        ctx.set_materialize_grads(False)
        ctx.weights, ctx.rotate, ctx.num_codes = weights, rotate, len(table)
        quantized = gather(table, index, keep is not None).to(rows.dtype)  # version 0
        ctx.written = saved = codes = None
        if any(ctx.needs_input_grad[:2]):
            ctx.written, saved, codes = _watched(quantized, table)
        ctx.save_for_backward(rows, saved, codes, index, keep, elements)
        loss = squared_error / _count(rows, elements)
        weight = weights.commitment + weights.codebook
        return quantized, loss if weight == 1 else loss * weight

    @staticmethod
    def backward(ctx, grad, grad_loss):
        refuse_second_derivative()
        rows, quantized, codes, index, keep, elements = ctx.saved_tensors
        if ctx.written is not None and ctx.written._version > 0:
            quantized = gather(codes, index, keep is not None).to(rows.dtype)
        need_rows, need_table, *_ = ctx.needs_input_grad
        wide = torch.promote_types(rows.dtype, torch.float32)
        d_rows = d_table = pull = error = None
        if grad_loss is not None:
            pull = grad_loss * (2 * ctx.weights.commitment / _count(rows, elements))  # ()
            if need_table or not ctx.rotate or grad is None:
                error = rows.to(wide) - quantized.to(wide)  # (M, D)
        if need_table and error is not None:
            _, sums = code_sums(error, index, ctx.num_codes)
            scale = grad_loss * (2 / _count(rows, elements))
            d_table = sums * (scale * -ctx.weights.codebook)
        if need_rows:
            if grad is not None and ctx.rotate:
                d_rows = rotate_back(grad, rows, quantized, pull, keep)
            elif error is not None:
                d_rows = error.mul_(pull)
                d_rows = d_rows if grad is None else d_rows.add_(grad)
                d_rows = masked(d_rows.to(rows.dtype), keep)
            elif grad is not None:
                d_rows = masked(grad.to(rows.dtype), keep)
        return d_rows, d_table, None, None, None, None, None, None


def _count(rows: Tensor, elements: Tensor | None) -> Tensor | int:
    """elements; without these, how many rows have, at least 1."""
    return max(rows.numel(), 1) if elements is None else elements


def masked(rows: Tensor, keep: Tensor | None) -> Tensor:
    """rows (M, D), 0 where keep (M, 1) is False."""
    return rows if keep is None else rows.masked_fill(~keep, 0.0)


def _watched(quantized: Tensor, table: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """What tells that quantized (M, D) was written to, what to save of it, and a copy of the codes.

    The first is an empty tensor with the version counter of quantized, 0 now. It holds no memory,
    so saved tensors are freed, or offloaded, as ever. A graph gets a copy, which costs it little,
    and so do batches of fewer rows than there are codes.
    """
    if torch.compiler.is_compiling() or len(table) > len(quantized):
        return None, quantized.clone(), None
    counter = quantized.detach()
    counter.data = quantized.new_empty(0)
    return counter, quantized.data, table.clone()


def _differentiable(
    rows: Tensor,
    table: Tensor,
    index: Tensor,
    elements: Tensor | None,
    keep: Tensor | None,
    weights: Weights,
    rotate: bool,
) -> tuple[Tensor, Tensor]:
    """`straight_through` of differentiable operations, for torch.func."""
    rows = masked(rows, keep)  # padding may be anything, and 0 * NaN would be its gradient
    wide = torch.promote_types(rows.dtype, torch.float32)
    x, q = rows.to(wide), gather(table, index, keep is not None).to(wide)
    code = q.detach()
    count = _count(rows, elements)
    loss = weights.commitment * (x - code).square().sum() / count
    if weights.codebook:
        loss = loss + weights.codebook * (q - x.detach()).square().sum() / count
    through = _turned(x, code) if rotate else x
    return (code + (through - through.detach())).to(rows.dtype), loss


def _turned(x: Tensor, q: Tensor) -> Tensor:
    """R_i x_i with the R of `rotate_back`, which is constant."""
    fixed = x.detach()
    a, b = unit(fixed), unit(q)
    w = unit(a + b)
    stretch = q.norm(dim=-1, keepdim=True) / fixed.norm(dim=-1, keepdim=True).clamp(min=EPS)
    along_w, along_a = ((x * v).sum(-1, keepdim=True) for v in (w, a))
    return stretch * (x - 2 * along_w * w + 2 * along_a * b)


def gather(table: Tensor, index: Tensor, masked: bool) -> Tensor:
    """Rows of table (K, D) by index (M); with `masked`, zeros where it is negative."""
    if masked:
        index = torch.where(index < 0, len(table), index)
        table = torch.nn.functional.pad(table, (0, 0, 0, 1))  # a row of zeros: no pass over (M, D)
    return table.index_select(0, index)


define(
    "rotate_back",
    "(Tensor grad, Tensor rows, Tensor quantized, Tensor? pull, Tensor? keep, float smallest) "
    "-> Tensor",
    lambda grad, rows, *_: rows.new_empty(rows.shape),
    module="_straight_through",
)


def rotate_back(
    grad: Tensor, rows: Tensor, quantized: Tensor, pull: Tensor | None, keep: Tensor | None
) -> Tensor:
    r"""R_i^T grad_i + pull * (x_i - q_i) with the R that turns and stretches x_i into q_i.

        R = |q| / |x| * (1 - 2 w w^T + 2 q^ x^T),    w = (x^ + q^) / |x^ + q^|,    x^ = x / |x|

    All of it is a sum of grad_i, x_i = rows_i and q_i = quantized_i with one factor each for a row.
    Shapes (M, D), () for pull and (M, 1) for keep; the result is as `rows`, 0 where not kept.

    Paper: Fifty et al., Restructuring Vector Quantization with the Rotation Trick, ICLR 2025.
    """
    kernel = _backend.triton_operator("rotate_back", rows.device, rows.dtype, grad.dtype)
    if kernel is not None:  # one launch instead of forty
        return kernel(grad, rows, quantized, pull, keep, EPS)
    wide = torch.promote_types(rows.dtype, torch.float32)
    turned = _rotate_back(grad.to(wide), rows.to(wide), quantized.to(wide), pull)
    return masked(turned.to(rows.dtype), keep)


def _rotate_back(grad: Tensor, x: Tensor, q: Tensor, pull: Tensor | None) -> Tensor:
    """`rotate_back` in float32 or float64, without a mask."""
    work = torch.empty_like(x)  # one buffer for all: new memory costs more than a product

    def dot(a, b):
        return torch.mul(a, b, out=work).sum(-1, keepdim=True)  # (M, 1)

    x_norm, q_norm = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (x, q))
    x_inv, q_inv = 1 / x_norm.clamp(min=EPS), 1 / q_norm.clamp(min=EPS)
    along_x, along_q = dot(grad, x) * x_inv, dot(grad, q) * q_inv
    cosine = dot(x, q) * x_inv * q_inv
    squared = (x_norm * x_inv) ** 2 + (q_norm * q_inv) ** 2 + 2 * cosine
    along_w = 2 * (along_x + along_q) / squared.clamp(min=EPS**2)
    stretch = q_norm * x_inv
    x_factor = stretch * x_inv * (2 * along_q - along_w)
    q_factor = stretch * q_inv * -along_w
    if pull is not None:
        x_factor, q_factor = x_factor + pull, q_factor - pull
    torch.mul(grad, stretch, out=work)
    return work.addcmul_(x, x_factor).addcmul_(q, q_factor)
