"""The precision that references compute in, and results have."""

import contextlib

import torch
from torch import Tensor


def exact_dtype(x: Tensor) -> torch.dtype:
    """float64, or float32 on devices that have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: of sums, losses, probabilities and temperatures."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def has_autocast(device: str) -> bool:
    """Whether there is autocast for a type of device."""
    # Asked by name first: the compiler of torch 2.9 does not see into the function.
    return device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off for x's device, where there is autocast."""
    if not has_autocast(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)
