"""Pictures without stage one: 32 x 32 places, each one of a few colours, as in iGPT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import tilewise as tw
from examples.common.data import SIZE


class Palette:
    """The colours at which k-means ends, and pictures as rows of their numbers.

    Args:
        pictures: uint8 (N, 3, 64, 64), whose colours are looked at.
        colours: of the palette.
    """

    side = 32

    def __init__(self, pictures: Tensor, colours: int, seed: int):
        torch.manual_seed(seed)
        occur = self._rows(pictures[:: max(1, len(pictures) // 500)]).unique(dim=0)
        means = tw.nn.VectorQuantizer(3, colours, kmeans_init=True, decay=1.0)  # stays there
        means(occur[None])
        self.colours = means.codebook.detach().clone()  # (K, 3)

    def _rows(self, pictures: Tensor) -> Tensor:
        """(N * 1024, 3) in [0, 1]."""
        small = F.avg_pool2d(pictures.float() / 255, pictures.shape[-1] // self.side)
        return small.permute(0, 2, 3, 1).reshape(-1, 3)

    def codes(self, pictures: Tensor) -> Tensor:
        """int64 (N, 1024): the nearest colour's number of each place."""
        parts = [tw.nearest_code(self._rows(x), self.colours).index for x in pictures.split(512)]
        return torch.cat(parts).view(len(pictures), -1)

    def pictures(self, codes: Tensor) -> Tensor:
        """(N, 3, 64, 64) in [0, 1]."""
        small = self.colours[codes].view(len(codes), self.side, self.side, 3).permute(0, 3, 1, 2)
        return F.interpolate(small, size=(SIZE, SIZE), mode="bilinear")
