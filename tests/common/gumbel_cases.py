"""A GumbelQuantizer, the formula that it computes, and one step of either."""

import torch
import torch.nn.functional as F
from torch import nn

import tilewise as tw
from tests.common.quantizer_cases import rows


def quantizer(*sizes, **settings):
    torch.manual_seed(0)
    module = tw.nn.GumbelQuantizer(*(sizes or (16, 32, 8)), **settings)
    nn.init.normal_(module.proj.weight, std=0.5)
    return module


def eager(module, x, *, tau=None, seed=0, row_offset=0, mask=None):
    """taming's formula for x (..., C): K-wide one-hot vectors, and a softmax for the loss."""
    tau = module.tau if tau is None else tau
    logits = F.linear(x, module.proj.weight, module.proj.bias)
    k = logits.shape[-1]
    if module.training or module.sample_in_eval:
        hard = module.straight_through or not module.training
        y = tw.gumbel_softmax(logits, tau, hard=hard, seed=seed, row_offset=row_offset)
        index = y.argmax(-1)
    else:
        soft, index = torch.softmax(logits / tau, -1), logits.argmax(-1)
        y = F.one_hot(index, k) + (soft - soft.detach())
    p = torch.softmax(logits, -1)
    kl = (p * torch.log(p * k + 1e-10)).sum(-1)
    quantized = y @ module.codebook
    if mask is not None:
        kl, index, quantized = kl[mask], index.where(mask, -1), quantized * mask.unsqueeze(-1)
    return quantized, index, module.kl_weight * kl.mean()


def step(function, module, x, **options):
    """Results, and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    quantized, index, loss, *_ = function(x, **options)
    grad = rows(*quantized.shape, seed=9).to(quantized.dtype)
    wanted = [x, *module.parameters()]
    total = (quantized * grad).sum() + 1e3 * loss
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return (quantized.detach(), index, loss.detach()), gradients
