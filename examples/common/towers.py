"""Two small towers that train on a CPU: pictures and sentences become unit vectors of one size.

    model = TwoTowers(ImageTower(), TextTower(len(words)))      # with the scalars of the loss
    loss = tw.sigmoid_loss(*model(images, words(captions)))
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from examples.common.data import Pairs, words

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
        known = ([self.index.get(w, UNKNOWN) for w in words(text)] for text in captions)
        rows = [torch.tensor(row, dtype=torch.int64) for row in known]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def conv(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, (kernel - stride + 1) // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ImageTower(nn.Module):
    """uint8 (B, 3, size, size) -> unit rows (B, dim); size is 64 or 32.

    The last feature map is flattened, not averaged: in a scene it matters where a thing is.
    """

    def __init__(self, dim: int = 256, size: int = 64, width: int = 64):
        super().__init__()
        stride = size // 16
        self.body = nn.Sequential(
            conv(3, width, kernel=stride + 2, stride=stride),  # (B, width, 16, 16)
            conv(width, 2 * width, kernel=3, stride=2),  # (B, 2 width, 8, 8)
            conv(2 * width, 3 * width, kernel=3, stride=2),  # (B, 3 width, 4, 4)
        )
        self.head = nn.Linear(3 * width * 4 * 4, dim)
        self.to(memory_format=torch.channels_last)  # faster on a CPU

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What comes before the head, (B, 48 width)."""
        x = images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1
        return self.body(x).flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.head(self.features(images)), dim=1)


class PatchTower(nn.Module):
    """A small ViT: uint8 (B, 3, size, size) -> unit rows (B, dim).

    Args:
        drop: share of the patches that are left out while training, drawn anew for each picture
            from torch's generator. Nothing is computed for them (FLIP, arXiv 2212.00794).
    """

    def __init__(self, dim: int = 128, size: int = 64, width: int = 64, depth: int = 2,
                 patch: int = 8, drop: float = 0.0):  # fmt: skip
        super().__init__()
        self.side, self.drop = patch, drop
        self.patch = nn.Linear(3 * patch**2, width)
        self.position = nn.Parameter(torch.randn((size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*[
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True)
            for _ in range(depth)
        ], nn.LayerNorm(width))  # fmt: skip
        self.head = nn.Linear(width, dim)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What comes before the head, (B, width)."""
        count, grid, side = len(images), images.shape[-1] // self.side, self.side
        patches = images.reshape(count, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(count, grid**2, -1)  # uint8 (B, P, 3 * side^2)
        position = self.position.expand(count, -1, -1)
        if self.training and self.drop:
            order = torch.rand(patches.shape[:2]).argsort(1).to(images.device)
            kept = order[:, : round(grid**2 * (1 - self.drop)), None]
            patches = patches.take_along_dim(kept, 1)
            position = position.take_along_dim(kept, 1)
        x = self.patch(patches.float() / 127.5 - 1) + position  # (B, kept, width)
        return self.blocks(x).mean(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.head(self.features(images)), dim=1)


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


class TwoTowers(nn.Module):
    """Two towers and the two scalars of the loss, of which CLIP's uses the first."""

    def __init__(self, image: nn.Module, text: nn.Module, bias: float = -10.0):
        super().__init__()
        self.image, self.text = image, text
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # t'
        self.logit_bias = nn.Parameter(torch.tensor(bias))  # b

    def forward(self, images: torch.Tensor, tokens: torch.Tensor):
        """What the loss takes: image_features, text_features, logit_scale, logit_bias."""
        scale, bias = self.log_scale.exp(), self.logit_bias.clone()  # of now, not of the next step
        return self.image(images), self.text(tokens), scale, bias

    def optimizer(self, tower_rate: float = 2e-3, scalar_rate: float = 0.05) -> torch.optim.AdamW:
        """Its rates are set by training.optimize()."""
        towers = [p for tower in (self.image, self.text) for p in tower.parameters()]
        groups = [
            {"params": towers, "peak": tower_rate, "weight_decay": 0.1},
            {"params": [self.log_scale, self.logit_bias], "peak": scalar_rate, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.95))


@torch.no_grad()
def embed(tower: nn.Module, inputs: torch.Tensor, method: str = "forward") -> torch.Tensor:
    """(N, dim) on the CPU, of a tower in evaluation mode, in parts that memory holds."""
    tower.eval()
    device = next(tower.parameters()).device
    call = getattr(tower, method)
    return torch.cat([call(part.to(device)).cpu() for part in inputs.split(512)])


def score(model: TwoTowers, shown: Pairs, words: Words) -> torch.Tensor:
    """Cosines (pictures, captions) with the towers in evaluation mode."""
    return embed(model.image, shown.images) @ embed(model.text, words(shown.captions)).T
