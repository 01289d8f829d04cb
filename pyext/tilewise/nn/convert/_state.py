"""State dicts of other packages, and modules of ours made from them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

StateDict = Mapping[str, Tensor]


def state_of(source: nn.Module | StateDict, prefix: str) -> dict[str, Tensor]:
    """The state dict of a module, or that part of one whose keys begin with prefix."""
    state = source.state_dict() if isinstance(source, nn.Module) else source
    if not isinstance(state, Mapping):
        raise TypeError(f"source: expected a module or a state dict, got {type(source).__name__}")
    found = {key[len(prefix) :]: x for key, x in state.items() if key.startswith(prefix)}
    if not found:
        raise ValueError(f"prefix: expected that of some keys, got {prefix!r} for "
                         f"{some(state) or 'an empty one'}")
    return found


def build(kind: type, arguments: Mapping[str, Any], state: StateDict, source: object) -> Any:
    """A module of ours with this state, on its device (meta too), in the mode of the source."""
    with next(iter(state.values())).device:
        module = kind(**arguments)
    module.load_state_dict(state)
    return module.train(source.training) if isinstance(source, nn.Module) else module


def some(state: StateDict) -> str:
    """A few of its keys, for messages."""
    keys = sorted(state)
    return ", ".join(keys[:6]) + (f" and {len(keys) - 6} more" if len(keys) > 6 else "")
