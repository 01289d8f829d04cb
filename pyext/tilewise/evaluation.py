"""Retrieval recall and zero-shot accuracy by exact search, without the matrix of similarities."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tilewise.ops import _arguments
from tilewise.ops.nearest_code import MAX_K, nearest_code


class RetrievalRecall(NamedTuple):
    """Recall for each k, from 0 to 1."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def retrieval_recall(
    image_features: Tensor,
    text_features: Tensor,
    k: int | Sequence[int] = (1, 5, 10),
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
) -> RetrievalRecall:
    r"""How often one of the k most similar texts (images) belongs to the image (text).

        recall@k = |{i : a match of i is among its k nearest by cosine}| / |{i : i has a match}|

    The nearest ones are found by `tilewise.nearest_code`: exactly, the lowest index among equals.

    Args:
        image_features: (B, D), float16, bfloat16, float32 or float64; need not be normalised.
        text_features: (N, D), same dtype and device.
        k: one or several, each at most 16; those beyond the number of candidates count all of
            these.
        positives: image i matches text i + positives, if there is one; 0 wants as many texts as
            images. Or a pair of int64 vectors, ids of the images (B,) and of the texts (N,): they
            match where these are equal, so an image may have several texts. None: nothing matches.

    Returns:
        (image_to_text, text_to_image), each {k: recall}. NaN where nothing has a match.

    Cost: two searches, each a product of B * N * D in 8-bit integers; memory O((B + N) * D).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the text.
    """
    image_features, text_features = _arguments.features(
        image_features=image_features, text_features=text_features
    )
    images, texts = len(image_features), len(text_features)
    offset, image_ids, text_ids = _arguments.matches(
        "positives", positives, images, texts, image_features.device
    )
    if image_ids is None or text_ids is None:
        assert offset is not None
        if offset == 0 and images != texts:
            raise ValueError(
                f"text_features: expected {images} rows, one for each image, or ids as positives; "
                f"got {texts}"
            )
        text_ids = torch.arange(texts, device=image_features.device)
        image_ids = torch.arange(images, device=image_features.device) + offset
    ks = _cutoffs(k)
    return RetrievalRecall(
        _recall(image_features, text_features, ks, image_ids, text_ids),
        _recall(text_features, image_features, ks, text_ids, image_ids),
    )


def zero_shot_classifier(prompt_features: Tensor | Sequence[Tensor]) -> Tensor:
    r"""One direction for each class, out of the text features of its prompts (a prompt ensemble).

        c_k = normalize(mean_p normalize(f_kp))

    Args:
        prompt_features: (K, P, D), or K tensors (P_k, D) where classes have different numbers of
            prompts; any floating dtype.

    Returns:
        (K, D), rows of length 1.

    Paper: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
    ICML 2021, section 3.1.4.
    """
    means = [F.normalize(prompts, dim=-1).mean(-2) for prompts in prompt_features]
    if not means:
        raise ValueError("prompt_features: expected at least one class")
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot_accuracy(
    image_features: Tensor, classifier: Tensor, labels: Tensor, k: int | Sequence[int] = (1, 5)
) -> dict[int, float]:
    """How often the right class is among the k that are most similar to the image.

    Args:
        image_features: (B, D), float16, bfloat16, float32 or float64; need not be normalised.
        classifier: (K, D), a row for each class: what `zero_shot_classifier` makes.
        labels: (B,) int64, from 0 to K - 1.
        k: one or several, each at most 16; those beyond the number of classes count all of these.

    Returns:
        {k: accuracy}, from 0 to 1. NaN for no images.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the text;
            a label that has no row in the classifier.
    """
    image_features, classifier = _arguments.features(
        image_features=image_features, classifier=classifier
    )
    _arguments.check_ids("labels", labels, len(image_features), image_features.device)
    if len(labels):  # looking waits for a GPU, as the results, which are floats, do anyway
        lowest, highest = map(int, labels.aminmax())
        if lowest < 0 or highest >= len(classifier):
            raise ValueError(
                f"labels: expected from 0 to {len(classifier) - 1}, the rows of the classifier, "
                f"got {lowest} to {highest}"
            )
    classes = torch.arange(len(classifier), device=labels.device)
    ks = _cutoffs(k)
    hits = _hits(image_features, classifier, ks, labels, classes)
    return {n: _mean(hits[:, :n].any(1)) for n in ks}


def _cutoffs(k: int | Sequence[int]) -> list[int]:
    """One or several k as Python ints, each from 1 to 16."""
    if isinstance(k, Iterable) and not isinstance(k, str):
        ks = [_arguments.integer("k", n, least=1) for n in k]
    else:
        ks = [_arguments.integer("k", k, least=1)]
    for n in ks:
        if n > MAX_K:
            raise ValueError(f"k: expected from 1 to {MAX_K}, got {n}")
    return ks


def _hits(
    queries: Tensor, candidates: Tensor, k: list[int], ids: Tensor, candidate_ids: Tensor
) -> Tensor:
    """Whether each of the nearest candidates matches: (queries, the largest k) bool."""
    if len(candidates) == 0 or not k:
        return torch.zeros(len(queries), 0, dtype=torch.bool, device=queries.device)
    with torch.no_grad():
        most = min(max(k), len(candidates))
        nearest = nearest_code(queries, candidates, metric="cosine", k=most).index
    return candidate_ids[nearest] == ids[:, None]


def _recall(
    queries: Tensor, candidates: Tensor, k: list[int], ids: Tensor, candidate_ids: Tensor
) -> dict[int, float]:
    hits = _hits(queries, candidates, k, ids, candidate_ids)[torch.isin(ids, candidate_ids)]
    return {n: _mean(hits[:, :n].any(1)) for n in k}


def _mean(hits: Tensor) -> float:
    return float(hits.double().mean())
