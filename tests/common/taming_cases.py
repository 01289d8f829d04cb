"""taming-transformers' quantiser, which is diffusers' too, and its conversion.

Images in, (quantized, loss, (perplexity, one-hot, index)) out.
"""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.common.peers import need
from tests.common.quantizer_cases import CLOSE, rows, step
from tilewise.receptive_field.__main__ import import_torchvision


class Published(nn.Module):
    """What both packages compute, in the state dict's layout and in a few lines."""

    def __init__(self, n_e, e_dim, beta, legacy=True):
        super().__init__()
        self.beta, self.legacy = beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z):
        z = z.movedim(1, -1)
        index = torch.cdist(z.reshape(-1, z.shape[-1]), self.embedding.weight).argmin(1)
        q = self.embedding(index).view(z.shape)
        first, second = F.mse_loss(q.detach(), z), F.mse_loss(q, z.detach())
        loss = first + self.beta * second if self.legacy else self.beta * first + second
        return (z + (q - z).detach()).movedim(-1, 1), loss, (None, None, index)


def published(name, **settings):
    if name == "equation":
        return Published(32, 16, beta=0.25, **settings)
    module, kind = {
        "taming": ("taming.modules.vqvae.quantize", "VectorQuantizer"),
        "diffusers": ("diffusers.models.autoencoders.vae", "VectorQuantizer"),
    }[name]
    if name == "diffusers":
        need("diffusers", "torchvision")
        import_torchvision()  # which diffusers needs
    try:
        return getattr(importlib.import_module(module), kind)(32, 16, beta=0.25, **settings)
    except ImportError as error:
        pytest.skip(str(error))


def assert_converts(name, convert, back, **settings):
    """Converted from the module and from its state dict, a step is the same, and back."""
    theirs = published(name, **settings)
    nn.init.normal_(theirs.embedding.weight)
    from_state = convert(
        {"quantize." + key: x for key, x in theirs.state_dict().items()},
        prefix="quantize.", beta=0.25, **settings,
    )
    for ours in (convert(theirs), from_state):
        theirs.zero_grad()
        (q, index, loss), grad = step(ours, rows(2, 16, 5, 7))
        x = rows(2, 16, 5, 7).requires_grad_()
        their_q, their_loss, (_, _, their_index) = theirs(x)
        ((their_q * rows(2, 16, 5, 7, seed=9)).sum() + 3.0 * their_loss).backward()
        assert torch.equal(index.flatten(), their_index.flatten())
        for a, b in (
            (q, their_q), (loss, their_loss), (grad, x.grad),
            (ours._codebook.embed.grad[0], theirs.embedding.weight.grad),
        ):
            torch.testing.assert_close(a, b, **CLOSE)
    theirs.load_state_dict(back(ours))
