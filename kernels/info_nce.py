"""InfoNCE in Triton: cross entropies of the queries."""

from torch import Tensor

from tilewise.kernels import _common, _cross_entropy
from tilewise.kernels._cross_entropy import CrossEntropy

CHUNK_BYTES, CHUNK_COLS = _cross_entropy.CHUNK_BYTES, _cross_entropy.CHUNK_COLS
TILES = dict(_cross_entropy.TILES)


def info_nce(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    positives: int | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    label_smoothing: float,
    need_query: bool,
    need_keys: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """InfoNCE and its gradients, float32 and on the device, without a host sync.

    Args:
        query: (B, D), float16, bfloat16 or float32, any strides.
        keys: (N, D), the same.
        logit_scale: one float32.
        positives: query i matches key i + positives, if there is one.
        query_ids, key_ids: int64 (B,) and (N,): those match where these are equal instead.
        label_smoothing: what part of each target all of the keys share.

    Returns:
        loss, d_query, d_keys, d_scale; empty where not needed. Equal bits on every run.

    Cost: 4 matrix products of B*N*D (1 if nothing is needed), memory O((B + N) * D) plus
    CHUNK_BYTES.
    """
    with _common.launching(query=query):
        loss = CrossEntropy(query, keys, logit_scale, label_smoothing > 0, TILES)
        return loss.results(
            positives, (query_ids, key_ids), False, label_smoothing,
            (CHUNK_COLS, CHUNK_BYTES), (need_query, need_keys, need_scale),
        )
