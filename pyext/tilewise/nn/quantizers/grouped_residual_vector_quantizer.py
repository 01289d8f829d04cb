"""GroupedResidualVectorQuantizer: a residual quantiser for each group of channels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tilewise.nn.quantizers._base import Quantizer, code_indices, refuse_options
from tilewise.nn.quantizers.residual_vector_quantizer import CALL_OPTIONS, ResidualVectorQuantizer
from tilewise.ops import _arguments

if TYPE_CHECKING:
    from tilewise.nn.quantizers._base import Quantized


class GroupedResidualVectorQuantizer(Quantizer):
    """Cuts the channels into groups, each quantised by a `ResidualVectorQuantizer` of its own.

    Takes the place of lucidrains' `GroupedResidualVQ`.

    Args:
        dim: channels of the input, a multiple of groups.
        groups: G.
        channel_last, accept_image_fmap, accept_3d_fmap: as in `VectorQuantizer`.
        **settings: the other arguments of `ResidualVectorQuantizer`.

    Raises:
        ValueError, TypeError: arguments that do not go together, named in the text.

    State dict: `rvqs.{g}.*` as in `ResidualVectorQuantizer`.

    With quantize_dropout all groups keep the same number of layers. Cost: that of a
    `ResidualVectorQuantizer` with as many codes, since groups share the channels.

    Paper: Yang et al., HiFi-Codec: Group-residual Vector Quantization for High Fidelity Audio
    Codec, 2023.
    """

    def __init__(
        self,
        *,
        dim: int,
        groups: int = 1,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        **settings,
    ):
        layout = dict(
            channel_last=channel_last,
            accept_image_fmap=accept_image_fmap,
            accept_3d_fmap=accept_3d_fmap,
        )
        super().__init__(dim, **layout)
        self.groups = _arguments.integer("groups", groups, least=1)
        if dim % groups:
            raise ValueError(f"groups: expected a divisor of dim={dim}, got {groups}")
        self.rvqs = nn.ModuleList(
            ResidualVectorQuantizer(dim=dim // groups, **layout, **settings) for _ in range(groups)
        )

    @property
    def codebooks(self) -> Tensor | tuple:
        """The codes, (G, Q, K, D), or tuples where layers differ in size. Can be assigned to."""
        codebooks = tuple(rvq.codebooks for rvq in self._groups())
        stacked = tuple(x for x in codebooks if isinstance(x, Tensor))
        return torch.stack(stacked) if stacked else codebooks

    @codebooks.setter
    def codebooks(self, codebooks: Tensor | Sequence) -> None:
        if len(codebooks) != self.groups:
            raise ValueError(f"codebooks: expected {self.groups} groups, got {len(codebooks)}")
        for rvq, codes in zip(self._groups(), codebooks, strict=True):
            rvq.codebooks = codes

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        freeze_codebook: bool | None = None,
        return_all_codes: bool = False,
        return_usage: bool = False,
        **options: Any,
    ) -> "Quantized":
        """As `ResidualVectorQuantizer`, with a dimension G in front of everything but quantized.

        Returns:
            quantized like x; indices (G, B, ..., Q); losses (G, Q); if asked for, codes
            (G, Q, B, ..., D) and a tuple of G tuples with the `CodeUsage` of each layer.
        """
        refuse_options(options, CALL_OPTIONS)
        self._layout.to_last(x, self.dim)  # checks the shape
        groups, channels = self._groups(), self._layout.channels
        last = groups[0].draw_last(x.device, freeze_codebook)
        parts = zip(groups, x.chunk(self.groups, dim=channels), strict=True)
        found = [rvq.choose(part, last, mask, lens, freeze_codebook) for rvq, part in parts]
        ResidualVectorQuantizer.learn_together(groups, found)
        results = [
            rvq.give(one, return_all_codes, return_usage)
            for rvq, one in zip(groups, found, strict=True)
        ]
        quantized, indices, losses, *more = zip(*results, strict=True)
        extra = [torch.stack(x) if isinstance(x[0], Tensor) else x for x in more]
        return torch.cat(quantized, dim=channels), torch.stack(indices), torch.stack(losses), *extra

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices (G, B, ..., Q) -> codes (G, Q, B, ..., D), channels last."""
        groups = zip(self._groups(), self._by_group(indices), strict=True)
        return torch.stack([rvq.get_codes_from_indices(index) for rvq, index in groups])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What the call returned as quantized together with these indices."""
        groups = zip(self._groups(), self._by_group(indices), strict=True)
        parts = [rvq.get_output_from_indices(index) for rvq, index in groups]
        return torch.cat(parts, dim=self._layout.channels)

    def _groups(self) -> list[ResidualVectorQuantizer]:
        return list(self.rvqs)  # type: ignore[arg-type]

    def _by_group(self, indices: Tensor) -> Tensor:
        indices = code_indices(indices, max(self._groups()[0].codebook_sizes))
        if len(indices) != self.groups:
            raise ValueError(
                f"indices: expected {self.groups} groups first, got {tuple(indices.shape)}"
            )
        return indices

    def extra_repr(self) -> str:
        return f"dim={self.dim}, groups={self.groups}"
