"""ClipLoss: open_clip's module, on tilewise's CLIP loss."""

import torch
from torch import Tensor, nn

from tilewise.nn.losses import _open_clip
from tilewise.nn.losses._call import OpenClipCall
from tilewise.ops.clip_loss import clip_loss


class ClipLoss(nn.Module):
    """CLIP's contrastive loss of the batch; takes open_clip's place without other changes.

    `loss(image_features, text_features, logit_scale)` is `tilewise.clip_loss` of the same
    arguments, with text i matching image i.

    Args:
        local_loss, gather_with_grad: accepted for compatibility; for several processes.
        cache_labels: accepted for compatibility; there are no labels to cache.
        rank, world_size: this process and how many there are. More than one is not supported yet.
        use_horovod: not supported.

    Raises:
        NotImplementedError: `world_size` > 1 (the message says what to do) or `use_horovod`.
        ValueError: in a call, another number of texts than of images.

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
    ):
        super().__init__()
        if use_horovod:
            raise NotImplementedError(
                "tilewise.nn.ClipLoss: use_horovod is not supported, expected False, got True"
            )
        _open_clip.refuse_processes("ClipLoss", "clip_loss", world_size)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

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
        _open_clip.check_pairs(image_features, text_features)
        loss = clip_loss(image_features, text_features, logit_scale)
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
        scale_bias = logit_scale, logit_bias
        return (
            _open_clip.logits(image_features, text_features, *scale_bias),
            _open_clip.logits(text_features, image_features, *scale_bias),
        )

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """The column of each row's match, (num_logits,) int64; for subclasses."""
        return torch.arange(num_logits, device=device)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"
