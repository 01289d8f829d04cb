"""New codes, drawn one after the other with `tw.gumbel_argmax`.

    codes = sample(model, words, Rule(guidance=3.0, top_k=100), seed=0)

Sample number n of a seed is the same in every split of a batch: its noise depends on the seed, the
place of the code and n alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import tilewise as tw
from examples.common.autoencoders import Autoencoder
from examples.common.towers import Words
from examples.vqgan.models import decode
from examples.vqgan.transformer import Transformer, nothing, read


class Rule(NamedTuple):
    """How codes are drawn.

    Args:
        guidance: s of classifier-free guidance, l = l_nothing + s (l_words - l_nothing): 1 takes
            the caption as it is, 0 leaves it out, more exaggerates what it says.
        temperature: divides the logits.
        top_k: draw among the k likeliest codes only. None: among all.
    """

    guidance: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None


PLAIN = Rule()


def masked(logits: Tensor, top_k: int | None) -> Tensor:
    """Logits (B, K), -inf for all but the k largest of a row."""
    if top_k is None or top_k >= logits.shape[1]:
        return logits
    least = logits.topk(top_k).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def draw(logits: Tensor, rule: Rule, seed: int, first: int = 0) -> Tensor:
    """Codes (B,) from logits (B, K), by the noise of rows `first` to `first` + B of the seed."""
    likely = masked(logits, rule.top_k) / rule.temperature
    return tw.gumbel_argmax(likely, seed=seed, row_offset=first)


@torch.no_grad()
def sample(
    model: Transformer, words: Tensor, rule: Rule = PLAIN, seed: int = 0, first: int = 0,
    given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Codes (B, length) for captions (B, WORDS), which are samples `first` to `first` + B.

    They begin with the codes `given` (B, n), if there are any.
    """
    model.eval()
    past, logits = model.begin(_with_nothing(words, rule))
    codes: list[Tensor] = [] if given is None else list(given.unbind(1))
    known = len(codes)
    for place in range(model.length):
        if place >= known:
            codes.append(draw(guided(logits, rule), rule, seed * 1_000_003 + place, first))
        if place < model.length - 1:
            logits = model.next(past, _for_both(codes[place], rule))
    return torch.stack(codes, 1)


def guided(logits: Tensor, rule: Rule) -> Tensor:
    """(B, K) of (2 B, K), with the caption and without it; of (B, K) where s is 1 or 0."""
    if rule.guidance in (0, 1):
        return logits
    with_words, without = logits.chunk(2)
    return without + rule.guidance * (with_words - without)


def _with_nothing(words: Tensor, rule: Rule) -> Tensor:
    if rule.guidance == 0:
        return nothing(len(words))
    return words if rule.guidance == 1 else torch.cat([words, nothing(len(words))])


def _for_both(x: Tensor, rule: Rule) -> Tensor:
    return x if rule.guidance in (0, 1) else torch.cat([x, x])


@torch.no_grad()
def slide(
    model: Transformer, words: Tensor, height: int, width: int, side: int,
    rule: Rule = PLAIN, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Codes (B, height, width, levels) of pictures larger than those of training.

    Each cell is drawn from a window of `side` x `side` cells around it, whose earlier cells are
    there: the sliding attention window of Esser et al. 2021. Places in the window change from cell
    to cell, so there is no cache, and each code costs a whole pass.
    """
    model.eval()
    read = _with_nothing(words, rule)
    levels = model.length // side**2
    grid = torch.zeros(len(words), height, width, levels, dtype=torch.int64)
    for y, x, level in _places(height, width, levels):
        top, left = (
            min(max(at - side // 2, 0), size - side) for at, size in ((y, height), (x, width))
        )
        window = grid[:, top : top + side, left : left + side].flatten(1)  # later codes: ignored
        place = ((y - top) * side + x - left) * levels + level
        logits = model(read, _for_both(window, rule))[:, place]
        number = (y * width + x) * levels + level
        grid[:, y, x, level] = draw(guided(logits, rule), rule, seed * 1_000_003 + number)
    return grid


def _places(height: int, width: int, levels: int) -> list[tuple[int, int, int]]:
    return [(y, x, n) for y in range(height) for x in range(width) for n in range(levels)]


def split(
    model: Transformer, words: Tensor, rule: Rule, seed: int = 0, size: int = 128
) -> Tensor:
    """`sample` in batches of `size`: the same codes, in less memory."""
    parts = range(0, len(words), size)
    return torch.cat([sample(model, words[i : i + size], rule, seed, i) for i in parts])


class Painter:
    """Both stages together: captions become pictures."""

    def __init__(self, first: Autoencoder, second: Transformer, words: Words, grid: tuple):
        self.first, self.second, self.words, self.grid = first, second, words, grid

    def codes(self, captions: list[str], rule: Rule, seed: int) -> Tensor:
        return split(self.second, read(self.words, captions), rule, seed)

    def pictures(self, codes: Tensor) -> Tensor:
        return decode(self.first, codes.view(-1, *self.grid))
