"""Functions of packages that have kernels for GPUs alone, imported when they are called.

None of them has run here: how they are called was read in their code, of the releases named. They
are compared where there is a GPU and they are installed, and a row says so where one fails.
"""

import importlib

import torch
from torch import Tensor


def siglip_kernel_sigmoid_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """siglip_kernel's fused loss (0.1.2); it takes the logarithm of the scale."""
    return importlib.import_module("siglip_kernel").fused_siglip_loss(
        image_features, text_features, logit_scale.log(), logit_bias
    )


def memeff_clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: float) -> Tensor:
    """memeff's loss (0.3.1). Its temperature is a number, and not learned.

    By default its gradient has another scale, which depends on the batch.
    """
    memeff = importlib.import_module("memeff")
    loss = memeff.MemoryEfficientCLIPLoss(1 / logit_scale, normalized_inputs=True, stable=False)
    return loss(image_features, text_features)


def inf_cl_clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Inf-CL's loss (1.2.1) in both directions."""
    of_images = inf_cl_info_nce(image_features, text_features, logit_scale)
    return (of_images + inf_cl_info_nce(text_features, image_features, logit_scale)) / 2


def inf_cl_info_nce(query: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
    """Inf-CL's loss (1.2.1) on one device, which multiplies in float32.

    It takes a row as heads of one size, 256 by default, whose products it adds.
    """
    flash = importlib.import_module("inf_cl.flash")
    head_dim = min(query.shape[1], 256)
    return flash.cal_flash_loss(query, keys, scale=logit_scale, head_dim=head_dim).mean()


def cut_cross_entropy_info_nce(query: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
    """Cut cross-entropy (25.1): keys are the classifier. Small gradients are not left out."""
    package = importlib.import_module("cut_cross_entropy")
    targets = torch.arange(len(query), device=query.device)
    scaled = (logit_scale * query).to(keys.dtype)
    return package.linear_cross_entropy(scaled, keys, targets, filter_eps=None)


def flash_kmeans_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The assignment step of flash-kmeans (0.3.1), by ||x||^2 - 2 <x, c> + ||c||^2."""
    assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    lengths = x.float().square().sum(1)
    return assign(x[None], codebook[None], lengths[None])[0].long()
