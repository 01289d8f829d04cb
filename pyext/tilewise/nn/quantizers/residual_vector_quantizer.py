"""ResidualVectorQuantizer: each layer quantises what the one before left."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tilewise.nn import _sync
from tilewise.nn.quantizers._base import ANY, Quantizer, code_indices, refuse_options
from tilewise.nn.quantizers._learning import learn
from tilewise.nn.quantizers._projection import project, projections
from tilewise.nn.quantizers.vector_quantizer import Chosen, VectorQuantizer
from tilewise.ops import _arguments

if TYPE_CHECKING:
    from tilewise.nn.quantizers._base import Quantized

# What lucidrains' constructor and call take and ours don't do, with the value that means "off".
OPTIONS = dict(
    beam_score_quantizer_weights=ANY,
    beam_size=None,
    diveq=False,
    eval_beam_size=None,
    heads=1,
    implicit_neural_codebook=False,
    mlp_kwargs=ANY,
    separate_codebook_per_head=False,
)
CALL_OPTIONS = dict(
    beam_size=None,
    indices=None,
    rand_quantize_dropout_fixed_seed=None,
    sample_codebook_temp=ANY,
)


class Found(NamedTuple):
    """What all layers chose for x (B, ..., dim) with mask (B, ...), and the sum (B, ..., D)."""

    x: Tensor
    mask: Tensor | None
    total: Tensor
    choices: list[Chosen]


class ResidualVectorQuantizer(Quantizer):
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
        **settings: the other arguments of `VectorQuantizer`, but for `heads`; and what else
            lucidrains' takes, at the values that switch it off.

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

    Cost: Q times that of `VectorQuantizer`. Processes of a distributed run exchange the statistics
    of all layers at once, and twice more where dead codes are replaced. With quantize_dropout, the
    first call waits for the GPU once, to agree on a seed.

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
        super().__init__(dim, channel_last, accept_image_fmap, accept_3d_fmap)
        refuse_options({name: settings.pop(name) for name in OPTIONS.keys() & settings}, OPTIONS)
        sizes = _layer_sizes(codebook_size, num_quantizers)
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"codebook_size: expected one size to share a codebook, got {sizes}")
        cutoff = _arguments.integer(
            "quantize_dropout_cutoff_index", quantize_dropout_cutoff_index, least=0
        )
        if cutoff >= len(sizes):
            raise ValueError(
                f"quantize_dropout_cutoff_index: expected a layer, 0 to {len(sizes) - 1}, got "
                f"{cutoff}"
            )
        _arguments.check_between("quant_grad_frac", quant_grad_frac, 0, 1)
        codebook_dim = dim if codebook_dim is None else codebook_dim
        self.codebook_dim = _arguments.integer("codebook_dim", codebook_dim, least=1)
        self.num_quantizers, self.codebook_sizes = len(sizes), sizes
        self.shared_codebook = shared_codebook
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = cutoff
        self.quantize_dropout_multiple_of = _arguments.integer(
            "quantize_dropout_multiple_of", quantize_dropout_multiple_of, least=1
        )
        self.quant_grad_frac = quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        self.project_in, self.project_out = projections(dim, codebook_dim)
        layers = [VectorQuantizer(codebook_dim, size, **settings) for size in sizes]
        if shared_codebook:
            for layer in layers[1:]:
                layer._codebook = layers[0]._codebook
        self.layers = nn.ModuleList(layers)
        self._rng: random.Random | None = None  # the same in every process

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codes of all layers, (Q, K, D), or a tuple where layers differ in size.

        Assigning to it puts codes in place, see `VectorQuantizer.codebook`.
        """
        codebooks = tuple(layer.codebook for layer in self._quantizers())
        return torch.stack(codebooks) if len(set(self.codebook_sizes)) == 1 else codebooks

    @codebooks.setter
    def codebooks(self, codebooks: Tensor | Sequence[Tensor]) -> None:
        if len(codebooks) != self.num_quantizers:
            raise ValueError(
                f"codebooks: expected {self.num_quantizers} of them, got {len(codebooks)}"
            )
        for layer, codes in zip(self._quantizers(), codebooks, strict=True):
            layer.codebook = codes

    @property
    def codebook(self) -> Tensor:
        """None: so that assigning to it is an error, as there are several."""
        raise AttributeError("codebook: a residual quantiser has codebooks")

    @property
    def codebook_size(self) -> int:
        """The number of codes of the first layer; `codebook_sizes` has those of all."""
        return self.codebook_sizes[0]

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
        """Quantises x.

        Args:
            x: (B, ..., dim), or (B, dim, ...) as the constructor said; any floating dtype.
            mask, lens, freeze_codebook: as in `VectorQuantizer`.
            return_all_codes: appends the codes, as `get_codes_from_indices` gives them.
            return_usage: appends a tuple with the `CodeUsage` of each layer.
            **options: what else lucidrains' call takes, at the values that switch it off.

        Returns:
            quantized like x; indices (B, ..., Q) int64, -1 where masked or left out; losses (Q)
            float32, 0 where left out; what else was asked for.

        Raises:
            ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
        """
        refuse_options(options, CALL_OPTIONS)
        last = self.draw_last(x.device, freeze_codebook)
        found = self.choose(x, last, mask, lens, freeze_codebook)
        self.learn_together([self], [found])
        return self.give(found, return_all_codes, return_usage)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The code of each layer, zeros for -1 and for layers that indices lack.

        Args:
            indices: (B, ..., Q) int64, or fewer than Q in the last dimension.

        Returns:
            (Q, B, ..., D): channels are last, whatever the layout of the input.
        """
        return torch.stack(self._codes_at(indices)).to(self._quantizers()[0]._codebook.dtype)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What the call returned as quantized together with these indices."""
        total: Tensor = sum(self._codes_at(indices))  # type: ignore[assignment]
        codes = total.to(self._quantizers()[0]._codebook.dtype)
        return self._layout.restore(project(self.project_out, codes))

    def choose(
        self,
        x: Tensor,
        last: int | Tensor | None,
        mask: Tensor | None,
        lens: Tensor | None,
        freeze_codebook: bool | None,
    ) -> Found:
        """The first part of `forward`: the codes, with the last layer that `draw_last` keeps."""
        x, mask = self._take(x, mask, lens)  # (B, ..., dim)
        keep = None if mask is None else mask.reshape(-1)
        inner = project(self.project_in, x)  # (B, ..., D)
        # Small differences of larger numbers: half precision would quantise its own rounding.
        rows = inner.reshape(-1, self.codebook_dim)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total, choices = self._run(rows, keep, last, freeze_codebook)
        return Found(x, mask, total.view(inner.shape).to(inner.dtype), choices)

    @staticmethod
    def learn_together(
        quantizers: "Sequence[ResidualVectorQuantizer]", found: Sequence[Found]
    ) -> None:
        """The step of learning of quantisers with equal settings: processes exchange once for all.

        Codes that are shared by layers follow their averages at the end.
        """
        shared = quantizers[0].shared_codebook
        lessons = [[chosen.lesson for chosen in one.choices] for one in found]
        learn([lesson for layers in lessons for lesson in layers], refresh=not shared)
        for quantizer, layers in zip(quantizers, lessons, strict=True):
            book = quantizer._quantizers()[0]._codebook
            if shared and book.ema_update and any(lesson is not None for lesson in layers):
                book.refresh()

    def give(self, found: Found, return_all_codes: bool, return_usage: bool) -> "Quantized":
        """The last part of `forward`: what it returns."""
        x, mask, total, choices = found
        quantized = project(self.project_out, total)
        quantized = self._give(quantized, x, mask, not self.return_zeros_for_masked_padding)
        indices = torch.stack([chosen.flat_index for chosen in choices], -1)
        indices = indices.view(*x.shape[:-1], self.num_quantizers)  # (B, ..., Q)
        losses = torch.stack([chosen.loss for chosen in choices])
        more: list[Any] = [self.get_codes_from_indices(indices)] if return_all_codes else []
        if return_usage:
            layers = zip(self._quantizers(), choices, strict=True)
            more.append(tuple(layer.usage(chosen) for layer, chosen in layers))
        return quantized, indices, losses, *more

    def draw_last(self, device: torch.device, freeze_codebook: bool | None) -> int | Tensor | None:
        """The last layer that a call keeps, None for all: a tensor while a graph is traced."""
        layers = self._quantizers()
        learn = self.training and not layers[0].freezes(freeze_codebook)
        starting = learn and any(layer._codebook.needs_init for layer in layers)
        if not (self.training and self.quantize_dropout) or starting:
            return None
        low, high = self.quantize_dropout_cutoff_index, self.num_quantizers
        sync = layers[0]._codebook.sync
        draw: int | Tensor
        if torch.compiler.is_compiling():
            draw = _sync.from_first_process(torch.randint(low, high, (), device=device), sync)
        elif _sync.world_size(sync) > 1:
            if self._rng is None:
                self._rng = random.Random(_sync.shared_seed(device, sync))
            draw = self._rng.randrange(low, high)
        else:
            draw = int(torch.randint(low, high, (), device="cpu"))
        multiple = self.quantize_dropout_multiple_of
        return (draw // multiple + 1) * multiple - 1

    def _run(
        self, rows: Tensor, keep: Tensor | None, last: int | Tensor | None, freeze: bool | None
    ) -> tuple[Tensor, list[Chosen]]:
        """All layers on rows (M, D): the sum of their codes, and what each chose."""
        layers = self._quantizers()
        freeze = layers[0].freezes(freeze)
        total = torch.zeros_like(rows)
        choices = []
        for number, layer in enumerate(layers):
            if isinstance(last, int) and number > last:
                choices.append(_nothing(rows))
                continue
            enabled = number <= last if isinstance(last, Tensor) else None
            chosen = layer.choose(rows, keep, freeze, enabled)
            if enabled is not None:
                chosen = _only_if(enabled, chosen)
            total = total + chosen.quantized
            rows = rows - self._passed_on(chosen.quantized)
            choices.append(chosen)
        return total, choices

    def _passed_on(self, quantized: Tensor) -> Tensor:
        """quantized, with the part of its gradient that the next layers get."""
        part = self.quant_grad_frac
        if part in (0, 1):
            return quantized if part else quantized.detach()
        return part * quantized + (1 - part) * quantized.detach()

    def _codes_at(self, indices: Tensor) -> list[Tensor]:
        """The codes of each layer, (B, ..., D), in the codebooks' precision."""
        indices = code_indices(indices, max(self.codebook_sizes))
        given = indices.shape[-1]
        if given > self.num_quantizers:
            raise ValueError(
                f"indices: expected at most {self.num_quantizers} last, got {tuple(indices.shape)}"
            )
        indices = nn.functional.pad(indices, (0, self.num_quantizers - given), value=-1)
        layers = zip(self._quantizers(), indices.unbind(-1), strict=True)
        return [layer.codes_at(index) for layer, index in layers]

    def _quantizers(self) -> list[VectorQuantizer]:
        return list(self.layers)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        inner = "" if self.codebook_dim == self.dim else f", codebook_dim={self.codebook_dim}"
        return f"dim={self.dim}, codebook_size={self.codebook_sizes}{inner}"


def _layer_sizes(codebook_size: int | tuple[int, ...], layers: int | None) -> tuple[int, ...]:
    """The number of codes of each layer."""
    if layers is not None:
        layers = _arguments.integer("num_quantizers", layers, least=1)
    if not isinstance(codebook_size, (tuple, list)):
        if layers is None:
            raise ValueError("num_quantizers: expected at least 1, got None")
        return (_arguments.integer("codebook_size", codebook_size, least=1),) * layers
    sizes = tuple(_arguments.integer("codebook_size", size, least=1) for size in codebook_size)
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
    lesson = chosen.lesson
    return Chosen(
        torch.where(enabled, chosen.quantized, 0.0),
        torch.where(enabled, chosen.flat_index, -1),
        torch.where(enabled, chosen.loss, 0.0),
        None if lesson is None else lesson._replace(counts=lesson.counts * enabled),
    )
