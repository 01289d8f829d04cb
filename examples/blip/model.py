"""The model: a picture's tokens, and one text transformer in three roles with shared weights.

    CLS  reads a text alone              its feature is contrasted with the picture's (ITC)
    ENC  reads it beside a picture       whether they match (ITM)
    DEC  writes it beside a picture      the next word, from those before it (LM)

A role is told by the first token. All roles share the embeddings, the look at the picture and the
feed-forward layers; the attention among words has weights of its own for reading and for writing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.towers import PAD, Words, conv

LONGEST = 16  # tokens of a text, with the role and the end
Keys = tuple[Tensor, Tensor]  # keys and values, (B, heads, L, width / heads)


class Tokens:
    """Texts as rows of words, and the tokens that are no words."""

    def __init__(self, sentences: list[str]):
        self.words = Words(sentences)
        self.CLS, self.ENC, self.DEC, self.END = range(len(self.words), len(self.words) + 4)
        self.names = {i: word for word, i in self.words.index.items()}

    def __len__(self) -> int:
        return len(self.words) + 4

    def __call__(self, texts: list[str]) -> Tensor:
        """int64 (N, L), padded on the right."""
        return self.words(texts)

    def text(self, row: Tensor) -> str:
        """What a row says up to its end."""
        return " ".join(self.names[i] for i in row.tolist() if i in self.names)

    def ended(self, tokens: Tensor) -> Tensor:
        """Rows (N, L) with their end behind the last word: (N, L + 1)."""
        wide = F.pad(tokens, (0, 1), value=PAD)
        return wide.scatter(1, (tokens != PAD).sum(1, keepdim=True), self.END)


def begun(role: int, tokens: Tensor) -> Tensor:
    """Rows behind the token of a role."""
    return F.pad(tokens, (1, 0), value=role)


class PictureTokens(nn.Module):
    """uint8 (B, 3, 32, 32) -> (B, 16, width): a grid of 4 x 4, row by row."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            conv(3, 32, kernel=4, stride=2),  # (B, 32, 16, 16)
            conv(32, 64, kernel=3, stride=2),  # (B, 64, 8, 8)
            conv(64, width, kernel=3, stride=2),  # (B, width, 4, 4)
        )
        self.position = nn.Parameter(torch.randn(16, width) * 0.5)
        self.norm = nn.LayerNorm(width)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last).float() / 127.5 - 1
        return self.norm(self.body(x).flatten(2).transpose(1, 2) + self.position)


class Attention(nn.Module):
    """Attention whose keys and values may come from elsewhere, or from earlier."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, width / heads)

    def keys(self, x: Tensor) -> Keys:
        key, value = self.key_value(x).chunk(2, 2)
        return self.split(key), self.split(value)

    def forward(self, x: Tensor, keys: Keys, mask: Tensor | None, causal: bool = False) -> Tensor:
        found = F.scaled_dot_product_attention(
            self.split(self.query(x)), *keys, attn_mask=mask, is_causal=causal
        )
        return self.out(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A layer of all roles: attention among words, the look at the picture, feed-forward."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.read, self.write, self.look = (Attention(width, heads) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.feed = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(
        self, x: Tensor, seen: Keys | None, mask: Tensor | None, writes: bool, past: Keys | None
    ) -> tuple[Tensor, Keys]:
        attention = self.write if writes else self.read
        normed = self.norms[0](x)
        keys = attention.keys(normed)
        if past is not None:
            keys = torch.cat([past[0], keys[0]], 2), torch.cat([past[1], keys[1]], 2)
        x = x + attention(normed, keys, mask, causal=writes and past is None)
        if seen is not None:
            x = x + self.look(self.norms[1](x), seen, None)
        return x + self.feed(self.norms[2](x)), keys


class TextTransformer(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int):
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(LONGEST, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.word.weight, std=0.1)

    def look(self, picture: Tensor) -> list[Keys]:
        """What every layer sees of pictures (B, 16, width); made once for all texts beside them."""
        return [block.look.keys(picture) for block in self.blocks]

    def read(self, tokens: Tensor, seen: list[Keys] | None = None) -> Tensor:
        """(B, width): what the first token has gathered of a text, and of the picture beside it."""
        mask = (tokens != PAD)[:, None, None, :]
        return self._run(tokens, seen, mask, writes=False)[0][:, 0]

    def write(
        self, tokens: Tensor, seen: list[Keys], past: list[Keys] | None = None
    ) -> tuple[Tensor, list[Keys]]:
        """Logits (B, L, V) of the word behind each token, and the keys so far.

        past: the keys of the tokens before; `tokens` then has one more, (B, 1).
        """
        x, keys = self._run(tokens, seen, None, writes=True, past=past)
        return x @ self.word.weight.T, keys

    def _run(self, tokens, seen, mask, writes, past=None):
        start = 0 if past is None else past[0][0].shape[2]
        x = self.word(tokens) + self.position[start : start + tokens.shape[1]]
        found = []
        for i, block in enumerate(self.blocks):
            x, keys = block(x, seen and seen[i], mask, writes, past and past[i])
            found.append(keys)
        return self.norm(x), found


class Blip(nn.Module):
    """Towers, heads and roles. Features are unit rows (B, dim)."""

    def __init__(self, tokens: Tokens, width: int = 96, layers: int = 2, heads: int = 4,
                 dim: int = 64):  # fmt: skip
        super().__init__()
        self.tokens = tokens
        self.picture = PictureTokens(width)
        self.text = TextTransformer(len(tokens), width, layers, heads)
        # Where a thing is matters, so the picture's tokens are not averaged.
        self.picture_head = nn.Linear(16 * width, dim)
        self.text_head = nn.Linear(width, dim)
        self.match_head = nn.Linear(width, 2)

    def picture_features(self, picture: Tensor) -> Tensor:
        return F.normalize(self.picture_head(picture.flatten(1)), dim=1)

    def text_features(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_head(self.text.read(begun(self.tokens.CLS, tokens))), dim=1)

    def matches(self, tokens: Tensor, seen: list[Keys]) -> Tensor:
        """(B, 2): logits of texts that don't match, and match, the pictures beside them."""
        return self.match_head(self.text.read(begun(self.tokens.ENC, tokens), seen))

    def next_words(self, tokens: Tensor, seen: list[Keys]) -> Tensor:
        """(B, L + 1, V): logits of each word and of the end, from the words before."""
        return self.text.write(begun(self.tokens.DEC, tokens), seen)[0]


def rows_of(seen: list[Keys], rows: Tensor) -> list[Keys]:
    """What texts see that stand beside pictures `rows`."""
    return [(key[rows], value[rows]) for key, value in seen]
