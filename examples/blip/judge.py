"""How well a model finds, matches and captions scenes that it has not learned from."""

from __future__ import annotations

import torch
from torch import Tensor

import tilewise as tw
from examples.blip import decode
from examples.blip.model import Blip, rows_of
from examples.blip.world import Captioned
from examples.common.retrieval import recall
from examples.common.towers import PAD

TOP = 8  # candidates that are ranked anew
CHUNK = 512  # texts beside pictures at a time
NUCLEUS = 0.9
WAYS = ("greedy", "beam 3", "nucleus")


class Sight:
    """What a model makes of pictures (N, 3, 32, 32) once, for all that is asked of them."""

    @torch.no_grad()
    def __init__(self, model: Blip, images: Tensor):
        device = next(model.parameters()).device
        model.eval()
        picture = model.picture(images.to(device))
        self.features, self.seen = model.picture_features(picture), model.text.look(picture)


@torch.no_grad()
def similarity(model: Blip, sight: Sight, captions: list[str]) -> Tensor:
    """(pictures, captions) cosines."""
    tokens = model.tokens(captions).to(sight.features.device)
    return sight.features @ model.text_features(tokens).T


@torch.no_grad()
def match_scores(model: Blip, sight: Sight, captions: list[str], picture: Tensor, text: Tensor):
    """How far pictures `picture` (P,) and captions `text` (P,) match: (P,), above 0 if they do."""
    tokens = model.tokens(captions).to(sight.features.device)
    found = []
    for rows, texts in zip(picture.split(CHUNK), text.split(CHUNK), strict=True):
        logits = model.matches(tokens[texts], rows_of(sight.seen, rows))
        found.append(logits[:, 1] - logits[:, 0])
    return torch.cat(found)


def reranked(scores: Tensor, match, top: int) -> Tensor:
    """Scores (queries, candidates) whose `top` largest of each row are put in the order of these
    scores and `match(query, candidate)` together, and stay before all others."""
    best, column = scores.topk(min(top, scores.shape[1]), 1)
    query = torch.arange(len(scores), device=scores.device)[:, None].expand_as(column)
    joint = best + match(query.flatten(), column.flatten()).view_as(best)
    order = joint.argsort(1, descending=True)
    # The values stay those that the row has; who has which changes.
    return scores.scatter(1, column.gather(1, order), best)


def retrieval(model: Blip, data: Captioned, match: bool) -> dict[str, dict]:
    """Recalls by the features alone and, with `match`, with the best ranked anew."""
    sight = Sight(model, data.images[:, 0])
    scores = similarity(model, sight, data.captions)
    found = {"features": recall(scores)._asdict()}
    if match:
        ask = lambda picture, text: match_scores(model, sight, data.captions, picture, text)  # noqa: E731
        by_picture = reranked(scores, ask, TOP)
        by_text = reranked(scores.T, lambda text, picture: ask(picture, text), TOP)
        found["reranked"] = recall(by_picture, by_text)._asdict()
    return found


def match_accuracy(model: Blip, data: Captioned, wrong: list[str]) -> float:
    """The mean of two shares: matches that are called so, and others that are not."""
    sight = Sight(model, data.images[:, 0])
    own = torch.arange(len(wrong), device=sight.features.device)
    right = match_scores(model, sight, data.captions, own, own) > 0
    other = match_scores(model, sight, wrong, own, own) <= 0
    return float((right.float().mean() + other.float().mean()) / 2)


def wrong_captions(data: Captioned) -> list[str]:
    """Of each scene one that is not true of it: in turn one of the same two things otherwise
    arranged, and one of other things."""
    count = len(data.captions)  # four arrangements of a pair stand beside each other
    nearest = [4 * (i // 4) + (i + 1 + (i // 8) % 3) % 4 for i in range(count)]
    far = [(i + count // 2) % count for i in range(count)]
    return [data.captions[nearest[i] if i % 2 else far[i]] for i in range(count)]


# ---- captions


def write_all(model: Blip, images: Tensor, way: str, seed: int = 0) -> list[str]:
    """A caption of each picture: "greedy", "beam 3" or "nucleus"."""
    seen = Sight(model, images).seen
    if way == "beam 3":
        rows = decode.beam(model, seen, 3)
    elif way == "nucleus":
        draw = decode.nucleus(NUCLEUS, torch.Generator().manual_seed(seed))
        rows = decode.write(model, seen, draw)
    else:
        rows = decode.write(model, seen)
    return [model.tokens.text(row) for row in rows]


def caption_scores(written: list[str], captions: list[str], tokenize) -> dict[str, float]:
    """BLEU-4 of all texts together; shares of texts that are the caption, and of the captions'
    words that a text has in their place."""
    exact, words, count = 0, 0, 0
    for text, caption in zip(written, captions, strict=True):
        exact += text == caption
        words += sum(a == b for a, b in zip(text.split(), caption.split(), strict=False))
        count += len(caption.split())
    return {
        "bleu": bleu(written, captions, tokenize), "exact": exact / len(captions),
        "words": words / count,
    }  # fmt: skip


def bleu(written: list[str], captions: list[str], tokenize) -> float:
    rows = tokenize(captions)
    rows = rows.masked_fill(rows == PAD, -1)
    texts = tokenize([text or "-" for text in written])  # nothing said is one unknown word
    return float(tw.smooth.bleu(texts, rows, mask=texts != PAD))


def nearest_captions(train: Captioned, images: Tensor) -> list[str]:
    """The caption of the training drawing nearest in pixels: what must be beaten."""
    known = train.images[:, 0].flatten(1).float()
    nearest = torch.cdist(images.flatten(1).float(), known).argmin(1)
    return [train.captions[i] for i in nearest]
