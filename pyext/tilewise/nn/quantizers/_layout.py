"""Where the channels are: quantisers compute on channels last, and give back what they got."""

import torch
from torch import Tensor, nn


class Layout:
    """Moves channels to the end and back.

    Args:
        channel_last: whether they are last, (B, ..., C), or second, (B, C, ...).
        accept_image_fmap, accept_3d_fmap: they are second, of (B, C, H, W), or (B, C, T, H, W).
    """

    def __init__(self, channel_last: bool, accept_image_fmap: bool, accept_3d_fmap: bool):
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_3d_fmap: expected False beside accept_image_fmap, got True")
        self.channel_last = channel_last and not accept_image_fmap and not accept_3d_fmap
        self.ndim = 4 if accept_image_fmap else 5 if accept_3d_fmap else None

    def to_last(self, x: Tensor, dim: int) -> Tensor:
        """(B, ..., C) with C = dim, a view."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a floating point tensor, got {got}")
        expected = f"(..., {dim})" if self.channel_last else f"(B, {dim}, ...)"
        if self.ndim is not None:
            expected = f"{self.ndim} dimensions {expected}"
        wrong = x.dim() < 2 or (self.ndim is not None and x.dim() != self.ndim)
        if wrong or x.shape[-1 if self.channel_last else 1] != dim:
            raise ValueError(f"x: expected {expected}, got {tuple(x.shape)}")
        return x if self.channel_last else x.movedim(1, -1)

    def restore(self, x: Tensor) -> Tensor:
        """(B, ..., C) as the input was laid out, a view."""
        return x if self.channel_last else x.movedim(-1, 1)


def projections(outer: int, inner: int) -> tuple[nn.Module, nn.Module]:
    """Linear layers from `outer` channels to `inner` and back, where the numbers differ."""
    if outer == inner:
        return nn.Identity(), nn.Identity()
    return nn.Linear(outer, inner), nn.Linear(inner, outer)


def row_mask(x: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
    """Which rows of x (B, ..., C) count, (B, ...) bool, from a mask or from lengths (B)."""
    if lens is not None:
        if mask is not None:
            raise ValueError("lens: expected either mask or lens, got both")
        if x.dim() != 3 or lens.shape != x.shape[:1]:
            raise ValueError(
                f"lens: expected one length for each of {x.shape[0]} sequences, got "
                f"{tuple(lens.shape)} for x of {tuple(x.shape)}"
            )
        return torch.arange(x.shape[1], device=x.device) < lens.unsqueeze(1)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, got {got}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask: expected {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
    return mask
