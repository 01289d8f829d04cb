"""SigLipLoss: open_clip's module, on tilewise's sigmoid loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tilewise.distributed import ROUTES
from tilewise.nn.losses import _open_clip, _ring
from tilewise.nn.losses._call import OpenClipCall
from tilewise.ops.sigmoid_loss import sigmoid_loss

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class SigLipLoss(nn.Module):
    """Sigmoid loss of all pairs in the batch; takes open_clip's place without other changes.

    `loss(image_features, text_features, logit_scale, logit_bias)` is
    `tilewise.sigmoid_loss` of the same arguments, with text i matching image i.

    Args:
        cache_labels: accepted for compatibility; there are no labels to cache.
        rank, world_size: this process and how many there are.
        dist_impl: how texts go round: "bidir" (the default), "shift", "reduce" or "gather", as in
            `tilewise.distributed.circulate`. The loss is the same.
        chunk_size: accepted for compatibility; tiles always have a fixed size.
        group: the processes; their rank and world size need not be given then. None is all of them.

    Raises:
        ValueError: another `dist_impl`; in a call, another number of texts than of images. With
            several processes all raise it, also where they differ in D, dtype, options, or in
            which gradients they need.
        RuntimeError: several processes without a process group; a process that was lost, by name.

    With several processes, each calls it with its own rows, whose numbers may differ and be 0. The
    loss is the sum over one's own images and all texts, over the mean number of rows: the mean of
    all processes' losses is the loss of all pairs, and with the mean of the gradients, which
    DistributedDataParallel and FSDP take, training is that of one process with all rows. Every
    exchange is in the forward pass; all processes must then multiply the loss by the same number.

    Cost over W processes of b rows: 3 products of b * W*b * D, memory O(b * D) whatever W (with
    "gather" O(W*b * D)). A process sends its texts and their float32 gradients W - 1 times, while
    the products are computed.

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
        *,
        group: ProcessGroup | None = None,
    ):
        super().__init__()
        if dist_impl not in (None, *ROUTES):
            raise ValueError(
                f"dist_impl: expected one of {', '.join(ROUTES)} or None, got {dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.rank, self.world_size = _open_clip.place(rank, world_size, group)
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = chunk_size
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or `{"contrastive_loss": loss}` with `output_dict`."""
        inputs = image_features, text_features, logit_scale, logit_bias
        if _open_clip.over_processes(self):
            options = {"route": self.dist_impl}
            loss = _open_clip.loss_over_processes(self, _ring.sigmoid, options, *inputs)
        else:
            loss = self._loss(*inputs)
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
