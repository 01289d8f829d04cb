"""Stage one's losses beside the error of pixels: a perceptual one, and a critic's.

Taming Transformers, Esser et al. 2021: the critic's gradient is scaled so that at the decoder's
last layer it is as long as that of the reconstruction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.towers import conv


class FeatureNet(nn.Module):
    """Learns which words describe a picture; what its layers see is compared by `perceptual`.

    Any network with `features` may take its place.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        widths = [3, 32, 64, 96, 128]
        self.stages = nn.ModuleList(
            conv(i, o, *((3, 1) if i == 3 else (4, 2)))
            for i, o in zip(widths, widths[1:], strict=False)
        )
        self.head = nn.Linear(widths[-1], vocabulary)
        self.to(memory_format=torch.channels_last)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """Of pictures (B, 3, H, W) in [0, 1], a map (B, C, h, w) of each stage."""
        x, found = pictures * 2 - 1, []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (B, vocabulary) of the words of a caption."""
        return self.head(self.features(pictures)[-1].mean((2, 3)))


def perceptual(net: FeatureNet, rebuilt: Tensor, pictures: Tensor) -> Tensor:
    """The mean over stages and places of the squared distance of unit vectors of features, as in
    LPIPS (Zhang et al. 2018) with equal weights. A scalar."""
    with torch.no_grad():
        wanted = net.features(pictures)
    pairs = zip(net.features(rebuilt), wanted, strict=True)
    parts = [(_unit(a) - _unit(b)).square().sum(1).mean() for a, b in pairs]
    return torch.stack(parts).mean()


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-4)


def adaptive_weight(
    rebuilt: Tensor, last: Tensor, by_error: Tensor, by_critic: Tensor, delta: float = 1e-4
) -> Tensor:
    """||d error / d last|| / (||d critic's loss / d last|| + delta), at most 10,000.

    Args:
        rebuilt: pictures that the decoder made, with their graph.
        last: weight of the decoder's last layer.
        by_error, by_critic: gradients of the two losses in `rebuilt`.
    """
    error, critic = (
        torch.autograd.grad(rebuilt, last, g, retain_graph=True)[0].norm()
        for g in (by_error, by_critic)
    )
    return (error / (critic + delta)).clamp(max=1e4)


def critic_loss(on_real: Tensor, on_made: Tensor) -> Tensor:
    """Hinge: real patches should score above 1, made ones below -1."""
    return (F.relu(1 - on_real).mean() + F.relu(1 + on_made).mean()) / 2
