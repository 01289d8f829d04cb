"""InfoNCELoss: queries and keys of any length, hard negatives, a temperature that may be learnt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tilewise.distributed import Peers
from tilewise.nn._precision import without_halving
from tilewise.nn.losses import _ring, _ring_info_nce
from tilewise.ops import _arguments
from tilewise.ops.info_nce import info_nce

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


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
        group: processes whose keys and negatives are candidates of every query,
            `torch.distributed.group.WORLD` for all (which is None before `init_process_group`).
            None: this process's alone.

    Raises:
        ValueError, TypeError: an argument out of its range; with a group all processes raise it,
            also where they differ in D, dtype, options, or in which gradients they need.
        RuntimeError: a process of the group that was lost, by name.

    With a group, each process calls it with its own rows, whose numbers may differ and be 0. An
    offset in `positives` counts among the process's own keys; ids match in all. The loss is the sum
    over one's own queries, over the mean number of queries that have a match: the mean of all
    processes' losses is the loss of one with all rows, and so is, under DistributedDataParallel,
    training. Every exchange is in the forward pass; all processes must then multiply the loss by
    the same number.

    State dict: `logit_scale` () float32 if it learns, else nothing; `.half()` leaves it in float32.

    Cost: that of `tilewise.info_nce`, and a copy of the features where they are normalised or
    joined. In W processes of b queries and n keys, 4 products of b * W*n * D, memory O((b + n) * D)
    whatever W; a process sends its keys 2 (W - 1) times and their float32 gradients W - 1 times,
    both ways round the ring, while the products are computed.

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
        *,
        group: ProcessGroup | None = None,
    ):
        super().__init__()
        self.group = group
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
        if self.group is not None and dist.get_world_size(self.group) != 1:
            return self._over_processes(query, keys, scale, positives)
        return info_nce(
            query, keys, scale, positives=positives, label_smoothing=self.label_smoothing
        )

    @torch._disable_dynamo  # the exchanges are not traced; the public name imports dynamo at once
    def _over_processes(
        self, query: Tensor, keys: Tensor, scale: Tensor | float,
        positives: int | tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """The sum of one's own queries, over the mean number of queries in a process."""
        peers = Peers(self.group, "tilewise.nn.InfoNCELoss")

        def check():
            features = _arguments.features(query=query, keys=keys)
            inputs = [*features, _arguments.scalar("logit_scale", scale, features[0])]
            sizes = (len(x) for x in features)
            matches = _arguments.matches("positives", positives, *sizes, query.device)
            needs = _arguments.needs(*inputs)
            facts = {
                "loss": "InfoNCELoss",
                "D": query.shape[1],
                "dtype": features[0].dtype,
                "label_smoothing": self.label_smoothing,
                "normalize": self.normalize,
                "temperature": "learnt" if self.logit_scale is not None else self.temperature,
                "positives": "an offset" if matches[1] is None else "ids",
                "gradients": _ring.named(needs, "query", "keys", "logit_scale"),
            }
            return (inputs, needs, matches), len(keys), facts

        device = _ring.device_of(query, keys)
        (inputs, needs, matches), rows = _ring.agreed(peers, check, device)
        return _ring.finished(
            lambda needs: _ring_info_nce.info_nce(
                peers, rows, inputs, needs, matches, self.label_smoothing
            ),
            needs, *inputs,
        )  # fmt: skip

    def _apply(self, fn, recurse=True):
        return super()._apply(without_halving(fn), recurse)

    def extra_repr(self) -> str:
        learnable = self.logit_scale is not None
        return f"temperature={self.temperature}, {learnable=}, normalize={self.normalize}"
