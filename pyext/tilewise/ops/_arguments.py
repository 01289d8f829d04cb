"""Argument checks and conversions that ops share. Messages name the argument and what came."""

import operator

import torch
from torch import Tensor

NOWHERE = 2**62  # an offset beyond all columns, where a kernel's 64 bits do not overflow


def check_floating(name: str, x: Tensor) -> None:
    """A tensor of float16, bfloat16, float32 or float64."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point() or x.element_size() < 2:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def check_features(**features: Tensor) -> None:
    """All must be floating (rows, D) tensors of the first one's dtype, D and device."""
    for name, x in features.items():
        check_floating(name, x)
        if x.dim() != 2:
            raise ValueError(f"{name}: expected shape (rows, D), got {tuple(x.shape)}")
    first, *others = features
    for name in others:
        check_like(name, features[name], first, features[first])


def check_like(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """As many columns as another tensor, its dtype and its device."""
    if x.shape[1] != like.shape[1]:
        raise ValueError(
            f"{name}: expected as many columns as {like_name}, {like.shape[1]}, got {x.shape[1]}"
        )
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} like {like_name}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like {like_name}, got {x.device}")


def autocast(*tensors):
    """Casts as autocast casts the operands of a matrix product; float64 and None stay."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors
    )


def scalar(name: str, value: Tensor | float, features: Tensor) -> Tensor:
    """A 0-d float32 tensor (float64 beside float64 features) on the features' device."""
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected one floating element, got {value.dtype} {tuple(value.shape)}"
            )
        return value.to(features.device, dtype).reshape(())
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a tensor or a float, got {type(value).__name__}")
    return torch.full((), value, dtype=dtype, device=features.device)  # waits for no GPU


def check_between(name: str, value: float, low: float, high: float) -> None:
    """A number from low to high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected from {low} to {high}, got {value}")


def matches(
    name: str,
    value: int | tuple[Tensor, Tensor] | None,
    rows: int,
    cols: int,
    device: torch.device,
) -> tuple[int | None, Tensor | None, Tensor | None]:
    """`positives` as an offset, or as ids of the rows and columns of the logits.

    Where nothing matches, the offset reaches no column.
    """
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{name}: expected a pair of id vectors, got {len(value)} elements")
        ids = [check_ids(name, *x, device) for x in zip(value, (rows, cols), strict=True)]
        return None, ids[0], ids[1]
    try:
        if value is None:
            return NOWHERE, None, None
        return max(min(operator.index(value), NOWHERE), -NOWHERE), None, None
    except TypeError:
        raise TypeError(
            f"{name}: expected an int, a pair of id vectors or None, got {type(value).__name__}"
        ) from None


def check_ids(name: str, ids: Tensor | None, count: int, device: torch.device) -> Tensor:
    """`count` int64 ids."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected an int64 tensor of ids, got {got}")
    if ids.shape != (count,):
        raise ValueError(f"{name}: expected {count} ids, got {tuple(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{name}: expected ids on {device}, got {ids.device}")
    return ids


def integer(name: str, value: int, least: int | None = None) -> int:
    """`value` as a Python int, at least `least`."""
    if isinstance(value, torch.SymInt):  # while torch.compile traces
        return value
    try:
        # A size that torch.compile traces passes for an int; its index would be a constant.
        number = value if isinstance(value, int) else operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if least is not None and number < least:
        raise ValueError(f"{name}: expected at least {least}, got {number}")
    return number


def row_offset(value: int) -> int:
    """The number of a row of the random stream, a signed 64-bit one."""
    number = integer("row_offset", value)
    if not isinstance(number, torch.SymInt) and not -(2**63) <= number < 2**63:
        raise ValueError(f"row_offset: expected from -2**63 to 2**63 - 1, got {value}")
    return number


def row_mask(name: str, mask: Tensor, x: Tensor) -> Tensor:
    """A bool tensor over the rows of x (..., D), broadcast to all of them."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {got}")
    try:
        return mask.to(x.device).expand(x.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"{name}: expected to broadcast to {tuple(x.shape[:-1])}, got {tuple(mask.shape)}"
        ) from None


def refuse_functorch(op: str) -> None:
    """torch.func transforms do not reach through a registered autograd formula."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            f"tilewise.{op} does not support torch.func transforms (grad, vmap, jvp); "
            "call it under `with tilewise.backend('reference'):`"
        )


def dimension(name: str, value: int, x: Tensor) -> int:
    """`value` counted from the first dimension of x."""
    dims = x.dim()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not -dims <= value < dims:
        raise ValueError(f"{name}: expected from {-dims} to {dims - 1}, got {value}")
    return value % dims
