"""What ClipLoss and SigLipLoss share with open_clip's beside their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from tilewise.distributed import Peers
from tilewise.nn.losses import _ring
from tilewise.ops import _arguments

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


def check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    """Text i belongs to image i."""
    if len(image_features) != len(text_features):
        raise ValueError(
            f"text_features: expected {len(image_features)} rows, one for each image, "
            f"got {len(text_features)}"
        )


def logits(
    features: Tensor, others: Tensor, scale: Tensor | float, bias: Tensor | float | None
) -> Tensor:
    """All of them, which open_clip's subclasses ask for: (B, N)."""
    product = scale * features @ others.T
    return product if bias is None else product + bias


def with_gradient_of_zero(loss: Tensor, x: Tensor | float | None) -> Tensor:
    """The same loss, whose gradient by x is zero, not None, which stops DistributedDataParallel."""
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        loss = loss + x.reshape(-1)[:0].sum().to(loss.dtype)  # of nothing: 0, whatever x is
    return loss


def over_processes(module: Any) -> bool:
    """Whether a loss has pairs of several processes."""
    return module.world_size > 1


def place(rank: int, world_size: int, group: ProcessGroup | None) -> tuple[int, int]:
    """Rank and world size, of a group that came without them too."""
    if group is None or world_size > 1:
        return rank, world_size
    return dist.get_rank(group), dist.get_world_size(group)


def check_place(peers: Peers, rank: int, world_size: int) -> None:
    """What the module was told agrees with its group."""
    if (rank, world_size) != (peers.rank, peers.size):
        raise ValueError(
            f"rank, world_size: expected {peers.rank}, {peers.size} as in the process group, got "
            f"{rank}, {world_size}"
        )


@torch._disable_dynamo  # the exchanges are not traced; the public name imports dynamo at once
def loss_over_processes(
    module: Any,
    run: Callable[..., tuple[Tensor, _ring.Gradients]],
    options: dict[str, Any],
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *logit_bias: Tensor | float | None,
) -> Tensor:
    """The loss that `run` of `_ring` computes; what is wrong in one process is an error in all.

    Args:
        options: of the module, which must be the same in every process; those of `run`.
    """
    name = type(module).__name__
    peers = Peers(module.group, f"tilewise.nn.{name}")

    def check() -> tuple[tuple[list, list], int, dict]:
        check_place(peers, module.rank, module.world_size)
        features = _arguments.features(image_features=image_features, text_features=text_features)
        check_pairs(*features)
        inputs: list[Tensor | None] = [*features]
        inputs.append(_arguments.scalar("logit_scale", logit_scale, features[0]))
        for value in logit_bias:
            bias = None if value is None else _arguments.scalar("logit_bias", value, features[0])
            inputs.append(bias)
        needs = _arguments.needs(*inputs)
        facts = {
            "loss": name,
            **options,
            "D": features[0].shape[1],
            "dtype": features[0].dtype,
            "logit_bias": "given" if inputs[-1] is not None else "None",
            "gradients": _ring.named(
                needs, "image_features", "text_features", "logit_scale", "logit_bias"
            ),
        }
        return (inputs, needs), len(image_features), facts

    device = _ring.device_of(image_features, text_features)
    (inputs, needs), rows = _ring.agreed(peers, check, device)
    return _ring.finished(lambda needs: run(peers, rows, *inputs, needs, **options), needs, *inputs)
