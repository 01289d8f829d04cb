"""Vectors of length 1, for the cosine."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # shorter vectors are divided by it, as the peers do


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension."""
    return F.normalize(x, dim=-1, eps=EPS)


def refuse_second_derivative() -> None:
    """For backward passes that write in place; `once_differentiable` would let some calls pass."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "tilewise's quantisers have no second derivative: the gradient of a chosen code is an "
            "estimate, not a function to differentiate (create_graph=True)"
        )


class UnitRows(torch.autograd.Function):
    """(x / |x|, |x|) of rows (M, D), with as few passes over them as possible."""

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
