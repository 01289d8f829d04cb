"""The type of a call of the losses that take open_clip's place; nn.Module's own is Any."""

from typing import Literal, Protocol, overload

from torch import Tensor


class OpenClipCall(Protocol):
    """A tensor, or with `output_dict=True` a dictionary that holds it."""

    @overload
    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        *,
        output_dict: Literal[True],
    ) -> dict[str, Tensor]: ...
