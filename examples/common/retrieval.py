"""How well pictures and captions find each other, and what comparing pixels would reach."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F

from examples.common.data import Pairs, words


class Recall(NamedTuple):
    """Shares of the queries whose right answer is the best one, or among the best five."""

    image_to_text_1: float
    image_to_text_5: float
    text_to_image_1: float
    text_to_image_5: float


def recall_at(k: int, scores: torch.Tensor) -> float:
    """Row i's right answer is column i. Equal scores are shared out: the expected recall under a
    random order of the tied."""
    right = scores.diagonal()[:, None]
    better = (scores > right).sum(1)
    tied = (scores == right).sum(1)  # the right answer included
    return ((k - better) / tied).clamp(0, 1).mean().item()


def recall(image_to_text: torch.Tensor, text_to_image: torch.Tensor | None = None) -> Recall:
    """From scores (pictures, captions), and (captions, pictures) where these differ."""
    back = image_to_text.T if text_to_image is None else text_to_image
    return Recall(*(recall_at(k, scores) for scores in (image_to_text, back) for k in (1, 5)))


def both(found: Recall) -> float:
    """Recall@1, mean of the two directions."""
    return (found[0] + found[2]) / 2


def chance(count: int) -> Recall:
    return Recall(1 / count, 5 / count, 1 / count, 5 / count)


def tf_idf(captions: list[str], corpus: list[str]) -> torch.Tensor:
    """Unit rows (N, V): word counts weighed by how rare the words are in the corpus."""
    documents = Counter(word for text in corpus for word in set(words(text)))
    column = {word: i for i, word in enumerate(documents)}
    rows = torch.zeros(len(captions), len(column))
    for row, text in zip(rows, captions, strict=True):
        for word in words(text):
            if word in column:
                row[column[word]] += math.log(len(corpus) / documents[word])
    return F.normalize(rows, dim=1)


def nearest_pixel(train: Pairs, heldout: Pairs) -> Recall:
    """The baseline: nearest training picture by pixels, nearest training caption by words.

    A picture takes the caption of the training picture nearest in L2, and captions are ranked by
    their TF-IDF cosine to it. A caption takes the picture of the training caption nearest in TF-IDF
    cosine, and pictures are ranked by their L2 distance to it.
    """
    known_text = tf_idf(train.captions, train.captions)  # (T, V)
    text = tf_idf(heldout.captions, train.captions)  # (H, V)
    known_image = train.images.float().flatten(1)  # (T, 3 * 64 * 64)
    image = heldout.images.float().flatten(1)
    neighbour = torch.cdist(image, known_image).argmin(1)  # (H,)
    image_to_text = known_text[neighbour] @ text.T
    neighbour = (text @ known_text.T).argmax(1)
    text_to_image = -torch.cdist(known_image[neighbour], image)
    return recall(image_to_text, text_to_image)
