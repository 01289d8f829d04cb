"""Two small towers that train on a CPU: pictures and sentences become unit vectors of one size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from examples.common.data import words

PAD, UNKNOWN = 0, 1


class Words:
    """A word tokenizer with a closed vocabulary: the words of the captions it is made from."""

    def __init__(self, captions: list[str]):
        vocabulary = sorted({word for text in captions for word in words(text)})
        self.index = {word: i for i, word in enumerate(vocabulary, start=UNKNOWN + 1)}

    def __len__(self) -> int:
        return len(self.index) + 2

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """int64 (N, words of the longest caption), padded with PAD on the right."""
        rows = [torch.tensor([self.index.get(w, UNKNOWN) for w in words(t)]) for t in captions]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - stride + 1) // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ImageTower(nn.Module):
    """uint8 (B, 3, 64, 64) -> unit rows (B, dim).

    The last feature map is flattened, not averaged: in a scene it matters where a thing is.
    """

    def __init__(self, dim: int = 256):
        super().__init__()
        self.body = nn.Sequential(
            conv(3, 64, kernel=6, stride=4),  # (B, 64, 16, 16)
            conv(64, 128, kernel=3, stride=2),  # (B, 128, 8, 8)
            conv(128, 192, kernel=3, stride=2),  # (B, 192, 4, 4)
        )
        self.head = nn.Linear(192 * 4 * 4, dim)
        self.to(memory_format=torch.channels_last)  # faster on a CPU

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1
        return F.normalize(self.head(self.body(x).flatten(1)), dim=1)


class TextTower(nn.Module):
    """int64 (B, L) word indices -> unit rows (B, dim).

    A word knows its position and its neighbours, so "a above b" is not "b above a".
    """

    def __init__(self, vocabulary: int, dim: int = 256, width: int = 128, longest: int = 32):
        super().__init__()
        self.word = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.position = nn.Parameter(torch.randn(longest, width) * 0.02)
        self.mix = nn.Linear(3 * width, width)
        self.head = nn.Linear(width, dim)
        nn.init.normal_(self.word.weight, std=0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        mask = (tokens != PAD)[:, :, None]  # (B, L, 1)
        x = (self.word(tokens) + self.position[: tokens.shape[1]]) * mask  # (B, L, width)
        left, right = F.pad(x, (0, 0, 1, 0))[:, :-1], F.pad(x, (0, 0, 0, 1))[:, 1:]
        x = F.gelu(self.mix(torch.cat([left, x, right], 2))) * mask
        return F.normalize(self.head(x.sum(1) / mask.sum(1).clamp(min=1)), dim=1)
