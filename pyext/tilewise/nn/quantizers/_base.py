"""What all quantisers share: the way of an input in and out, rows that count, indices."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tilewise.nn.quantizers._derivatives import in_functorch
from tilewise.nn.quantizers._layout import Layout
from tilewise.ops import _arguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

    # (quantized, indices, loss), and what else was asked for.
    Quantized = tuple[Tensor, Tensor, Tensor, Unpack[tuple[Any, ...]]]


class Quantizer(nn.Module):
    """Base class of quantisers, which return `(quantized, indices, loss, ...)`.

    Args:
        dim: channels of the input.
        channel_last, accept_image_fmap, accept_3d_fmap: where they are, see `Layout`.
    """

    __call__: "Callable[..., Quantized]"  # nn.Module's returns Any

    def __init__(
        self,
        dim: int,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
    ):
        super().__init__()
        self.dim = _arguments.integer("dim", dim, least=1)
        self._layout = Layout(channel_last, accept_image_fmap, accept_3d_fmap)

    def _take(
        self, x: Tensor, mask: Tensor | None, lens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """x with channels last, (B, ..., dim), and which of its rows count, (B, ...) bool."""
        x = self._layout.to_last(x, self.dim)
        return x, row_mask(x, mask, lens)

    def _give(
        self, quantized: Tensor, x: Tensor, mask: Tensor | None, keep_padding: bool = False
    ) -> Tensor:
        """quantized (B, ..., C) in x's dtype and layout; zeros, or x, where masked."""
        quantized = quantized.to(x.dtype)
        if mask is not None:
            padding = x if keep_padding else torch.zeros_like(quantized[..., :1])
            quantized = torch.where(mask.unsqueeze(-1), quantized, padding)
        return self._layout.restore(quantized)


def check_codes(codes: Tensor, like: Tensor) -> None:
    """Codes that may be put in the place of others: a floating tensor of their shape."""
    _arguments.check_floating("codebook", codes)
    if codes.shape != like.shape:
        raise ValueError(f"codebook: expected {tuple(like.shape)}, got {tuple(codes.shape)}")


def row_mask(x: Tensor, mask: Tensor | None, lens: Tensor | None) -> Tensor | None:
    """Which rows of x (B, ..., C) count, (B, ...) bool, from a mask or from lengths (B)."""
    if lens is not None:
        if mask is not None:
            raise ValueError("lens: expected either mask or lens, got both")
        if not isinstance(lens, Tensor):
            raise TypeError(f"lens: expected a tensor of lengths, got {type(lens).__name__}")
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


def code_indices(indices: Tensor, size: int) -> Tensor:
    """Indices of `size` codes as int64; negative ones mean none.

    On a CPU they are looked at. Elsewhere that would wait for the device, which complains itself.
    """
    integers = not (indices.is_floating_point() or indices.is_complex()) and (
        indices.dtype != torch.bool
    ) if isinstance(indices, Tensor) else False
    if not integers:
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices: expected a tensor of integers, got {got}")
    indices = indices.to(torch.int64)
    looks = indices.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not in_functorch() and indices.numel() and int(indices.max()) >= size:
        raise ValueError(f"indices: expected less than {size} codes, got {int(indices.max())}")
    return indices


ANY: Any = object()  # the value of an option that matters only beside another one


def refuse_options(options: Mapping[str, Any], off: Mapping[str, Any]) -> None:
    """Options that the replaced package has and we lack may be given with what switches them off.

    Args:
        options: what was given.
        off: that value for each option, or `ANY`.
    """
    for name, value in options.items():
        if name not in off:
            raise TypeError(f"{name}: unexpected keyword argument")
        if off[name] is not ANY and value is not off[name] and value != off[name]:
            raise TypeError(f"{name}: is not supported, expected {off[name]!r}, got {value!r}")
