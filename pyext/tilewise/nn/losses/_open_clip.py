"""What ClipLoss and SigLipLoss share with open_clip's beside their results."""

import torch
from torch import Tensor


def refuse_processes(module: str, function: str, world_size: int) -> None:
    """Several processes: not yet, but gathered features give the loss of all of them."""
    if world_size > 1:
        raise NotImplementedError(
            f"tilewise.nn.{module}: world_size={world_size}, but several processes are not "
            "supported yet, expected 1. Until then gather the features with their gradients, "
            "`image, text = (torch.cat(torch.distributed.nn.all_gather(x)) for x in (image, text))`"
            f", and call `tilewise.{function}(image, text, logit_scale, ...)` in every process; "
            "DistributedDataParallel's mean of the gradients is then that of all pairs"
        )


def check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    """Text i belongs to image i."""
    if len(image_features) != len(text_features):
        raise ValueError(
            f"text_features: expected {len(image_features)} rows, one for each image, "
            f"got {len(text_features)}"
        )


def logits(
    features: Tensor, others: Tensor, scale: Tensor | float, bias: Tensor | float | None
) -> Tensor:
    """All of them, which open_clip's subclasses ask for: (B, N)."""
    product = scale * features @ others.T
    return product if bias is None else product + bias


def with_gradient_of_zero(loss: Tensor, x: Tensor | float | None) -> Tensor:
    """The same loss, whose gradient by x is zero, not None, which stops DistributedDataParallel."""
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        loss = loss + x.reshape(-1)[:0].sum().to(loss.dtype)  # of nothing: 0, whatever x is
    return loss
