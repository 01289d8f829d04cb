"""The sigmoid loss of SigLIP, tile by tile."""

from torch import Tensor

from tilewise import _backend, reference
from tilewise.ops import _arguments
from tilewise.ops._register import register_loss


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
) -> Tensor:
    r"""Sigmoid loss of all image-text pairs, without the matrix of their logits (SigLIP).

    With z_ij = logit_scale * <image_i, text_j> + logit_bias and m_ij = 1 where the pair matches,
    -1 where it does not:

        loss = sum_ij log(1 + exp(-m_ij * z_ij)) / B

    Args:
        image_features: (B, D), float16, bfloat16, float32 or float64. Usually L2-normalised; the
            loss does not normalise.
        text_features: (N, D), same dtype and device. N may differ from B.
        logit_scale: one element or a float; already exponentiated, as in open_clip.
        logit_bias: one element or a float; None is 0.
        positives: image i matches text i + positives, if there is one. Or a pair of int64 vectors,
            ids of the images (B,) and of the texts (N,): they match where these are equal, so that
            an image may have several captions. None: no pair matches, as in the blocks that a ring
            of processes exchanges.

    Returns:
        0-d float32 (float64 for float64 features). An empty batch gives 0.

    Differentiable once in both features, `logit_scale` and `logit_bias`; a second time only under
    `tw.backend("reference")`. Under autocast the features are cast as for a matrix product, the
    rest stays float32.

    Cost: 3 matrix products of B*N*D (1 when no gradient is needed), memory O((B + N) * D) plus a
    fixed workspace of 18 MiB (34 MiB in float64, 128 MiB on a GPU), whatever B and N.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the text.
        RuntimeError: inside a torch.func transform.

    Paper: Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023.
    """
    image, text = _arguments.features(
        image_features=image_features, text_features=text_features
    )
    scale = _arguments.scalar("logit_scale", logit_scale, image)
    bias = None if logit_bias is None else _arguments.scalar("logit_bias", logit_bias, image)
    offset, image_ids, text_ids = _arguments.matches(
        "positives", positives, image.shape[0], text.shape[0], image.device
    )

    op = _backend.operator("sigmoid_loss", image.device, image.dtype)
    if op is None:
        return reference.sigmoid_loss(image, text, scale, bias, positives=positives)
    needs = _arguments.needs(image, text, scale, bias)
    return op(image, text, scale, bias, offset, image_ids, text_ids, *needs)[0]


register_loss(
    "sigmoid_loss",
    "(Tensor image_features, Tensor text_features, Tensor logit_scale, Tensor? logit_bias, "
    "SymInt? positives, Tensor? image_ids, Tensor? text_ids, "
    "bool need_image, bool need_text, bool need_scale, bool need_bias) "
    "-> (Tensor loss, Tensor d_image, Tensor d_text, Tensor d_scale, Tensor d_bias)",
    differentiable=("image_features", "text_features", "logit_scale", "logit_bias"),
)
