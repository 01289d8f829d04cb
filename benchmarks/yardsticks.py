"""What people run today, as they write it. Tests, benchmarks and examples compare with it."""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    positives: int | None = 0,
) -> Tensor:
    """The sigmoid loss in the inputs' own dtype, with its B x N matrices of logits and labels."""
    logits = logit_scale * image_features @ text_features.T  # (B, N)
    if logit_bias is not None:
        logits = logits + logit_bias
    labels = -torch.ones_like(logits)
    if positives is not None:
        rows = torch.arange(len(image_features), device=logits.device)
        columns = torch.arange(len(text_features), device=logits.device)
        labels = labels + 2 * (columns == rows[:, None] + positives)
    return -F.logsigmoid(labels * logits).sum() / len(image_features)


@functools.cache
def compiled(function: Callable) -> Callable:
    """`function` through torch.compile, compiled once for all sizes."""
    return torch.compile(function, dynamic=True)


def installed(package: str) -> bool:
    """Whether `package` could be imported."""
    return importlib.util.find_spec(package) is not None


def open_clip_sigmoid_loss(*features_scale_bias: Tensor, chunk_size: int = 0) -> Tensor:
    """open_clip's SigLipLoss; a `chunk_size` only where `open_clip_has_chunks`."""
    options = {"chunk_size": chunk_size} if chunk_size else {}
    return open_clip_loss().SigLipLoss(**options)(*features_scale_bias)


def open_clip_has_chunks() -> bool:
    """Whether the installed open_clip can compute its sigmoid loss chunk by chunk."""
    return "chunk_size" in inspect.signature(open_clip_loss().SigLipLoss).parameters


def siglip_kernel_sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """siglip_kernel's fused loss, for GPUs; it takes the logarithm of the scale."""
    return importlib.import_module("siglip_kernel").fused_siglip_loss(
        image, text, scale.log(), bias
    )


_torchvision_ops: list[torch.library.Library] = []


@functools.cache
def open_clip_loss() -> ModuleType:
    """open_clip.loss, also where torchvision was built for another torch.

    open_clip imports torchvision, and a torchvision whose C++ operators do not load stops at the
    first schema that it misses. Declaring two of them lets it go on; the loss needs none.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_ops.append(library)  # a library that is dropped takes its schemas along
    return importlib.import_module("open_clip.loss")
