"""Stage one's networks: encoder, quantiser and decoder, and the critic of patches.

    model = vqgan("vq", codes=512)
    rebuilt, tokens, loss = model(images)  # tokens int64 (B, 8, 8), or (B, 8, 8, levels)
    pictures = decode(model, tokens)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tilewise as tw
from examples.common.autoencoders import DIM, Autoencoder, Residual
from examples.vqgan.transformer import SelfAttention

STRIDE = 8  # pixels per code and side
BEFORE_ATTENTION = "5"  # the encoder's last layer that does not see everything
KINDS = ("vq", "gumbel", "residual")
LEARNING = {"decay": 0.98, "kmeans_init": True, "threshold_ema_dead_code": 0.03}
LEVELS = 2  # codes of a cell in "residual", each for what the one before it left over


class Attention(nn.Module):
    """Every cell asks every other one. Begins as the identity, as `Residual` does."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = SelfAttention(width, heads=4, causal=False)
        nn.init.zeros_(self.mix.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        rows = x.flatten(2).transpose(1, 2)  # (B, H W, C)
        return x + self.mix(self.norm(rows)).transpose(1, 2).unflatten(2, x.shape[2:])


def encoder(channels: int, dim: int, width: int = 96) -> nn.Sequential:
    """(B, channels, H, W) -> (B, dim, H / 8, W / 8)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, stride=4),
        Residual(width), Residual(width),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
        Residual(2 * width), Residual(2 * width),
        Attention(2 * width),
        nn.Conv2d(2 * width, dim, 1),
    )  # fmt: skip


def decoder(channels: int, dim: int, width: int = 96) -> nn.Sequential:
    """(B, dim, h, w) -> (B, channels, 8 h, 8 w)."""
    return nn.Sequential(
        nn.Conv2d(dim, 2 * width, 3, padding=1, padding_mode="replicate"),
        Attention(2 * width),
        Residual(2 * width), Residual(2 * width),
        *_twice(2 * width, width), Residual(width), Residual(width),
        *_twice(width, width // 2), Residual(width // 2),
        nn.Conv2d(width // 2, channels * 4, 3, padding=1, padding_mode="replicate"),
        nn.PixelShuffle(2),
    )  # fmt: skip


def _twice(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    """Twice as many rows and columns: each cell says what its four parts are."""
    return nn.Conv2d(inputs, 4 * outputs, 1), nn.PixelShuffle(2)


def quantizer(kind: str, codes: int, steps: int) -> nn.Module:
    """One of `KINDS`; `steps` of training lower the temperature of "gumbel"."""
    if kind == "gumbel":
        tau = tw.nn.CosineSchedule(start=1.0, end=1 / 16, steps=steps)
        return tw.nn.GumbelQuantizer(DIM, codes, tau=tau, kl_weight=5e-4, accept_image_fmap=True)
    options = {**LEARNING, "rotation_trick": False, "accept_image_fmap": True}
    if kind == "residual":
        return tw.nn.ResidualVectorQuantizer(
            dim=DIM, codebook_size=codes, num_quantizers=LEVELS, **options
        )
    return tw.nn.VectorQuantizer(DIM, codes, **options)


def vqgan(kind: str, codes: int, steps: int = 1) -> Autoencoder:
    """An untrained model of stage one."""
    return Autoencoder(3, quantizer(kind, codes, steps), towers=(encoder, decoder))


@torch.no_grad()
def decode(model: Autoencoder, tokens: Tensor) -> Tensor:
    """Pictures (B, 3, 8 h, 8 w) in [0, 1] of tokens (B, h, w), or (B, h, w, levels)."""
    model.eval()
    parts = [model.decode(model.quantizer.get_output_from_indices(t)) for t in tokens.split(128)]
    return torch.cat(parts).clamp(0, 1)


class Critic(nn.Sequential):
    """A score for each patch, high for real ones: PatchGAN, Isola et al. 2017.

    Pictures (B, 3, H, W) in [0, 1] -> (B, 1, H / 4, W / 4).
    """

    def __init__(self, width: int = 48):
        super().__init__(
            nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 1),
        )  # fmt: skip
        self.to(memory_format=torch.channels_last)
