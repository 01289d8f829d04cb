"""SigLipLoss: open_clip's module, on tilewise's sigmoid loss."""

from torch import Tensor, nn

from tilewise.nn.losses._call import OpenClipCall
from tilewise.ops.sigmoid_loss import sigmoid_loss


class SigLipLoss(nn.Module):
    """Sigmoid loss of all pairs in the batch; takes open_clip's place without other changes.

    `loss(image_features, text_features, logit_scale, logit_bias)` is
    `tilewise.sigmoid_loss` of the same arguments, with text i matching image i.

    Args:
        cache_labels: accepted for compatibility; there are no labels to cache.
        rank, world_size: this process and how many there are. More than one is not supported yet.
        dist_impl: accepted for compatibility; how processes would exchange features.
        chunk_size: accepted for compatibility; tiles always have a fixed size.

    Raises:
        NotImplementedError: `world_size` > 1.
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
        if world_size > 1:
            raise NotImplementedError(
                f"tilewise.nn.SigLipLoss: world_size={world_size}, but training over several "
                "processes is not supported yet; expected 1"
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
        loss = sigmoid_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
