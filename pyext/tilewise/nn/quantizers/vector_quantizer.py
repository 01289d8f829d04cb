"""VectorQuantizer: lucidrains' VectorQuantize on the exact search of tilewise."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tilewise.nn.quantizers._base import (
    ANY,
    Quantizer,
    check_codes,
    code_indices,
    refuse_options,
)
from tilewise.nn.quantizers._codebook import Codebook
from tilewise.nn.quantizers._learning import Lesson, learn, lesson
from tilewise.nn.quantizers._projection import project, projections
from tilewise.nn.quantizers._straight_through import Weights, gather, straight_through
from tilewise.nn.quantizers._unit import EPS, unit_rows
from tilewise.nn.quantizers._usage import CodeUsage, count_codes
from tilewise.ops import _arguments

if TYPE_CHECKING:
    from tilewise.nn.quantizers._base import Quantized

# What lucidrains' constructor and call take and ours don't do, with the value that means "off".
OPTIONS = dict(
    affine_param=False,
    affine_param_batch_decay=ANY,
    affine_param_codebook_decay=ANY,
    codebook_diversity_loss_weight=0.0,
    codebook_diversity_temperature=ANY,
    commitment_use_cross_entropy_loss=False,
    directional_reparam=False,
    directional_reparam_variance=ANY,
    in_place_codebook_optimizer=None,
    layernorm_after_project_in=False,
    manual_ema_update=False,
    manual_in_place_optimizer_update=ANY,
    orthogonal_reg_active_codes_only=ANY,
    orthogonal_reg_max_codes=ANY,
    orthogonal_reg_weight=0.0,
    route_gradients_to_input=True,
    sample_codebook_temp=ANY,
    stochastic_sample_codes=False,
    straight_through=False,
    sync_affine_param=ANY,
    sync_kmeans=True,
    sync_update_v=0.0,
    vq_bridge=None,
)
CALL_OPTIONS = dict(
    codebook_transform_fn=None,
    ema_update=None,
    ema_update_weight=None,
    indices=None,
    return_loss_breakdown=False,
    sample_codebook_temp=ANY,
    topk=None,
)


class Chosen(NamedTuple):
    """What one choice of codes gives for rows (M, D).

    quantized: (M, D). flat_index: (M) int64, h * K + k with several codebooks, -1 where masked.
    loss: () float32. lesson: what the codebook has yet to learn, None where that is nothing.
    """

    quantized: Tensor
    flat_index: Tensor
    loss: Tensor
    lesson: Lesson | None


class VectorQuantizer(Quantizer):
    r"""Replaces each vector by the nearest of K codes, and learns the codes.

        index_i = argmin_k ||x_i - c_k||^2          quantized_i = c_index_i

        loss = commitment_weight * mean ||x - sg(quantized)||^2
             + codebook_weight * mean ||sg(x) - quantized||^2     (if learned by gradient)

    and in training, with n_k rows that chose code k and s_k their sum, moving averages

        N_k <- decay N_k + (1 - decay) n_k          m_k <- decay m_k + (1 - decay) s_k
        c_k = m_k / N'_k,                           N' = (N + eps) / (sum N + K eps) * sum N

    Gradients of `quantized` reach x unchanged (straight-through) or turned as x would have to be
    turned to become its code (rotation trick). Takes the place of lucidrains' `VectorQuantize`:
    constructor, results and state dict agree, and the N x K matrix is never stored.

    Args:
        dim: channels of the input.
        codebook_size: K.
        codebook_dim: channels D of a code; linear layers lead there and back. None: dim.
        heads: into how many vectors of codebook_dim channels each input vector is cut.
        separate_codebook_per_head: one codebook for each head, instead of one for all.
        decay, eps: of the moving averages.
        freeze_codebook: keeps the codes as they are, those that learn by gradient too; also an
            argument of the call.
        kmeans_init: starts from k-means over the first batch of training, not at random.
        kmeans_iters: its iterations.
        use_cosine_sim: vectors and codes are normalised: nearest in angle.
        threshold_ema_dead_code: codes whose N_k falls below are replaced by random rows of the
            batch. 0: never.
        channel_last: (B, ..., dim), or (B, dim, ...) if False.
        accept_image_fmap, accept_3d_fmap: input is (B, dim, H, W), or (B, dim, T, H, W).
        commitment_weight, codebook_weight: see above.
        rotation_trick: None means yes, if dim > 1.
        sync_codebook: whether statistics are summed over the processes of a distributed run. None
            means yes, where there are several.
        ema_update: whether codes are moving averages. None: unless `learnable_codebook`.
        learnable_codebook: whether codes are a parameter that learns by gradient.
        return_zeros_for_masked_padding: masked rows come out as zeros, or as they came if False.
        **options: what else lucidrains' takes, at the values that switch it off.

    Raises:
        ValueError, TypeError: an argument out of its range; both ways of learning at once; an
            option that is not here.

    State dict: `_codebook.embed` (H, K, D) the codes, `_codebook.cluster_size` (H, K) is N,
    `_codebook.embed_avg` (H, K, D) is m, `_codebook.initted` () whether k-means is over (H = 1 but
    for separate codebooks); with codebook_dim `project_in.*` and `project_out.*`. These are
    lucidrains' names and shapes, so checkpoints load both ways; its older ones and EnCodec's load
    too. `.half()` leaves codes in float32, and results in half. Buffers alone decide: who copies
    them, by hand or for weight averaging, has copied the quantiser. But who wants k-means again
    loads a state dict: a 0 written over `initted` in place, once it is over, is not seen.

    Differences to lucidrains: the nearest code is exact, ties go to the lowest index; the loss is
    float32 and also computed in evaluation; evaluation lets gradients through and never writes to
    buffers; a gradient codebook has VQ-VAE's loss; rows that are NaN or infinite never reach the
    averages; k-means leaves codes without rows where they began, and waits for a batch that has a
    row; processes agree on every code. Not here: in-place codebook optimisers, orthogonal,
    diversity and cross-entropy losses, affine parameters, DiVeQ, sampled codes, topk, layer norm
    after the projection.

    Cost: the search, and a handful of passes over x: no N x K matrix, no one-hot. Nothing waits for
    a GPU, but for the first two training steps with `kmeans_init`, which look whether it is over.
    Calling forward twice (activation checkpointing) learns twice. There is no second derivative.

    Papers: van den Oord et al., Neural Discrete Representation Learning, NeurIPS 2017; Fifty et
    al., Restructuring Vector Quantization with the Rotation Trick, ICLR 2025; Esser et al., Taming
    Transformers (VQGAN), CVPR 2021.

    Example:
        >>> quantizer = tw.nn.VectorQuantizer(dim=256, codebook_size=1024)
        >>> quantized, indices, loss = quantizer(torch.randn(8, 196, 256))
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        *,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        codebook_weight: float = 1.0,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        learnable_codebook: bool | None = False,
        return_zeros_for_masked_padding: bool = True,
        **options: Any,
    ):
        super().__init__(dim, channel_last, accept_image_fmap, accept_3d_fmap)
        refuse_options(options, OPTIONS)
        learnable_codebook = bool(learnable_codebook)
        ema_update = not learnable_codebook if ema_update is None else ema_update
        if ema_update and learnable_codebook:
            raise ValueError(
                "ema_update: expected False with learnable_codebook=True, got True: codes learn "
                "either as averages or by gradient"
            )
        _arguments.check_between("decay", decay, 0, 1)
        for name, number in dict(
            eps=eps, threshold_ema_dead_code=threshold_ema_dead_code,
            commitment_weight=commitment_weight, codebook_weight=codebook_weight,
        ).items():
            _arguments.check_between(name, number, 0, float("inf"))
        self.codebook_size = _arguments.integer("codebook_size", codebook_size, least=1)
        codebook_dim = self.dim if codebook_dim is None else codebook_dim
        self.codebook_dim = _arguments.integer("codebook_dim", codebook_dim, least=1)
        self.heads = _arguments.integer("heads", heads, least=1)
        self.separate_codebook_per_head = separate_codebook_per_head and heads > 1
        self.freeze_codebook = freeze_codebook
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self._weights = Weights(commitment_weight, codebook_weight if learnable_codebook else 0.0)

        inner = self.codebook_dim * self.heads
        self.has_projections = inner != dim
        self.project_in, self.project_out = projections(dim, inner)
        self._codebook = Codebook(
            self.codebook_dim,
            self.codebook_size,
            self.heads if self.separate_codebook_per_head else 1,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=_arguments.integer("kmeans_iters", kmeans_iters, least=0),
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_cosine_sim=use_cosine_sim,
            ema_update=ema_update,
            learnable=learnable_codebook,
            sync=sync_codebook is not False,
        )

    @property
    def codebook(self) -> Tensor:
        """The codes: (K, D), or (heads, K, D) with separate codebooks.

        Assigning to it puts codes in place, with averages that agree, and k-means is over.
        """
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        check_codes(codes, self.codebook)
        self._codebook.set_codes(codes if self.separate_codebook_per_head else codes.unsqueeze(0))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        freeze_codebook: bool | None = None,
        accum_ema_update: bool = False,
        return_usage: bool = False,
        **options: Any,
    ) -> "Quantized":
        """Quantises x.

        Args:
            x: (B, ..., dim), or (B, dim, ...) as the constructor said; any floating dtype.
            mask: (B, ...) bool; rows where it is False have no part in loss and statistics.
            lens: (B) int64, lengths of sequences (B, N, dim), in place of a mask.
            freeze_codebook: overrides the constructor's.
            accum_ema_update: the averages wait: these rows count with those of the next call that
                leaves it out. For gradient accumulation: True for all micro batches but the last,
                so that a step of the optimiser is one step of the averages, as of one batch. A
                checkpoint between them does not hold what waits.
            return_usage: appends a `CodeUsage`.
            **options: what else lucidrains' call takes, at the values that switch it off.

        Returns:
            quantized like x; indices (B, ...) int64, (B, ..., heads) with several heads, -1 where
            masked; loss () float32, over the rows of this process; `CodeUsage` if asked for.

        Raises:
            ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
        """
        refuse_options(options, CALL_OPTIONS)
        x, mask = self._take(x, mask, lens)  # (B, ..., dim)
        inner = project(self.project_in, x)
        rows = inner.reshape(-1, self.codebook_dim)  # (M, D), M = B * ... * heads
        keep = None
        if mask is not None:
            keep = mask.reshape(-1, 1).expand(-1, self.heads).reshape(-1)  # (M)
        freeze = self.freezes(freeze_codebook)
        chosen = self.choose(rows, keep, freeze)
        learn([chosen.lesson], accumulate=accum_ema_update)

        quantized = project(self.project_out, chosen.quantized.view(inner.shape))
        quantized = self._give(quantized, x, mask, not self.return_zeros_for_masked_padding)
        shape = x.shape[:-1] if self.heads == 1 else (*x.shape[:-1], self.heads)
        index = self._codebook.local_index(chosen.flat_index).view(shape)
        if not return_usage:
            return quantized, index, chosen.loss
        return quantized, index, chosen.loss, self.usage(chosen)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes, all heads of a vector side by side, laid out as the input; zeros for -1.

        Args:
            indices: (B, ...) integers, or (B, ..., heads), as the call returned them.

        Returns:
            (B, ..., heads * D) or (B, heads * D, ...), in the dtype of the module.

        Raises:
            ValueError, TypeError: no integers, of another shape, or on a CPU beyond the last code.
        """
        return self._layout.restore(self.codes_at(indices).to(self._codebook.dtype))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What the call returned as quantized together with these indices."""
        codes = self.codes_at(indices).to(self._codebook.dtype)
        return self._layout.restore(project(self.project_out, codes))

    def freezes(self, freeze_codebook: bool | None) -> bool:
        """Whether a call with this argument leaves the codes as they are."""
        return self.freeze_codebook if freeze_codebook is None else freeze_codebook

    def choose(
        self, rows: Tensor, keep: Tensor | None, freeze: bool, enabled: Tensor | None = None
    ) -> Chosen:
        """Codes for rows (M, D), where keep (M) is not False, and what there is to learn.

        A part of `forward`, for quantisers that are made of several; `learn` has to follow.

        Args:
            freeze: whether codes neither learn nor get a gradient.
            enabled: () bool; False leaves nothing to learn.
        """
        book = self._codebook
        learns = self.training and not freeze
        if book.use_cosine_sim:
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if keep is not None:  # padding may be anything, and 0 * NaN would be its gradient
                rows = rows.masked_fill(~keep.unsqueeze(-1), 0.0)
            rows, lengths = unit_rows(rows)
        if learns and book.needs_init:
            book.initialise(rows, keep)
        codes = book.codes().detach() if freeze else book.codes()
        index, distance = book.search(rows, keep, codes)  # (M)
        error = distance
        if book.use_cosine_sim:
            error = _squared_chord(distance, lengths.squeeze(-1))
            error = error if keep is None else error.masked_fill(~keep, 0.0)
        elements = None
        if keep is not None:
            elements = (keep.sum() * rows.shape[-1]).clamp(min=1).to(error.dtype)
        quantized, loss = straight_through(
            rows,
            codes.flatten(0, 1),
            index,
            error.sum(),
            elements,
            None if keep is None else keep.unsqueeze(-1),
            self._weights._replace(codebook=0.0) if freeze else self._weights,
            self.rotation_trick,
        )
        taught = None
        if learns and book.learns:
            # A NaN or an infinity in an average would stay for ever.
            finite = torch.where(distance < float("inf"), index, -1)
            taught = lesson(book, rows, finite, enabled)
        return Chosen(quantized, index, loss, taught)

    def codes_at(self, indices: Tensor) -> Tensor:
        """(B, ...) or (B, ..., heads) -> (B, ..., heads * D), in the codebook's precision."""
        indices = code_indices(indices, self.codebook_size)
        if self.heads > 1 and indices.shape[-1:] != (self.heads,):
            raise ValueError(
                f"indices: expected {self.heads} heads last, got {tuple(indices.shape)}"
            )
        rows = indices.unsqueeze(-1) if self.heads == 1 else indices  # (B, ..., heads)
        if self.separate_codebook_per_head:
            rows = self._codebook.flat_index(rows)
        codes = gather(self._codebook.codes().flatten(0, 1), rows.reshape(-1), masked=True)
        return codes.view(*rows.shape[:-1], self.heads * self.codebook_dim)

    def usage(self, chosen: Chosen) -> CodeUsage:
        """How often each code was chosen."""
        if chosen.lesson is not None:
            counts = chosen.lesson.counts
        else:  # nothing is learned, so nothing was counted
            size = self._codebook.cluster_size.shape
            counts = count_codes(chosen.flat_index, size.numel()).view(size)
        if not self.separate_codebook_per_head:
            counts = counts[0]
        return CodeUsage.of(counts)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, codebook_size={self.codebook_size}" + (
            f", codebook_dim={self.codebook_dim}, heads={self.heads}"
            if self.has_projections or self.heads > 1 else ""
        )


def _squared_chord(distance: Tensor, lengths: Tensor) -> Tensor:
    """||x - c||^2 for c of length 1 from the cosine distance, with x as `unit_rows` made it."""
    length = lengths / lengths.clamp(min=EPS)  # 1, but for vectors near zero
    return length.square() + 1 - 2 * length * (1 - distance)
