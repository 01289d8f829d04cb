"""Contrastive losses in plain PyTorch, with their matrices of logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
) -> Tensor:
    """The sigmoid loss in the inputs' own dtype, with its B x N matrices of logits and labels."""
    logits = logit_scale * image_features @ text_features.T  # (B, N)
    if logit_bias is not None:
        logits = logits + logit_bias
    labels = -torch.ones_like(logits)
    if isinstance(positives, tuple):
        labels = labels + 2 * (positives[0][:, None] == positives[1])
    elif positives is not None:
        rows = torch.arange(len(image_features), device=logits.device)
        columns = torch.arange(len(text_features), device=logits.device)
        labels = labels + 2 * (columns == rows[:, None] + positives)
    return -F.logsigmoid(labels * logits).sum() / len(image_features)


def eager_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """CLIP's loss in the inputs' own dtype, with a matrix of logits for each direction."""
    back = positives[::-1] if isinstance(positives, tuple) else positives and -positives
    smoothing = {"label_smoothing": label_smoothing}
    of_images = eager_info_nce(
        image_features, text_features, logit_scale, positives=positives, **smoothing
    )
    of_texts = eager_info_nce(
        text_features, image_features, logit_scale, positives=back, **smoothing
    )
    return (of_images + of_texts) / 2


def eager_info_nce(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """InfoNCE in the inputs' own dtype, with its B x N matrix of logits."""
    logits = logit_scale * query @ keys.T  # (B, N)

    def cross_entropy(targets: Tensor, rows: Tensor) -> Tensor:
        if not rows.any():
            return 0 * logits.sum()
        return F.cross_entropy(logits[rows], targets[rows], label_smoothing=label_smoothing)

    if positives is None:
        return 0 * logits.sum()
    if isinstance(positives, tuple):
        pairs = positives[0][:, None] == positives[1]
        targets = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
        return cross_entropy(targets.to(logits.dtype), pairs.any(1))
    if positives == 0 and 0 < len(query) <= len(keys):  # as open_clip and sentence-transformers
        labels = torch.arange(len(query), device=logits.device)
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    labels = [i + positives for i in range(len(query))]  # which may be huge
    rows = torch.tensor([0 <= label < len(keys) for label in labels], dtype=torch.bool)
    kept = [label if 0 <= label < len(keys) else 0 for label in labels]
    labels = torch.tensor(kept, dtype=torch.long, device=logits.device)
    return cross_entropy(labels, rows.to(logits.device))


def sentence_transformers_loss(
    anchor: Tensor, columns: list[Tensor], scale: Tensor | float
) -> Tensor:
    """What its MultipleNegativesRankingLoss computes of embeddings: rows of any length, (B, D).

    `columns`: the anchors' positives, then hard negatives; all are candidates of each anchor.
    """
    candidates = F.normalize(torch.cat(columns), dim=1)
    scores = F.normalize(anchor, dim=1) @ candidates.T * scale
    return F.cross_entropy(scores, torch.arange(len(anchor), device=anchor.device))


def eager_itc_loss(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    queue: Tensor | None = None,
    teacher_query: Tensor | None = None,
    alpha: float = 0.4,
) -> Tensor:
    """One direction of BLIP's contrast in the inputs' own dtype, with its B x (K + Q) matrices."""
    candidates = keys if queue is None else torch.cat([keys, queue])
    logits = logit_scale * query @ candidates.T  # (B, K + Q)
    with torch.no_grad():
        targets = _matching(logits, positives).to(logits.dtype)
        count = targets.sum(1, keepdim=True)
        targets = targets / count.clamp(min=1)
        if teacher_query is not None:
            soft = F.softmax(logit_scale * teacher_query @ candidates.T, dim=1)
            targets = alpha * soft + (1 - alpha) * targets
    losses = -torch.sum(F.log_softmax(logits, dim=1) * targets, dim=1)
    rows = count.squeeze(1) > 0
    return torch.where(rows, losses, 0.0).sum() / rows.sum().clamp(min=1)


def eager_hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
) -> tuple[Tensor, Tensor]:
    """ALBEF's hard negatives, all rows in one call; BLIP adds 1e-4 to each probability."""
    logits = logit_scale * image_features @ text_features.T  # (B, N)
    pairs = _matching(logits, positives)

    def sample(logits: Tensor, pairs: Tensor) -> Tensor:
        weights = F.softmax(logits, dim=1, dtype=torch.float32).masked_fill(pairs, 0)
        return torch.multinomial(weights, 1).squeeze(1)

    return sample(logits, pairs), sample(logits.T, pairs.T)


def _matching(logits: Tensor, positives: int | tuple[Tensor, Tensor] | None) -> Tensor:
    """Which rows and columns of the logits match: bool in their shape."""
    if isinstance(positives, tuple):
        return positives[0][:, None] == positives[1]
    pairs = torch.zeros_like(logits, dtype=torch.bool)
    rows, cols = logits.shape
    if positives is not None and -rows < positives < cols:
        pairs.diagonal(positives).fill_(True)
    return pairs
