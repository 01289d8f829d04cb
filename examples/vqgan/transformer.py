"""Stage two's network: a causal transformer over words and then codes, with a cache of the past.

    model = Transformer(vocabulary=900, codes=512, length=64)
    logits = model(words, codes)             # (B, 20), (B, 64) -> (B, 64, 512), all at once

    past, logits = model.begin(words)        # the same, code by code: (B, 512), of the first
    logits = model.next(past, codes[:, 0])   # of the second
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.common.towers import PAD, Words

SHORT = [SDPBackend.MATH]  # of few rows on a CPU faster than the fused one
LONG = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
WORDS = 20  # of a caption that are read; shorter ones are filled with PAD, which is learned


class Past:
    """Keys and values of the places so far, of one layer."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values, self.length = keys, values, 0

    def add(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes (B, heads, new, D) in; returns all, (B, heads, so far, D)."""
        places = slice(self.length, self.length + key.shape[2])
        self.keys[:, :, places], self.values[:, :, places] = key, value
        self.length = places.stop
        return self.keys[:, :, : places.stop], self.values[:, :, : places.stop]


class SelfAttention(nn.Module):
    """Rows (B, N, width) look at each other, or where `causal` at themselves and earlier ones."""

    def __init__(self, width: int, heads: int, causal: bool = True):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D)
            for part in self.query_key_value(x).chunk(3, 2)
        )
        several = x.shape[1] > 1  # a single new row may look at all that is there
        if past is not None:
            key, value = past.add(key, value)
        with sdpa_kernel(SHORT if x.shape[1] < 256 else LONG):
            mixed = F.scaled_dot_product_attention(
                query, key, value, is_causal=self.causal and several
            )
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.think = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
            nn.Linear(4 * width, width),
        )  # fmt: skip

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), past)
        return x + self.think(x)


class Transformer(nn.Module):
    """P(codes | words) as a product, in the order of the rows of a picture.

    Args:
        vocabulary: of the words.
        codes: K, of the codebook.
        length: codes of a picture.
    """

    def __init__(
        self, vocabulary: int, codes: int, length: int, width: int = 192, layers: int = 4,
        heads: int = 4,
    ):  # fmt: skip
        super().__init__()
        self.length, self.codes = length, codes
        self.word = nn.Embedding(vocabulary, width)
        self.code = nn.Embedding(codes, width)
        self.place = nn.Parameter(torch.randn(WORDS + length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, codes)
        for embedding in (self.word, self.code):
            nn.init.normal_(embedding.weight, std=0.05)
        for block in self.blocks:  # residual branches begin small: more layers, smaller ones
            for part in (block.attention.out, block.think[-1]):
                nn.init.normal_(part.weight, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, words: Tensor, codes: Tensor) -> Tensor:
        """Logits (B, length, K) of each code, from all before it."""
        x = torch.cat([self.word(words), self.code(codes[:, :-1])], 1)
        x = x + self.place[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, WORDS - 1 :]))

    def begin(self, words: Tensor) -> tuple[list[Past], Tensor]:
        """A past that holds the words, and the logits (B, K) of the first code."""
        heads, width = self.blocks[0].attention.heads, self.word.embedding_dim
        shape = len(words), heads, WORDS + self.length, width // heads
        room = self.place.new_empty
        past = [Past(room(shape), room(shape)) for _ in self.blocks]
        return past, self._advance(self.word(words), past)

    def next(self, past: list[Past], code: Tensor) -> Tensor:
        """Logits (B, K) of what comes after `code` (B,)."""
        return self._advance(self.code(code)[:, None], past)

    def _advance(self, x: Tensor, past: list[Past]) -> Tensor:
        start = past[0].length
        x = x + self.place[start : start + x.shape[1]]
        for block, layer in zip(self.blocks, past, strict=True):
            x = block(x, layer)
        return self.head(self.norm(x[:, -1]))


def read(words: Words, captions: list[str]) -> Tensor:
    """Captions as (N, WORDS): cut off or filled up."""
    tokens = words(captions)[:, :WORDS]
    return F.pad(tokens, (0, WORDS - tokens.shape[1]), value=PAD)


def nothing(count: int) -> Tensor:
    """What is read where there is no caption."""
    return torch.full((count, WORDS), PAD)
