"""What rebuilt and new pictures are worth: (N, 3, 64, 64), uint8 or in [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common.data import Pairs
from examples.common.reconstruction import unit
from examples.common.towers import TwoTowers, Words, score

CHUNK = 256


def whole(pictures: Tensor) -> Tensor:
    """As uint8, which is what pictures are stored as."""
    if pictures.dtype == torch.uint8:
        return pictures
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8)


def ssim(a: Tensor, b: Tensor, size: int = 11, sigma: float = 1.5) -> float:
    """Structural similarity, Wang et al. 2004: means over channels, places and pictures of

    (2 m_a m_b + c_1) (2 s_ab + c_2) / ((m_a^2 + m_b^2 + c_1) (s_a^2 + s_b^2 + c_2))

    with means, variances and the covariance under a Gaussian window.
    """
    at = torch.arange(size) - (size - 1) / 2
    line = torch.exp(-at.square() / (2 * sigma**2))
    line = line / line.sum()

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x.flatten(0, 1)[:, None], line.view(1, 1, -1, 1))
        return F.conv2d(x, line.view(1, 1, 1, -1))

    total = 0.0
    for x, y in zip(unit(a).split(CHUNK), unit(b).split(CHUNK), strict=True):
        mx, my = blur(x), blur(y)
        vx, vy, xy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = 0.01**2, 0.03**2
        value = (2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
        total += value.mean().item() * len(x)
    return total / len(a)


@torch.no_grad()
def features(judge: TwoTowers, pictures: Tensor) -> Tensor:
    """(N, 192): means over the last feature map of the SigLIP image tower."""
    tower = judge.image.eval()
    parts = whole(pictures).contiguous(memory_format=torch.channels_last).split(CHUNK)
    return torch.cat([tower.body(x.float() / 127.5 - 1).mean((2, 3)) for x in parts])


def frechet(a: Tensor, b: Tensor) -> float:
    """The squared Wasserstein-2 distance of Gaussians with the means and covariances of rows
    a (N, D) and b (M, D): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    ca, cb = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()
    return float(mean + ca.trace() + cb.trace() - 2 * root)


def scores(judge: TwoTowers, pictures: Tensor, captions: list[str], words: Words) -> Tensor:
    """Cosines (pictures, captions); row i's right caption is column i."""
    return score(judge, Pairs(whole(pictures), captions), words)


def ranks(found: Tensor) -> Tensor:
    """The place (N,) of each picture's right caption among all, 1 the best; ties are shared."""
    right = found.diagonal()[:, None]
    return 1 + (found > right).sum(1) + ((found == right).sum(1) - 1) / 2


def nearest(points: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square of the differences to the nearest of `seen`, and which one that is.

    Of pictures of 16 x 16 means: fine lines may be off by a pixel.
    """
    a, b = (F.avg_pool2d(unit(x), 4).flatten(1) for x in (points, seen))
    found = torch.cdist(a, b).min(1)
    return found.values / a.shape[1] ** 0.5, found.indices
