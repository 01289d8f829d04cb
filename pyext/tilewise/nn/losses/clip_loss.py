"""ClipLoss: open_clip's module, on tilewise's CLIP loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tilewise import distributed
from tilewise.nn.losses import _open_clip, _ring
from tilewise.nn.losses._call import OpenClipCall
from tilewise.ops.clip_loss import clip_loss

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class ClipLoss(nn.Module):
    """CLIP's contrastive loss of the batch; takes open_clip's place without other changes.

    `loss(image_features, text_features, logit_scale)` is `tilewise.clip_loss` of the same
    arguments, with text i matching image i.

    Args:
        local_loss: with several processes, each has the loss of its own images and texts, else all
            have that of all pairs.
        gather_with_grad: with several processes, the gradients are W times those of the loss of all
            pairs, whose mean over the processes is its gradient by the towers' parameters. Without
            it they are once those, W times too small after that mean; and with `local_loss`, only
            what images and texts have as queries, not as each other's candidates. As in open_clip.
        cache_labels: accepted for compatibility; there are no labels to cache.
        rank, world_size: this process and how many there are.
        use_horovod: not supported.
        group: the processes; their rank and world size need not be given then. None is all of them.

    Raises:
        NotImplementedError: `use_horovod`.
        ValueError: in a call, another number of texts than of images. With several processes all
            raise it, also where they differ in D, dtype, options, or in which gradients they need.
        RuntimeError: several processes without a process group; a process that was lost, by name.

    With several processes, each calls it with its own rows, whose numbers may differ and be 0: then
    a local loss is a sum over the mean number of rows, so that the mean of the processes' losses is
    the loss of all pairs. The gradient by `logit_scale` is that of all pairs; with `local_loss`,
    its mean over the processes is. Every exchange is in the forward pass; all processes must then
    multiply the loss by the same number.

    Cost over W processes of b rows: 4 products of b * W*b * D, memory O(b * D) whatever W. A
    process sends its texts 2 (W - 1) times and their float32 gradients W - 1 times, both ways round
    the ring, while the products are computed; with `local_loss` alone, where features have no
    gradient as candidates, its images and its texts W - 1 times, in one round.

    open_clip's subclasses work on it: `get_logits` and `get_ground_truth` are as there.
    """

    __call__: OpenClipCall

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: ProcessGroup | None = None,
    ):
        super().__init__()
        if use_horovod:
            raise NotImplementedError(
                "tilewise.nn.ClipLoss: use_horovod is not supported, expected False, got True"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank, self.world_size = _open_clip.place(rank, world_size, group)
        self.use_horovod = use_horovod
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or `{"contrastive_loss": loss}` with `output_dict`.

        `logit_bias` changes nothing, as in any softmax; its gradient is zero.
        """
        inputs = image_features, text_features, logit_scale
        if _open_clip.over_processes(self):
            options = {"local_loss": self.local_loss, "gather_with_grad": self.gather_with_grad}
            loss = _open_clip.loss_over_processes(self, _ring.clip, options, *inputs)
        else:
            _open_clip.check_pairs(image_features, text_features)
            loss = clip_loss(*inputs)
        loss = _open_clip.with_gradient_of_zero(loss, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All logits, per image and per text, for subclasses that need them: O(B^2) memory."""
        image, text = images, texts = image_features, text_features
        if _open_clip.over_processes(self):
            images, texts = (self._gathered(x) for x in (image, text))
            if not self.local_loss:
                image, text = images, texts
        scale_bias = logit_scale, logit_bias
        return (
            _open_clip.logits(image, texts, *scale_bias),
            _open_clip.logits(text, images, *scale_bias),
        )

    def _gathered(self, features: Tensor) -> Tensor:
        """Those of all processes, with the gradients that the options say."""
        if self.gather_with_grad:
            return distributed.gather(features, self.group)
        gathered = distributed.gather(features.detach(), self.group)
        if self.local_loss:
            return gathered
        first = self.rank * len(features)  # open_clip's processes have equally many
        return torch.cat([gathered[:first], features, gathered[first + len(features) :]])

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's match, (num_logits,) int64; for subclasses."""
        local = self.local_loss and self.world_size > 1
        return torch.arange(num_logits, device=device) + (num_logits * self.rank if local else 0)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"
