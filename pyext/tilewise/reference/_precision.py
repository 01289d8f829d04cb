"""The precision that references compute in."""

import torch
from torch import Tensor


def exact_dtype(x: Tensor) -> torch.dtype:
    """float64, or float32 on devices that have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64
