"""BLIP's and ALBEF's contrast of one modality with the other: soft targets, momentum features."""

from typing import Any

import torch
from torch import Tensor

from tilewise import _backend, reference
from tilewise.ops import _arguments
from tilewise.ops._matched import matched_by_ids, matched_by_offset
from tilewise.ops._register import register_loss


def itc_loss(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    queue: Tensor | None = None,
    teacher_query: Tensor | None = None,
    alpha: Tensor | float = 0.4,
) -> Tensor:
    r"""Image-text contrast with a momentum teacher and a queue, without the B x (K + Q) matrices.

    With candidates c = keys followed by the queue, logits z_ij = logit_scale * <query_i, c_j>, the
    teacher's z'_ij = logit_scale * <teacher_query_i, c_j>, and t that shares 1 among the candidates
    that match a query:

        loss = -mean_i sum_j (alpha * softmax_j(z'_ij) + (1 - alpha) * t_ij) log softmax_j(z_ij)

    where the mean runs over the queries that have a match. BLIP's loss is the mean of two of these:
    images with the texts of the teacher, and texts with its images (`tilewise.nn.ItcLoss`).

    Args:
        query: (B, D), float16, bfloat16, float32 or float64: the student's features of one
            modality, usually L2-normalised.
        keys: (K, D), same dtype and device: the teacher's features of the other modality.
        logit_scale: one element or a float; 1 / temperature.
        positives: query i matches candidate i + positives, if there is one. Or a pair of int64
            vectors, ids of the queries (B,) and of the candidates (K + Q,): they match where these
            are equal. None: nothing matches, so the loss is 0, with a teacher too.
        queue: (Q, D), the same: the teacher's features of earlier batches. None: no queue.
        teacher_query: (B, D), the teacher's features of what the query shows. None: the targets are
            the matches alone, as in MoCo, and `alpha` is of no account.
        alpha: from 0 to 1, the teacher's part of the targets; a tensor of one element or a float.

    Returns:
        0-d float32 (float64 for float64 features). A batch without a match gives 0.

    Differentiable once in `query` and `logit_scale` (through the student's logits; targets are
    constants, as published); a second time only under `tw.backend("reference")`. Under autocast the
    features are cast as for a matrix product, the rest stays float32.

    Cost: on CPU 4 matrix products of B * (K + Q) * D (3 when no gradient is needed; without a
    teacher 2 and 1), on a GPU 6 (4; 3 and 1). Memory O(B * D) and a workspace that K and Q
    don't change: 32 KiB * D (64 in float64), on a GPU 192 MiB.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the text;
            keys, a queue or a teacher's query that ask for a gradient.
        RuntimeError: inside a torch.func transform.

    Paper: Li et al., Align before Fuse: Vision and Language Representation Learning with Momentum
    Distillation, NeurIPS 2021; Li et al., BLIP: Bootstrapping Language-Image Pre-training for
    Unified Vision-Language Understanding and Generation, ICML 2022.
    """
    targets: dict[str, Any] = {"keys": keys, "queue": queue, "teacher_query": teacher_query}
    given = {name: x for name, x in targets.items() if x is not None or name == "keys"}
    query, *cast = _arguments.features(query=query, **given)
    for name, x in given.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected it detached, since no gradient flows through the targets, "
                "got requires_grad=True"
            )
    targets.update(zip(given, cast, strict=True))
    keys, queue, teacher_query = targets.values()
    if teacher_query is not None and len(teacher_query) != len(query):
        raise ValueError(
            f"teacher_query: expected {len(query)} rows like query, got {len(teacher_query)}"
        )
    if not isinstance(alpha, Tensor):
        alpha = _arguments.check_between("alpha", alpha, 0, 1)
    part = _arguments.scalar("alpha", alpha, query).detach()
    scale = _arguments.scalar("logit_scale", logit_scale, query)
    columns = len(keys) + (0 if queue is None else len(queue))
    matches = _arguments.matches("positives", positives, len(query), columns, query.device)

    op = _backend.operator("itc_loss", query.device, query.dtype)
    if op is None:
        return reference.itc_loss(
            query, keys, scale, positives=positives, queue=queue, teacher_query=teacher_query,
            alpha=part,
        )
    needs = _arguments.needs(query, scale)
    with torch.no_grad():
        offset, query_ids, candidate_ids = matches
        if query_ids is None or candidate_ids is None:
            # A kernel of Triton reads features as they are, which saves a launch.
            as_it_is = _backend.choose(query.device, query.dtype) == "triton"
            dtype = keys.dtype if as_it_is else scale.dtype
            matched, count = matched_by_offset(keys, queue, offset or 0, len(query), dtype)
        else:
            matched, count = matched_by_ids(keys, queue, query_ids, candidate_ids)
    return op(query, keys, scale, queue, teacher_query, part, matched, count, *needs)[0]


register_loss(
    "itc_loss",
    "(Tensor query, Tensor keys, Tensor logit_scale, Tensor? queue, Tensor? teacher_query, "
    "Tensor alpha, Tensor matched, Tensor count, bool need_query, bool need_scale) "
    "-> (Tensor loss, Tensor d_query, Tensor d_scale)",
    differentiable=("query", "logit_scale"),
)
