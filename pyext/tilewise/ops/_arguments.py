"""Argument checks and conversions that ops share. Messages name the argument and what came."""

import operator

import torch
from torch import Tensor

from tilewise import _numbers
from tilewise._numbers import between as check_between
from tilewise._numbers import integer, seed
from tilewise.reference._precision import accumulate_dtype, has_autocast

__all__ = [
    "autocast", "check_between", "check_floating", "check_ids", "dimension", "features", "integer",
    "matches", "needs", "row_mask", "row_offset", "scalar", "seed",
]

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
NOWHERE = 2**62  # an offset beyond all columns, where a kernel's 64 bits do not overflow


def check_floating(name: str, x: Tensor) -> None:
    """A tensor of float16, bfloat16, float32 or float64."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")


def features(**features: Tensor) -> tuple[Tensor, ...]:
    """Floating (rows, D) tensors of one D and device, cast as autocast casts a product's operands.

    After that, all must have the first one's dtype.
    """
    first, *others = features.values()
    if _fit(first, others):
        return first, *others
    for name, x in features.items():
        check_floating(name, x)
        if x.dim() != 2:
            raise ValueError(f"{name}: expected shape (rows, D), got {tuple(x.shape)}")
    like, *rest = zip(features, autocast(*features.values()), strict=True)
    for other in rest:
        check_like(*other, *like)
    return like[1], *(x for _, x in rest)


def _fit(first: Tensor, others: list[Tensor]) -> bool:
    """Whether features can be taken as they are: the usual call, found out cheaply."""
    if not isinstance(first, Tensor) or first.dtype not in FLOATING or first.dim() != 2:
        return False
    dtype, device, columns = first.dtype, first.device, first.shape[1]
    if _casts(device.type):
        return False
    for x in others:
        if not isinstance(x, Tensor) or x.dtype != dtype or x.device != device:
            return False
        if x.dim() != 2 or x.shape[1] != columns:
            return False
    return True


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
    if not _casts(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors
    )


def _casts(device: str) -> bool:
    return has_autocast(device) and torch.is_autocast_enabled(device)


def needs(*inputs: Tensor | None) -> list[bool]:
    """Which of the inputs a gradient is needed of."""
    if not torch.is_grad_enabled():
        return [False] * len(inputs)
    return [x is not None and x.requires_grad for x in inputs]


def scalar(name: str, value: Tensor | float, features: Tensor) -> Tensor:
    """A 0-d float32 tensor (float64 beside float64 features) on the features' device."""
    return _numbers.scalar(name, value, accumulate_dtype(features), features.device)


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
    if value is None:
        return NOWHERE, None, None
    try:
        offset = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        offset = None
    if offset is None:
        raise TypeError(
            f"{name}: expected an int, a pair of id vectors or None, got {type(value).__name__}"
        )
    return max(min(offset, NOWHERE), -NOWHERE), None, None


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


def dimension(name: str, value: int, x: Tensor) -> int:
    """`value` counted from the first dimension of x."""
    dims = x.dim()
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not -dims <= value < dims:
        raise ValueError(f"{name}: expected from {-dims} to {dims - 1}, got {value}")
    return value % dims
