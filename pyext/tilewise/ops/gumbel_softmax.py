"""Gumbel-softmax in one pass, its noise made in registers."""

import warnings

import torch
from torch import Tensor

from tilewise import _backend, reference
from tilewise.ops import _arguments
from tilewise.ops._register import register


def gumbel_softmax(
    logits: Tensor,
    tau: Tensor | float = 1.0,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
    seed: Tensor | int | None = None,
    row_offset: int = 0,
) -> Tensor:
    r"""A relaxed sample of the categorical distribution of the logits, or a one-hot one.

        y = softmax((logits + g) / tau),    g = -log(-log(1 - u)),    u uniform in (0, 1)

    Takes the place of `torch.nn.functional.gumbel_softmax`, whose signature it has. The noise g is
    float32 whatever the dtype of the logits, never 0 / 0 or infinite, and never stored.

    Args:
        logits: any shape, float16, bfloat16, float32 or float64. -inf masks an element.
        tau: temperature >= 0: a float, or a tensor of one element, which may need a gradient. 0
            gives the limit, the one-hot vector of the largest perturbed logit.
        hard: return that one-hot vector, exactly 0 and 1, with the gradient of the relaxed sample
            (straight-through).
        eps: no effect; torch's function has it.
        dim: of the categories.
        seed: an int or an int64 tensor of one element; equal seeds give equal samples. None draws
            one from torch's default generator, which `torch.manual_seed` governs.
        row_offset: the number of the first row, a row being a position in the other dimensions:
            parts of a batch, each with its offset, get the noise that the whole would get.

    Returns:
        As `logits`. A row of only -inf, with a NaN or with +inf is NaN, as in a softmax.

    Differentiable in `logits` and `tau`, any number of times. Autocast changes nothing.

    The random words depend on seed, row and column only: the same on every device, for every number
    of threads and split of the batch. Values agree across backends to a few roundings.

    Cost: memory traffic of a softmax and about its time on CPU; no memory but the result. The
    backward pass keeps `y`, or with `hard` the logits, from which it makes y again.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, named in the text; tau < 0
            (a tensor tau is looked at by the CPU kernel alone: on a GPU that would stall it).
        RuntimeError: inside a torch.func transform.

    Paper: Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax, ICLR 2017;
    Maddison, Mnih and Teh, The Concrete Distribution, ICLR 2017.
    """
    _arguments.check_floating("logits", logits)
    if eps != 1e-10:
        warnings.warn("gumbel_softmax: eps has no effect", stacklevel=2)
    if logits.dim() == 0:
        return gumbel_softmax(logits[None], tau, hard, eps, 0, seed, row_offset)[0]
    dim = _arguments.dimension("dim", dim, logits)
    temperature = _arguments.scalar("tau", tau, logits)
    if not isinstance(tau, Tensor) and not tau >= 0:
        raise ValueError(f"tau: expected at least 0, got {tau}")
    row_offset = _arguments.row_offset(row_offset)
    seed = _arguments.seed(seed, logits.device)

    op = _backend.operator("gumbel_softmax", logits.device, logits.dtype)
    if op is None:
        return reference.gumbel_softmax(logits, temperature, hard, eps, dim, seed, row_offset)
    return op(logits, temperature, seed, row_offset, dim, bool(hard))


def _fake(logits, tau, seed, row_offset, dim, hard):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _gradients(ops, grad, saved, tau, seed, row_offset, dim, hard, need_tau):
    """The gradients by logits and tau, of differentiable operations."""
    y = ops.gumbel_softmax(saved, tau, seed, row_offset, dim, False) if hard else saved
    return relaxed_gradients(grad, y, tau, dim)


def relaxed_gradients(grad: Tensor, y: Tensor, tau: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The gradients of a relaxed sample by logits and tau, of differentiable operations.

    A perturbed logit is tau * log(y) and a constant of its row, which drops out of the sum.
    """
    wide, smallest = y.to(tau.dtype), torch.finfo(tau.dtype).tiny
    grad = grad.to(tau.dtype)
    inner = wide * (grad - (wide * grad).sum(dim, keepdim=True))
    inverse = torch.where(tau == 0, 0.0, 1 / torch.where(tau == 0, 1.0, tau))
    d_tau = -(inner * wide.clamp(min=smallest).log()).sum() * inverse
    return (inner * inverse).to(y.dtype), d_tau.view(tau.shape)


def _fake_backward(grad, saved, tau, seed, row_offset, dim, hard, need_tau):
    d_logits = torch.empty_like(saved, memory_format=torch.contiguous_format)
    return d_logits, tau.new_empty(() if need_tau else 0)


register(
    "gumbel_softmax",
    "(Tensor logits, Tensor tau, Tensor seed, SymInt row_offset, int dim, bool hard) -> Tensor",
    _fake,
    "(Tensor grad, Tensor saved, Tensor tau, Tensor seed, SymInt row_offset, int dim, bool hard, "
    "bool need_tau) -> (Tensor d_logits, Tensor d_tau)",
    _gradients,
    _fake_backward,
    # The relaxed sample is what its user keeps anyway; the one-hot one does not tell its gradient.
    saved=("hard", "logits"),
)
