"""The quantiser of diffusers as ours, and our state dict as theirs."""

from typing import Any

from torch import Tensor, nn

from tilewise.nn.convert._embedding import vector_quantizer
from tilewise.nn.convert._state import StateDict, state_of
from tilewise.nn.convert.taming import to_taming
from tilewise.nn.quantizers.vector_quantizer import VectorQuantizer


def from_diffusers(
    source: nn.Module | StateDict,
    *,
    prefix: str = "",
    beta: float | None = None,
    legacy: bool | None = None,
    **settings: Any,
) -> VectorQuantizer:
    """The `VectorQuantizer` of diffusers' `VQModel` as ours: that of taming-transformers again.

    Arguments, result and errors are those of `from_taming`.
    """
    return vector_quantizer(source, state_of(source, prefix), beta, legacy, settings)


def to_diffusers(module: VectorQuantizer) -> dict[str, Tensor]:
    """A state dict that diffusers' `VectorQuantizer` loads; see `to_taming`."""
    return to_taming(module)
