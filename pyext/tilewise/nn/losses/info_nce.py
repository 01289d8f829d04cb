"""InfoNCELoss: queries and keys of any length, hard negatives, a temperature that may be learnt."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewise.nn._precision import without_halving
from tilewise.ops import _arguments
from tilewise.ops.info_nce import info_nce


class InfoNCELoss(nn.Module):
    """Each query among all keys by the cosine of their angle: one direction.

    `loss(query, keys)` is `tilewise.info_nce` of rows divided by their lengths, with logit_scale
    1 / temperature.

    Args:
        temperature: divides the cosines. sentence-transformers' `scale=20.0` is 0.05, and CLIP
            begins with 0.07.
        learnable: whether the temperature learns, as the parameter `logit_scale`, the logarithm of
            what multiplies the cosines, as in CLIP; CLIP clamps it to log(100) after each step.
        normalize: whether rows are divided by their lengths; False: dot products.
        label_smoothing: from 0 to 1, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError, TypeError: an argument out of its range.

    State dict: `logit_scale` () float32 if it learns, else nothing; `.half()` leaves it in float32.

    Cost: that of `tilewise.info_nce`, and a copy of the features where they are normalised or
    joined.

    Paper: van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018.

    Example:
        >>> loss = tw.nn.InfoNCELoss(temperature=0.05)
        >>> loss(encoder(questions), encoder(answers), encoder(wrong_answers)).backward()
    """

    __call__: Callable[..., Tensor]  # nn.Module's returns Any

    def __init__(
        self,
        temperature: float = 0.05,
        learnable: bool = False,
        normalize: bool = True,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        _arguments.check_between("label_smoothing", label_smoothing, 0, 1)
        if not _arguments.check_between("temperature", temperature, 0, math.inf) > 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        self.temperature = temperature
        self.normalize = normalize
        self.label_smoothing = label_smoothing
        self.logit_scale: nn.Parameter | None = None
        if learnable:
            value = torch.tensor(-math.log(temperature), dtype=torch.float32)
            self.logit_scale = nn.Parameter(value)

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        negatives: Tensor | None = None,
        *,
        positives: int | tuple[Tensor, Tensor] | None = 0,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            query: (B, D), float16, bfloat16, float32 or float64, of any length.
            keys: (N, D), the same dtype: key i belongs to query i.
            negatives: (M, D), further keys for all queries; or (B, K, D), K of each query, which
                are negatives of the others too.
            positives: as in `tilewise.info_nce`, of all keys, N + M or N + B K.

        Returns:
            0-d float32 (float64 for float64 features), differentiable once in everything.
        """
        if negatives is not None:
            keys = torch.cat([keys, negatives.flatten(0, -2)])
        if self.normalize:
            query, keys = F.normalize(query, dim=-1), F.normalize(keys, dim=-1)
        scale = 1 / self.temperature if self.logit_scale is None else self.logit_scale.exp()
        return info_nce(
            query, keys, scale, positives=positives, label_smoothing=self.label_smoothing
        )

    def _apply(self, fn, recurse=True):
        return super()._apply(without_halving(fn), recurse)

    def extra_repr(self) -> str:
        learnable = self.logit_scale is not None
        return f"temperature={self.temperature}, {learnable=}, normalize={self.normalize}"
