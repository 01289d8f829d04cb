"""Vectors of length 1, for the cosine."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.nn.quantizers._derivatives import in_functorch, refuse_second_derivative

EPS = 1e-6  # shorter vectors are divided by it, as the peers do


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension."""
    return F.normalize(x, dim=-1, eps=EPS)


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x / |x|, |x|) of rows (M, D); the lengths (M, 1) have no gradient."""
    if in_functorch():
        return unit(x), torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True)
    return UnitRows.apply(x)


class UnitRows(torch.autograd.Function):
    """`unit_rows`, with as few passes over them as possible."""

    @staticmethod
    def forward(ctx, x):
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (M, 1)
        y = x / length.clamp(min=EPS)
        ctx.save_for_backward(y, length)
        ctx.mark_non_differentiable(length)
        return y, length

    @staticmethod
    def backward(ctx, grad, _):
        refuse_second_derivative()
        y, length = ctx.saved_tensors
        result = grad * y
        along = result.sum(-1, keepdim=True).masked_fill_(length < EPS, 0.0)  # (M, 1)
        return torch.addcmul(grad, y, along, value=-1, out=result).div_(length.clamp(min=EPS))
