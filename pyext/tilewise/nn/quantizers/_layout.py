"""Where the channels are: quantisers compute on channels last, and give back what they got."""

from torch import Tensor


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

    @property
    def channels(self) -> int:
        """The dimension of the channels."""
        return -1 if self.channel_last else 1

    def to_last(self, x: Tensor, dim: int) -> Tensor:
        """(B, ..., C) with C = dim, a view."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a floating point tensor, got {got}")
        expected = f"(..., {dim})" if self.channel_last else f"(B, {dim}, ...)"
        if self.ndim is not None:
            expected = f"{self.ndim} dimensions {expected}"
        wrong = x.dim() < 2 or (self.ndim is not None and x.dim() != self.ndim)
        if wrong or x.shape[self.channels] != dim:
            raise ValueError(f"x: expected {expected}, got {tuple(x.shape)}")
        return x if self.channel_last else x.movedim(1, -1)

    def restore(self, x: Tensor) -> Tensor:
        """(B, ..., C) as the input was laid out, a view."""
        return x if self.channel_last else x.movedim(-1, 1)
