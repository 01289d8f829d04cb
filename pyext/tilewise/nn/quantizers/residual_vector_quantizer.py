"""ResidualVectorQuantizer and its grouped form: each layer quantises what the one before left."""

import random

import torch
from torch import Tensor, nn

from tilewise.nn.quantizers import _sync
from tilewise.nn.quantizers._layout import Layout, projections, row_mask
from tilewise.nn.quantizers.vector_quantizer import Chosen, VectorQuantizer


class ResidualVectorQuantizer(nn.Module):
    r"""Quantises a vector by a sum of codes, one from each of Q codebooks.

        r_1 = x        q_l = nearest code of r_l in codebook l        r_{l+1} = r_l - sg(q_l)
        quantized = sum_l q_l

    Takes the place of lucidrains' `ResidualVQ`: constructor, results and state dict agree.

    Args:
        dim: channels of the input.
        num_quantizers: Q. None: as many as `codebook_size` has entries.
        codebook_size: codes of each layer, or a tuple with one number for each.
        codebook_dim: channels D of a code; linear layers lead there and back. None: dim.
        shared_codebook: one codebook for all layers. Its codes follow their averages once in a
            step, after the last layer.
        quantize_dropout: in training, each call keeps a random number of layers and leaves out the
            rest: the first are then good codes by themselves.
        quantize_dropout_cutoff_index: the last layer kept is at least this one, counted from 0.
        quantize_dropout_multiple_of: the number of layers kept is a multiple of this.
        channel_last, accept_image_fmap, accept_3d_fmap: as in `VectorQuantizer`.
        quant_grad_frac: the part of q_l's gradient that reaches x through r_{l+1}: 0 gives x the
            gradient of `quantized` Q times, 1 gives it once.
        return_zeros_for_masked_padding: as in `VectorQuantizer`.
        **settings: the other arguments of `VectorQuantizer`, but for `heads`.

    Raises:
        ValueError, TypeError: arguments that do not go together, named in the text.

    State dict: `layers.{l}._codebook.*` as in `VectorQuantizer`, the same tensors in every layer
    with `shared_codebook`; `project_in.*` and `project_out.*` with codebook_dim. These are
    lucidrains' names and shapes.

    Differences to lucidrains, besides those of `VectorQuantizer`: there is no beam search, DiVeQ or
    implicit codebook; residuals of half-precision inputs are float32; the batch that k-means starts
    from is quantised by all layers; inside torch.compile, and there alone, layers that are left out
    are computed and thrown away, because a graph has a fixed number of layers; dead codes of a
    shared codebook are replaced by rows of each layer in turn.

    Cost: Q times that of `VectorQuantizer`. In a distributed run with quantize_dropout, the first
    call waits for the GPU once, to agree on a seed.

    Paper: Zeghidour et al., SoundStream: An End-to-End Neural Audio Codec, 2021.
    """

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int | tuple[int, ...],
        num_quantizers: int | None = None,
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **settings,
    ):
        super().__init__()
        for name in {"heads", "separate_codebook_per_head"} & settings.keys():
            raise TypeError(
                f"{name}: a residual quantiser has none; GroupedResidualVectorQuantizer has groups"
            )
        sizes = _layer_sizes(codebook_size, num_quantizers)
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"codebook_size: expected one size to share a codebook, got {sizes}")
        if not 0 <= quantize_dropout_cutoff_index < len(sizes):
            raise ValueError(
                f"quantize_dropout_cutoff_index: expected a layer, 0 to {len(sizes) - 1}, got "
                f"{quantize_dropout_cutoff_index}"
            )
        if quantize_dropout_multiple_of < 1:
            raise ValueError(
                "quantize_dropout_multiple_of: expected at least 1, got "
                f"{quantize_dropout_multiple_of}"
            )
        codebook_dim = dim if codebook_dim is None else codebook_dim
        self.dim, self.codebook_dim = dim, codebook_dim
        self.num_quantizers, self.codebook_sizes = len(sizes), sizes
        self.shared_codebook = shared_codebook
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quant_grad_frac = quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        self.project_in, self.project_out = projections(dim, codebook_dim)
        self._layout = Layout(channel_last, accept_image_fmap, accept_3d_fmap)
        layers = [VectorQuantizer(codebook_dim, size, **settings) for size in sizes]
        if shared_codebook:
            for layer in layers[1:]:
                layer._codebook = layers[0]._codebook
        self.layers = nn.ModuleList(layers)
        self._dice: random.Random | None = None  # the same in every process

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codes of all layers, (Q, K, D), or a tuple where layers differ in size."""
        codebooks = tuple(layer.codebook for layer in self._quantizers())
        return torch.stack(codebooks) if len(set(self.codebook_sizes)) == 1 else codebooks

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        freeze_codebook: bool | None = None,
        return_all_codes: bool = False,
        return_usage: bool = False,
    ) -> tuple:
        """Quantises x.

        Args:
            x: (B, ..., dim), or (B, dim, ...) as the constructor said; any floating dtype.
            mask, lens, freeze_codebook: as in `VectorQuantizer`.
            return_all_codes: appends the codes, as `get_codes_from_indices` gives them.
            return_usage: appends a tuple with the `CodeUsage` of each layer.

        Returns:
            quantized like x; indices (B, ..., Q) int64, -1 where masked or left out; losses (Q)
            float32, 0 where left out; what else was asked for.

        Raises:
            ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
        """
        last = self._draw_last(x.device, self.training and freeze_codebook is not True)
        return self._quantize(
            x, last, mask, lens, freeze_codebook, return_all_codes, return_usage
        )

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The code of each layer, zeros for -1 and for layers that indices lack.

        Args:
            indices: (B, ..., Q) int64, or fewer than Q in the last dimension.

        Returns:
            (Q, B, ..., D): channels are last, whatever the layout of the input.
        """
        given = indices.shape[-1]
        if given > self.num_quantizers:
            raise ValueError(
                f"indices: expected at most {self.num_quantizers} last, got {tuple(indices.shape)}"
            )
        indices = nn.functional.pad(indices, (0, self.num_quantizers - given), value=-1)
        layers = zip(self._quantizers(), indices.unbind(-1), strict=True)
        return torch.stack([layer.get_codes_from_indices(index) for layer, index in layers])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What the call returned as quantized together with these indices."""
        codes = self.get_codes_from_indices(indices).sum(0)
        return self._layout.restore(self.project_out(codes))

    def _quantize(
        self,
        x: Tensor,
        last: int | Tensor | None,
        mask: Tensor | None,
        lens: Tensor | None,
        freeze_codebook: bool | None,
        return_all_codes: bool,
        return_usage: bool,
    ) -> tuple:
        """`forward`, with the last layer that is kept, None for all."""
        x = self._layout.to_last(x, self.dim)  # (B, ..., dim)
        mask = row_mask(x, mask, lens)
        keep = None if mask is None else mask.reshape(-1)
        inner = self.project_in(x)  # (B, ..., D)
        # Small differences of larger numbers: half precision would quantise its own rounding.
        rows = inner.reshape(-1, self.codebook_dim)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total, choices = self._run(rows, keep, last, freeze_codebook)

        quantized = self.project_out(total.view(inner.shape).to(inner.dtype)).to(x.dtype)
        if mask is not None:
            zero = torch.zeros((), dtype=x.dtype, device=x.device)
            other = zero if self.return_zeros_for_masked_padding else x
            quantized = torch.where(mask.unsqueeze(-1), quantized, other)
        indices = torch.stack([chosen.code for chosen in choices], -1)
        indices = indices.view(*x.shape[:-1], self.num_quantizers)  # (B, ..., Q)
        losses = torch.stack([chosen.loss for chosen in choices])
        result = [self._layout.restore(quantized), indices, losses]
        if return_all_codes:
            result.append(self.get_codes_from_indices(indices))
        if not return_usage:
            return tuple(result)
        layers = zip(self._quantizers(), choices, strict=True)
        return *result, tuple(layer._usage(chosen) for layer, chosen in layers)

    def _run(
        self, rows: Tensor, keep: Tensor | None, last: int | Tensor | None, freeze: bool | None
    ) -> tuple[Tensor, list[Chosen]]:
        """All layers on rows (M, D): the sum of their codes, and what each chose."""
        layers = self._quantizers()
        freeze = layers[0].freeze_codebook if freeze is None else freeze
        learn = self.training and not freeze
        total = torch.zeros_like(rows)
        choices = []
        for number, layer in enumerate(layers):
            if isinstance(last, int) and number > last:
                choices.append(_nothing(rows))
                continue
            enabled = number <= last if isinstance(last, Tensor) else None
            chosen = layer._choose(rows, keep, learn, not self.shared_codebook, enabled)
            if enabled is not None:
                chosen = _only_if(enabled, chosen)
            total = total + chosen.quantized
            rows = rows - self._passed_on(chosen.quantized)
            choices.append(chosen)
        if self.shared_codebook and learn and layers[0]._codebook.ema_update:
            layers[0]._codebook.refresh()
        return total, choices

    def _passed_on(self, quantized: Tensor) -> Tensor:
        """quantized, with the part of its gradient that the next layers get."""
        part = self.quant_grad_frac
        if part in (0, 1):
            return quantized if part else quantized.detach()
        return part * quantized + (1 - part) * quantized.detach()

    def _draw_last(self, device: torch.device, learn: bool) -> int | Tensor | None:
        """The last layer that this call keeps, None for all: a tensor while a graph is traced."""
        layers = self._quantizers()
        starting = learn and any(layer._codebook.needs_init for layer in layers)
        if not (self.training and self.quantize_dropout) or starting:
            return None
        low, high = self.quantize_dropout_cutoff_index, self.num_quantizers
        sync = layers[0]._codebook.sync
        draw: int | Tensor
        if torch.compiler.is_compiling():
            draw = _sync.first_process(torch.randint(low, high, (), device=device), sync)
        elif _sync.world_size(sync) > 1:
            if self._dice is None:
                self._dice = random.Random(_sync.shared_seed(device, sync))
            draw = self._dice.randrange(low, high)
        else:
            draw = int(torch.randint(low, high, (), device="cpu"))
        multiple = self.quantize_dropout_multiple_of
        return (draw // multiple + 1) * multiple - 1

    def _quantizers(self) -> list[VectorQuantizer]:
        return list(self.layers)  # type: ignore[arg-type]


class GroupedResidualVectorQuantizer(nn.Module):
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
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups: expected a divisor of dim={dim}, got {groups}")
        self.dim, self.groups = dim, groups
        layout = dict(
            channel_last=channel_last,
            accept_image_fmap=accept_image_fmap,
            accept_3d_fmap=accept_3d_fmap,
        )
        self._layout = Layout(**layout)
        self.rvqs = nn.ModuleList(
            ResidualVectorQuantizer(dim=dim // groups, **layout, **settings) for _ in range(groups)
        )

    @property
    def codebooks(self) -> Tensor | tuple:
        """The codes, (G, Q, K, D), or tuples where layers differ in size."""
        codebooks = tuple(rvq.codebooks for rvq in self._groups())
        stacked = tuple(x for x in codebooks if isinstance(x, Tensor))
        return torch.stack(stacked) if stacked else codebooks

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        freeze_codebook: bool | None = None,
        return_all_codes: bool = False,
        return_usage: bool = False,
    ) -> tuple:
        """As `ResidualVectorQuantizer`, with a dimension G in front of everything but quantized.

        Returns:
            quantized like x; indices (G, B, ..., Q); losses (G, Q); if asked for, codes
            (G, Q, B, ..., D) and a tuple of G tuples with the `CodeUsage` of each layer.
        """
        self._layout.to_last(x, self.dim)  # checks the shape
        groups = self._groups()
        last = groups[0]._draw_last(x.device, self.training and freeze_codebook is not True)
        parts = x.chunk(self.groups, dim=self._channels)
        options = (last, mask, lens, freeze_codebook, return_all_codes, return_usage)
        results = [rvq._quantize(part, *options) for rvq, part in zip(groups, parts, strict=True)]
        quantized, *others = zip(*results, strict=True)
        stacked = [torch.stack(x) if isinstance(x[0], Tensor) else x for x in others]
        return torch.cat(quantized, dim=self._channels), *stacked

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Indices (G, B, ..., Q) -> codes (G, Q, B, ..., D), channels last."""
        groups = zip(self._groups(), indices, strict=True)
        return torch.stack([rvq.get_codes_from_indices(index) for rvq, index in groups])

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What the call returned as quantized together with these indices."""
        groups = zip(self._groups(), indices, strict=True)
        parts = [rvq.get_output_from_indices(index) for rvq, index in groups]
        return torch.cat(parts, dim=self._channels)

    @property
    def _channels(self) -> int:
        return -1 if self._layout.channel_last else 1

    def _groups(self) -> list[ResidualVectorQuantizer]:
        return list(self.rvqs)  # type: ignore[arg-type]


def _layer_sizes(codebook_size: int | tuple[int, ...], layers: int | None) -> tuple[int, ...]:
    """The number of codes of each layer."""
    if isinstance(codebook_size, int):
        if layers is None or layers < 1:
            raise ValueError(f"num_quantizers: expected at least 1, got {layers}")
        return (codebook_size,) * layers
    sizes = tuple(codebook_size)
    if not sizes or layers not in (None, len(sizes)):
        raise ValueError(
            f"codebook_size: expected one for each of num_quantizers={layers} layers, got {sizes}"
        )
    return sizes


def _nothing(rows: Tensor) -> Chosen:
    """What a layer gives that is left out."""
    index = torch.full(rows.shape[:1], -1, device=rows.device)
    return Chosen(rows, index, rows.new_zeros((), dtype=torch.float32), None)


def _only_if(enabled: Tensor, chosen: Chosen) -> Chosen:
    """The choice of a layer, or nothing, by a () bool."""
    return Chosen(
        torch.where(enabled, chosen.quantized, 0.0),
        torch.where(enabled, chosen.code, -1),
        torch.where(enabled, chosen.loss, 0.0),
        None if chosen.counts is None else chosen.counts * enabled,
    )
