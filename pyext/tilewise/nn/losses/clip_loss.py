"""ClipLoss: open_clip's module, on tilewise's CLIP loss."""

from torch import Tensor, nn

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
        NotImplementedError: `world_size` > 1 or `use_horovod`.
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
        if world_size > 1 or use_horovod:
            raise NotImplementedError(
                f"tilewise.nn.ClipLoss: world_size={world_size}, use_horovod={use_horovod}, but "
                "training over several processes is not supported yet; expected 1 and False"
            )
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

        `logit_bias` is accepted for compatibility: a softmax does not change with it.
        """
        loss = clip_loss(image_features, text_features, logit_scale)
        return {"contrastive_loss": loss} if output_dict else loss
