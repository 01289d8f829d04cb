"""CLIP's loss in Triton: cross entropies of the images and of the texts."""

from torch import Tensor

from tilewise.kernels import _common, _cross_entropy
from tilewise.kernels._cross_entropy import CrossEntropy

CHUNK_BYTES, CHUNK_COLS = _cross_entropy.CHUNK_BYTES, _cross_entropy.CHUNK_COLS
TILES = dict(_cross_entropy.TILES)


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    positives: int | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    label_smoothing: float,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of CLIP and its gradients, float32 and on the device, without a host sync.

    Args:
        image_features: (B, D), float16, bfloat16 or float32, any strides.
        text_features: (N, D), the same.
        logit_scale: one float32.
        positives: image i matches text i + positives, if there is one.
        image_ids, text_ids: int64 (B,) and (N,): those match where these are equal instead.
        label_smoothing: what part of each target all of the others share.

    Returns:
        loss, d_image, d_text, d_scale; empty where not needed. Equal bits on every run.

    Cost: 4 matrix products of B*N*D (1 if nothing is needed), memory O((B + N) * D) plus
    CHUNK_BYTES.
    """
    with _common.launching(image_features=image_features):
        loss = CrossEntropy(image_features, text_features, logit_scale, label_smoothing > 0, TILES)
        return loss.results(
            positives, (image_ids, text_ids), True, label_smoothing,
            (CHUNK_COLS, CHUNK_BYTES), (need_image, need_text, need_scale),
        )
