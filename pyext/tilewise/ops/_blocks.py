"""Losses of a block of the logits, for processes that each hold a part of the features.

A block's features have been cast, its scalars are 0-d tensors, `offset` is an int (`NOWHERE`: no
pair matches). Gradients that are not needed are empty.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tilewise import _backend, reference
from tilewise.ops._arguments import NOWHERE
from tilewise.ops._register import define
from tilewise.reference._matches import matches
from tilewise.reference._precision import accumulate_dtype, exact_dtype


def sigmoid_block(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, offset: int,
    needs: Sequence[bool], total: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`sigmoid_loss` and its gradients by image, text, scale and bias.

    Args:
        total: that by the image is added to it, (B, D), and this is returned.
    """
    if total is not None and needs[0]:
        if _backend.choose(image.device, image.dtype) == "cpu":
            loss, *rest = torch.ops.tilewise.sigmoid_block_added(
                image, text, scale, bias, offset, total, *needs[1:]
            )
            return loss, total, *rest
        loss, d_image, *rest = sigmoid_block(image, text, scale, bias, offset, needs)
        return loss, total.add_(d_image), *rest
    op = _backend.operator("sigmoid_loss", image.device, image.dtype)
    if op is not None:
        return op(image, text, scale, bias, offset, None, None, *needs)
    bias = torch.zeros_like(scale) if bias is None else bias
    leaves = [x.detach() for x in (image, text, scale, bias)]
    wanted = [x.requires_grad_() for x, need in zip(leaves, needs, strict=True) if need]
    with torch.enable_grad():
        loss = reference.sigmoid_loss(*leaves, positives=offset)
    gradients = iter(torch.autograd.grad(loss, wanted) if wanted else ())
    dtype = accumulate_dtype(image)
    empty = image.new_empty(0, dtype=dtype)
    return loss.detach(), *(next(gradients).to(dtype) if need else empty for need in needs)


