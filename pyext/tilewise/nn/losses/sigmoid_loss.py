"""SigLipLoss: open_clip's module, on tilewise's sigmoid loss."""

import torch
from torch import Tensor, nn

from tilewise.nn.losses import _open_clip
from tilewise.nn.losses._call import OpenClipCall
from tilewise.ops.sigmoid_loss import sigmoid_loss

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(nn.Module):
    """Sigmoid loss of all pairs in the batch; takes open_clip's place without other changes.

    `loss(image_features, text_features, logit_scale, logit_bias)` is
    `tilewise.sigmoid_loss` of the same arguments, with text i matching image i.

    Args:
        cache_labels: accepted for compatibility; there are no labels to cache.
        rank, world_size: this process and how many there are. More than one is not supported yet.
        dist_impl: "bidir", "shift", "reduce" or "gather", how processes would exchange features;
            accepted for compatibility.
        chunk_size: accepted for compatibility; tiles always have a fixed size.

    Raises:
        NotImplementedError: `world_size` > 1; the message says what to do.
        ValueError: another `dist_impl`; in a call, another number of texts than of images.

    open_clip's subclasses work on it: `get_logits`, `get_ground_truth` and `_loss` are as there.
    """

    __call__: OpenClipCall

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        _open_clip.refuse_processes("SigLipLoss", "sigmoid_loss", world_size)
        if dist_impl not in (None, *DIST_IMPLS):
            raise ValueError(
                f"dist_impl: expected one of {', '.join(DIST_IMPLS)} or None, got {dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or `{"contrastive_loss": loss}` with `output_dict`."""
        loss = self._loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """The loss of a block, which matches nothing if `negative_only`; for subclasses."""
        _open_clip.check_pairs(image_features, text_features)
        return sigmoid_loss(
            image_features, text_features, logit_scale, logit_bias,
            positives=None if negative_only else 0,
        )

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """All logits, for subclasses that need them: O(B^2) memory."""
        return _open_clip.logits(image_features, text_features, logit_scale, logit_bias)

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """1 for what matches, -1 elsewhere, (num_logits, num_logits); for subclasses."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}, dist_impl={self.dist_impl!r}"
