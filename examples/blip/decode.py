"""Texts from the decoder: the likeliest next word, the likeliest text, or a draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from examples.blip.model import LONGEST, Blip, Keys, rows_of
from examples.common.towers import PAD

Choice = Callable[[Tensor], Tensor]  # from log-probabilities (B, V) a word for each row


def greedy(log_p: Tensor) -> Tensor:
    return log_p.argmax(1)


def nucleus(p: float, generator: torch.Generator) -> Choice:
    """Draws from the fewest words that together have a share of at least p."""

    def choose(log_p: Tensor) -> Tensor:
        share, word = log_p.exp().sort(1, descending=True)
        before = share.cumsum(1) - share
        share = share * (before < p)
        drawn = torch.rand(len(share), 1, generator=generator).to(share) * share.sum(1, True)
        chosen = (share.cumsum(1) <= drawn).sum(1, keepdim=True).clamp(max=share.shape[1] - 1)
        return word.gather(1, chosen)[:, 0]

    return choose


@torch.no_grad()
def write(
    model: Blip, seen: list[Keys], choose: Choice = greedy, prompt: Tensor | None = None
) -> Tensor:
    """int64 (B, L): words beside each picture, behind the prompts (B, L'), then PAD."""
    count = len(seen[0][0])
    log_p, past = _begin(model, seen, prompt)
    ended = torch.zeros(count, dtype=torch.bool, device=log_p.device)
    words: list[Tensor] = []
    while True:
        word = choose(log_p).masked_fill(ended, PAD)
        ended |= word == model.tokens.END
        words.append(word.masked_fill(ended, PAD))
        if ended.all() or past[0][0].shape[2] == LONGEST - 1:  # a role before it must fit
            return torch.stack(words, 1)
        log_p, past = _next(model, word, seen, past)


@torch.no_grad()
def beam(model: Blip, seen: list[Keys], width: int = 3) -> Tensor:
    """int64 (B, L): of each picture the likeliest of `width` texts that grow side by side."""
    count, end = len(seen[0][0]), model.tokens.END
    log_p, past = _begin(model, seen, None)
    device, vocabulary = log_p.device, log_p.shape[1]
    total, word = log_p.topk(width)  # (B, width)
    first = torch.arange(count, device=device)[:, None]
    rows = first.expand(count, width).flatten()
    seen, past, words = rows_of(seen, rows), rows_of(past, rows), word[:, :, None]
    while True:
        ended = (words == end).any(2)  # (B, width)
        if ended.all() or past[0][0].shape[2] == LONGEST - 1:
            best = words[first[:, 0], total.argmax(1)]
            return best.masked_fill((best == end).cumsum(1) > 0, PAD)
        log_p, past = _next(model, word.flatten(), seen, past)
        log_p = log_p.view(count, width, vocabulary)
        # A text that has ended goes on with its end, at no cost.
        log_p = log_p.masked_fill(ended[:, :, None], -torch.inf)
        log_p[:, :, end] = log_p[:, :, end].masked_fill(ended, 0.0)
        total, place = (total[:, :, None] + log_p).flatten(1).topk(width)
        parent, word = place // vocabulary, place % vocabulary
        words = torch.cat([words[first, parent], word[:, :, None]], 2)
        past = rows_of(past, (first * width + parent).flatten())


def _begin(model: Blip, seen: list[Keys], prompt: Tensor | None):
    count, device = len(seen[0][0]), seen[0][0].device
    role = torch.full((count, 1), model.tokens.DEC, device=device)
    tokens = role if prompt is None else torch.cat([role, prompt], 1)
    logits, past = model.text.write(tokens, seen)
    return logits[:, -1].log_softmax(1), past


def _next(model: Blip, word: Tensor, seen: list[Keys], past: list[Keys]):
    logits, past = model.text.write(word[:, None], seen, past)
    return logits[:, -1].log_softmax(1), past