def block_sums(
    image: Tensor, text: Tensor, scale: Tensor, offset: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first pass of `clip_loss` over a block: sums of exponentials, and the matches' logits.

    Returns:
        Of each image (2, B) and each text (2, N), float64: the largest logit, and the sum of
        exponentials relative to it; -inf and 0 where there is no logit. The sum of the logits of
        pairs that match, () float64.

    Sums of two blocks (m, s), (n, t) are those of both at once: (M, s exp(m - M) + t exp(n - M)),
    M = max(m, n). Cost: 1 matrix product of B*N*D.
    """
    op = _backend.operator("clip_block_sums", image.device, image.dtype)
    if op is not None:
        return op(image, text, scale, offset)
    z, match = _logits(image, text, scale, offset)
    return _log_sums(z), _log_sums(z.T), (z * match).sum()


def block_gradients(
    image: Tensor, text: Tensor, scale: Tensor, offset: int,
    image_sums: Tensor, text_sums: Tensor, image_weight: Tensor, text_weight: Tensor,
    needs: Sequence[bool], total: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The second pass: gradients of a block by image, text and scale; see `clip_loss`.

        dz_ij = image_weight_i (p_ij - match_ij) + text_weight_j (q_ij - match_ij)

    with the softmaxes p and q whose sums, over all blocks, are `image_sums` (2, B) and `text_sums`
    (2, N). Weights, (B,) and (N,) float64, are what a row or column counts in the loss: 0 leaves
    it out, whatever its sums are. `total` as in `sigmoid_block`. Cost: 3 matrix products of B*N*D.
    """
    inputs = (
        image, text, scale, offset, image_sums, text_sums, image_weight, text_weight
    )  # fmt: skip
    if total is not None and needs[0]:
        if _backend.choose(image.device, image.dtype) == "cpu":
            d_text, d_scale = torch.ops.tilewise.clip_block_added(*inputs, total, *needs[1:])
            return total, d_text, d_scale
        d_image, d_text, d_scale = block_gradients(*inputs, needs)
        return total.add_(d_image), d_text, d_scale
    op = _backend.operator("clip_block_gradients", image.device, image.dtype)
    if op is not None:
        return op(*inputs, *needs)
    z, match = _logits(image, text, scale, offset)
    dz = _residuals(z, match, image_sums, image_weight)
    dz = dz + _residuals(z.T, match.T, text_sums, text_weight).T
    x, y = image.to(z.dtype), text.to(z.dtype)
    gradients = dz @ y * scale, dz.T @ x * scale, (dz * (x @ y.T)).sum()
    dtype = accumulate_dtype(image)
    d_image, d_text, d_scale = (
        gradient.to(dtype) if need else image.new_empty(0, dtype=dtype)
        for gradient, need in zip(gradients, needs, strict=True)
    )
    return d_image, d_text, d_scale


def block_means(
    query: Tensor, keys: Tensor, scale: Tensor, need_mean: bool = True
) -> tuple[Tensor, Tensor]:
    """A block of `itc_loss`: of each query's softmax over the keys, sums and mean of the keys.

    Returns:
        (2, B) float64: the largest logit, and the sum of exponentials relative to it; -inf and 0
        without a key. (B, D) the mean of the keys, weighted by exponentials; 0 without a key.

    Cost: 2 matrix products of B*N*D, 1 without the mean.
    """
    op = _backend.operator("itc_block_means", query.device, query.dtype)
    if op is not None:
        return op(query, keys, scale, need_mean)
    z, _ = _logits(query, keys, scale, NOWHERE)
    sums = _log_sums(z)
    mean = z.softmax(1) @ keys.to(z.dtype) if need_mean else z.new_empty(0)
    return sums, mean.to(accumulate_dtype(query))


def _logits(image: Tensor, text: Tensor, scale: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """(B, N) in float64, and 1 where a pair matches."""
    z = image.to(exact_dtype(image)) @ text.to(exact_dtype(text)).T * scale
    return z, matches(image, text, offset).to(z.dtype)


def _log_sums(z: Tensor) -> Tensor:
    """(2, rows): the largest of each row, and the sum of exponentials relative to it."""
    z = torch.cat([z, z.new_full((len(z), 1), -torch.inf)], dim=1)
    largest = z.amax(1)
    base = torch.where(largest == -torch.inf, 0.0, largest)
    return torch.stack([largest, (z - base[:, None]).exp().sum(1)])


def _residuals(z: Tensor, match: Tensor, sums: Tensor, weight: Tensor) -> Tensor:
    """weight * (softmax - match) along rows, 0 where the weight is."""
    p = (z - sums[0][:, None]).exp() / sums[1][:, None]
    weight = weight[:, None]
    return torch.where(weight != 0, weight * (p - match), 0.0)


def _fake_sums(image, text, logit_scale, positives):
    new = functools.partial(image.new_empty, dtype=torch.float64)
    return new((2, len(image))), new((2, len(text))), new(())


def _fake_means(query, keys, logit_scale, need_mean):
    mean = query.new_empty(query.shape if need_mean else 0, dtype=accumulate_dtype(query))
    return query.new_empty((2, len(query)), dtype=torch.float64), mean


def _fake_gradients(image, text, logit_scale, positives, image_sums, text_sums, image_weight,
                    text_weight, need_image, need_text, need_scale):  # fmt: skip
    new = functools.partial(image.new_empty, dtype=accumulate_dtype(image))
    shapes = zip((image.shape, text.shape, ()), (need_image, need_text, need_scale), strict=True)
    return tuple(new(shape if need else 0) for shape, need in shapes)


def _fake_sigmoid_added(image, text, logit_scale, logit_bias, positives, total, need_text,
                        need_scale, need_bias):  # fmt: skip
    new = functools.partial(image.new_empty, dtype=accumulate_dtype(image))
    shapes = zip((text.shape, (), ()), (need_text, need_scale, need_bias), strict=True)
    return new(()), *(new(shape if need else 0) for shape, need in shapes)


def _fake_clip_added(image, text, logit_scale, positives, image_sums, text_sums, image_weight,
                     text_weight, total, need_text, need_scale):  # fmt: skip
    return _fake_gradients(image, text, logit_scale, positives, image_sums, text_sums,
                           image_weight, text_weight, False, need_text, need_scale)[1:]  # fmt: skip


define(
    "clip_block_sums",
    "(Tensor image, Tensor text, Tensor logit_scale, SymInt? positives) "
    "-> (Tensor image_sums, Tensor text_sums, Tensor matched)",
    _fake_sums, module="_blocks",
)
define(
    "clip_block_gradients",
    "(Tensor image, Tensor text, Tensor logit_scale, SymInt? positives, "
    "Tensor image_sums, Tensor text_sums, Tensor image_weight, Tensor text_weight, "
    "bool need_image, bool need_text, bool need_scale) "
    "-> (Tensor d_image, Tensor d_text, Tensor d_scale)",
    _fake_gradients, module="_blocks",
)
define(  # on CPU, where a gradient that is added later takes a tenth longer
    "sigmoid_block_added",
    "(Tensor image, Tensor text, Tensor logit_scale, Tensor? logit_bias, SymInt? positives, "
    "Tensor(a!) total, bool need_text, bool need_scale, bool need_bias) "
    "-> (Tensor loss, Tensor d_text, Tensor d_scale, Tensor d_bias)",
    _fake_sigmoid_added,
)
define(
    "clip_block_added",
    "(Tensor image, Tensor text, Tensor logit_scale, SymInt? positives, "
    "Tensor image_sums, Tensor text_sums, Tensor image_weight, Tensor text_weight, "
    "Tensor(a!) total, bool need_text, bool need_scale) -> (Tensor d_text, Tensor d_scale)",
    _fake_clip_added,
)
define(
    "itc_block_means",
    "(Tensor query, Tensor keys, Tensor logit_scale, bool need_mean) -> (Tensor sums, Tensor mean)",
    _fake_means, module="_blocks",
)
