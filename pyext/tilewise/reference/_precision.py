"""The precision that references compute in."""

import contextlib

import torch
from torch import Tensor


def exact_dtype(x: Tensor) -> torch.dtype:
    """float64, or float32 on devices that have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off for x's device, where there is autocast."""
    if not torch.amp.is_autocast_available(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
