"""Random samples: torch's own functions, and what variational autoencoders write."""

import torch
import torch.nn.functional as F
from torch import Tensor

SOFTMAX = "F.softmax"  # draws nothing: a sample's reading, writing and exponentials alone


def gumbel_softmax(logits: Tensor, hard: bool, dim: int) -> Tensor:
    """torch's own function."""
    return F.gumbel_softmax(logits, hard=hard, dim=dim)


def relaxed_one_hot(logits: Tensor, hard: bool, dim: int) -> Tensor:
    """torch.distributions' relaxed sample; hard as pyro's subclass makes it."""
    law = torch.distributions.RelaxedOneHotCategorical(
        torch.ones((), device=logits.device), logits=logits.movedim(dim, -1)
    )
    soft = law.rsample().movedim(-1, dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return soft + (one_hot - soft).detach()


def multinomial(logits: Tensor, k: int | None) -> Tensor:
    """k categories without replacement; None: one, without a dimension."""
    index = torch.multinomial(logits.softmax(-1), k or 1)
    return index if k else index.squeeze(-1)


def eager_gaussian_sample(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """A reparameterised sample and its divergence, as variational autoencoders write them."""
    std = torch.exp(0.5 * logvar)
    z = mean + std * torch.randn_like(std)
    kl = 0.5 * torch.sum(mean.square() + logvar.exp() - 1 - logvar, dim=tuple(range(1, mean.dim())))
    return z, kl
