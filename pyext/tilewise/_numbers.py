"""Numbers as users have them: of Python, of numpy, or tensors of one element."""

import math
import numbers
import operator

import numpy as np
import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max


def integer(name: str, value: int, least: int | None = None) -> int:
    """`value` as a Python int, at least `least`."""
    if isinstance(value, torch.SymInt):  # while torch.compile traces
        return value
    try:
        # A size that torch.compile traces passes for an int; its index would be a constant.
        number = value if isinstance(value, int) else operator.index(value)
    except TypeError:
        number = True
    if isinstance(number, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if least is not None and number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def real(name: str, value: float) -> float:
    """`value` as a Python float."""
    if isinstance(value, (float, int, torch.SymFloat)) and not isinstance(value, bool):
        return value
    of_numpy = isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "fiu"
    if not of_numpy and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    return float(value)


def between(name: str, value: float, low: float, high: float) -> float:
    """`value` as a Python float, from low to high."""
    number = real(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name}: expected from {low} to {high}, got {value}")
    return number


def scalar(name: str, value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-d tensor of a floating dtype; what float32 can't hold is infinite."""
    if isinstance(value, Tensor):
        if value.dtype == dtype and value.device == device and value.dim() == 0:
            return value
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(
                f"{name}: expected one real element, got {value.dtype} {tuple(value.shape)}"
            )
        return value.to(device, dtype).reshape(())
    try:
        number = real(name, value)
    except TypeError:
        raise TypeError(
            f"{name}: expected a tensor or a float, got {type(value).__name__}"
        ) from None
    if dtype == torch.float32 and not torch.compiler.is_compiling() and abs(number) > _LARGEST:
        number = math.copysign(math.inf, number)
    return torch.scalar_tensor(number, dtype=dtype, device=device)  # waits for no GPU


def version(x: Tensor) -> int | None:
    """How often a tensor was written to; None of an inference tensor, which does not count it."""
    if not torch.compiler.is_compiling() and x.is_inference():  # which is not traced
        return None
    return x._version


def seed(value: Tensor | int | None, device: torch.device) -> Tensor:
    """A 0-d int64 tensor on the device; None draws it from torch's default generator there.

    From 2**63 on it is the negative number of the same 64 bits, as in torch.manual_seed.
    """
    if value is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.dtype == torch.bool or value.numel() != 1:
            raise TypeError(
                f"seed: expected one integer element, got {value.dtype} {tuple(value.shape)}"
            )
        return value.detach().to(device, torch.int64).reshape(())
    if isinstance(value, bool):
        raise TypeError("seed: expected an int, a tensor or None, got bool")
    try:
        number = integer("seed", value)
    except TypeError:
        raise TypeError(
            f"seed: expected an int, a tensor or None, got {type(value).__name__}"
        ) from None
    if not isinstance(number, torch.SymInt):
        if not -(2**63) <= number < 2**64:
            raise ValueError(f"seed: expected from -2**63 to 2**64 - 1, got {value}")
        number = number - 2**64 if number >= 2**63 else number
    return torch.full((), number, dtype=torch.int64, device=device)  # waits for no GPU
