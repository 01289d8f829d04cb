"""CLIP's contrastive softmax loss, tile by tile."""

from torch import Tensor

from tilewise import _backend, reference
from tilewise.ops import _arguments
from tilewise.ops._register import register_loss


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    positives: int | tuple[Tensor, Tensor] | None = 0,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""CLIP's loss: each image among all texts, each text among all images, without the logits.

    With z_ij = logit_scale * <image_i, text_j> and targets t, u that share 1 among the matches of a
    row and of a column (smoothed with 1 / N and 1 / B):

        loss = -1/2 mean_i sum_j t_ij log softmax_j(z_ij)
               -1/2 mean_j sum_i u_ij log softmax_i(z_ij)

    where the means run over the images and the texts that have a match.

    Args:
        image_features: (B, D), float16, bfloat16, float32 or float64. Usually L2-normalised; the
            loss does not normalise.
        text_features: (N, D), same dtype and device. N may differ from B.
        logit_scale: one element or a float; already exponentiated, as in open_clip.
        positives: image i matches text i + positives, if there is one. Or a pair of int64 vectors,
            ids of the images (B,) and of the texts (N,): they match where these are equal. None:
            nothing matches.
        label_smoothing: from 0 to 1, as in `torch.nn.functional.cross_entropy`.

    Returns:
        0-d float32 (float64 for float64 features). A batch without a match gives 0.

    Differentiable once in both features and `logit_scale`; a second time only under
    `tw.backend("reference")`. Under autocast the features are cast as for a matrix product, the
    rest stays float32.

    Cost: 4 matrix products of B*N*D (1 when no gradient is needed), memory O((B + N) * D) plus a
    fixed workspace of 18 MiB (34 MiB in float64, 128 MiB on a GPU), whatever B and N.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, named in the text.
        RuntimeError: inside a torch.func transform.

    Paper: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
    ICML 2021.
    """
    image, text = _arguments.features(
        image_features=image_features, text_features=text_features
    )
    scale = _arguments.scalar("logit_scale", logit_scale, image)
    offset, image_ids, text_ids = _arguments.matches(
        "positives", positives, image.shape[0], text.shape[0], image.device
    )
    _arguments.check_between("label_smoothing", label_smoothing, 0, 1)

    op = _backend.operator("clip_loss", image.device, image.dtype)
    if op is None:
        return reference.clip_loss(
            image, text, scale, positives=positives, label_smoothing=label_smoothing
        )
    needs = _arguments.needs(image, text, scale)
    return op(
        image, text, scale, offset, image_ids, text_ids, float(label_smoothing), *needs
    )[0]


register_loss(
    "clip_loss",
    "(Tensor image_features, Tensor text_features, Tensor logit_scale, SymInt? positives, "
    "Tensor? image_ids, Tensor? text_ids, float label_smoothing, "
    "bool need_image, bool need_text, bool need_scale) "
    "-> (Tensor loss, Tensor d_image, Tensor d_text, Tensor d_scale)",
    differentiable=("image_features", "text_features", "logit_scale"),
)
