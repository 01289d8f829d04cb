"""Linear layers between the channels of the input and those of the codes."""

import torch
from torch import Tensor, nn

from tilewise.reference._precision import has_autocast


def projections(outer: int, inner: int) -> tuple[nn.Module, nn.Module]:
    """Linear layers from `outer` channels to `inner` and back, where the numbers differ."""
    if outer == inner:
        return nn.Identity(), nn.Identity()
    return nn.Linear(outer, inner), nn.Linear(inner, outer)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), where x may have another dtype than its weights; autocast casts by itself."""
    device = x.device.type
    cast = has_autocast(device) and torch.is_autocast_enabled(device)
    if cast or not isinstance(layer, nn.Linear):
        return layer(x)
    return layer(x.to(layer.weight.dtype))
