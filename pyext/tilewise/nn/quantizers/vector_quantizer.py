"""VectorQuantizer: lucidrains' VectorQuantize on the exact search of tilewise."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tilewise.nn.quantizers._codebook import Codebook
from tilewise.nn.quantizers._layout import Layout, projections, row_mask
from tilewise.nn.quantizers._straight_through import StraightThrough, Weights, gather
from tilewise.nn.quantizers._unit import EPS, UnitRows
from tilewise.nn.quantizers._usage import CodeUsage, count_codes


class Chosen(NamedTuple):
    """What one choice of codes gives for rows (M, D).

    quantized: (M, D). code: (M) int64, h * K + k with several codebooks, -1 where masked.
    loss: () float32. counts: (H, K) int64, or None where nothing was learned.
    """

    quantized: Tensor
    code: Tensor
    loss: Tensor
    counts: Tensor | None


class VectorQuantizer(nn.Module):
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
        freeze_codebook: keeps the codes as they are; also an argument of the call.
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

    Raises:
        ValueError: sizes below 1; both ways of learning at once.

    State dict: `_codebook.embed` (H, K, D) the codes, `_codebook.cluster_size` (H, K) is N,
    `_codebook.embed_avg` (H, K, D) is m, `_codebook.initted` () whether k-means is over (H = 1 but
    for separate codebooks); with codebook_dim `project_in.*` and `project_out.*`. These are
    lucidrains' names and shapes, so checkpoints load both ways. `.half()` leaves codes in float32.

    Differences to lucidrains: the nearest code is exact, ties go to the lowest index; the loss is
    float32 and also computed in evaluation; evaluation lets gradients through and never writes to
    buffers; a gradient codebook has VQ-VAE's loss; rows that are NaN or infinite never reach the
    averages; k-means leaves codes without rows where they began; processes agree on every code.
    Not here: in-place codebook optimisers, orthogonal, diversity and cross-entropy losses, affine
    parameters, DiVeQ, sampled codes, topk, layer norm after the projection.

    Cost: the search, and a handful of passes over x: no N x K matrix, no one-hot; nothing waits for
    a GPU. Calling forward twice (activation checkpointing) learns twice. `quantized` must not be
    modified in place before the backward pass. There is no second derivative.

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
        learnable_codebook: bool = False,
        return_zeros_for_masked_padding: bool = True,
    ):
        super().__init__()
        codebook_dim = dim if codebook_dim is None else codebook_dim
        ema_update = not learnable_codebook if ema_update is None else ema_update
        sizes = dict(dim=dim, codebook_size=codebook_size, codebook_dim=codebook_dim, heads=heads)
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if ema_update and learnable_codebook:
            raise ValueError(
                "ema_update: expected False with learnable_codebook=True, got True: codes learn "
                "either as averages or by gradient"
            )
        self.dim, self.codebook_size = dim, codebook_size
        self.codebook_dim, self.heads = codebook_dim, heads
        self.separate_codebook_per_head = separate_codebook_per_head and heads > 1
        self.freeze_codebook = freeze_codebook
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self._weights = Weights(commitment_weight, codebook_weight if learnable_codebook else 0.0)

        inner = codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in, self.project_out = projections(dim, inner)
        self._layout = Layout(channel_last, accept_image_fmap, accept_3d_fmap)
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads if self.separate_codebook_per_head else 1,
            decay=decay,
            eps=eps,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            threshold_ema_dead_code=threshold_ema_dead_code,
            use_cosine_sim=use_cosine_sim,
            ema_update=ema_update,
            learnable=learnable_codebook,
            sync=sync_codebook is not False,
        )

    @property
    def codebook(self) -> Tensor:
        """The codes: (K, D), or (heads, K, D) with separate codebooks."""
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed[0]

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        freeze_codebook: bool | None = None,
        return_usage: bool = False,
    ) -> tuple:
        """Quantises x.

        Args:
            x: (B, ..., dim), or (B, dim, ...) as the constructor said; any floating dtype.
            mask: (B, ...) bool; rows where it is False have no part in loss and statistics.
            lens: (B) int64, lengths of sequences (B, N, dim), in place of a mask.
            freeze_codebook: overrides the constructor's.
            return_usage: appends a `CodeUsage`.

        Returns:
            quantized like x; indices (B, ...) int64, (B, ..., heads) with several heads, -1 where
            masked; loss () float32, over the rows of this process; `CodeUsage` if asked for.

        Raises:
            ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
        """
        x = self._layout.to_last(x, self.dim)  # (B, ..., dim)
        mask = row_mask(x, mask, lens)
        freeze = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        inner = self.project_in(x)
        rows = inner.reshape(-1, self.codebook_dim)  # (M, D), M = B * ... * heads
        keep = None
        if mask is not None:
            keep = mask.reshape(-1, 1).expand(-1, self.heads).reshape(-1)  # (M)
        chosen = self._choose(rows, keep, learn=self.training and not freeze)

        quantized = self.project_out(chosen.quantized.view(inner.shape)).to(x.dtype)
        if mask is not None and not self.return_zeros_for_masked_padding:
            quantized = torch.where(mask.unsqueeze(-1), quantized, x)
        elif mask is not None and self.has_projections:
            quantized = torch.where(mask.unsqueeze(-1), quantized, 0.0)
        shape = x.shape[:-1] if self.heads == 1 else (*x.shape[:-1], self.heads)
        result = (self._layout.restore(quantized), self._own_index(chosen.code).view(shape))
        if not return_usage:
            return *result, chosen.loss
        return *result, chosen.loss, self._usage(chosen)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes, all heads of a vector side by side, laid out as the input; zeros for -1.

        Args:
            indices: (B, ...) int64, or (B, ..., heads), as the call returned them.

        Returns:
            (B, ..., heads * D) or (B, heads * D, ...), in the codebook's dtype.
        """
        return self._layout.restore(self._codes_at(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What the call returned as quantized together with these indices."""
        return self._layout.restore(self.project_out(self._codes_at(indices)))

    def _choose(
        self,
        rows: Tensor,
        keep: Tensor | None,
        learn: bool,
        refresh: bool = True,
        enabled: Tensor | None = None,
    ) -> Chosen:
        """Codes for rows (M, D), where keep (M) is not False; then a step of learning.

        refresh, enabled: as in `Codebook.update`.
        """
        book = self._codebook
        if book.use_cosine_sim:
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            if keep is not None:  # padding may be anything, and 0 * NaN would be its gradient
                rows = rows.masked_fill(~keep.unsqueeze(-1), 0.0)
            rows, lengths = UnitRows.apply(rows)
        if learn and book.needs_init:
            book.initialise(rows, keep)
        codes = book.codes()
        index, distance = book.search(rows, keep, codes)  # (M)
        error = distance
        if book.use_cosine_sim:
            error = _squared_chord(distance, lengths.squeeze(-1))
            error = error if keep is None else error.masked_fill(~keep, 0.0)
        if keep is None:
            elements = error.new_full((), max(rows.numel(), 1))
        else:
            elements = (keep.sum() * rows.shape[-1]).clamp(min=1).to(error.dtype)
        quantized, loss = StraightThrough.apply(
            rows,
            codes.flatten(0, 1),
            index,
            error.sum() / elements,
            elements,
            None if keep is None else keep.unsqueeze(-1),
            self._weights,
            self.rotation_trick,
        )
        counts = None
        if learn and book.learns:
            # A NaN or an infinity in an average would stay for ever.
            finite = torch.where(distance.isfinite(), index, -1)
            counts = book.update(rows, finite, refresh, enabled)
        return Chosen(quantized, index, loss, counts)

    def _codes_at(self, indices: Tensor) -> Tensor:
        """(B, ...) or (B, ..., heads) -> (B, ..., heads * D)."""
        if self.heads > 1 and indices.shape[-1:] != (self.heads,):
            raise ValueError(
                f"indices: expected {self.heads} heads last, got {tuple(indices.shape)}"
            )
        rows = indices.unsqueeze(-1) if self.heads == 1 else indices  # (B, ..., heads)
        if self.separate_codebook_per_head:
            first = self.codebook_size * torch.arange(self.heads, device=rows.device)
            rows = torch.where(rows < 0, -1, rows + first)
        codes = gather(self._codebook.codes().flatten(0, 1), rows.reshape(-1), masked=True)
        return codes.view(*rows.shape[:-1], self.heads * self.codebook_dim)

    def _own_index(self, index: Tensor) -> Tensor:
        """Places in all codebooks as places in each head's own."""
        if not self.separate_codebook_per_head:
            return index
        return torch.where(index < 0, -1, index % self.codebook_size)

    def _usage(self, chosen: Chosen) -> CodeUsage:
        counts = chosen.counts
        if counts is None:  # nothing was learned, so nothing was counted
            size = self._codebook.cluster_size.numel()
            counts = count_codes(chosen.code, size).view(self._codebook.cluster_size.shape)
        if not self.separate_codebook_per_head:
            counts = counts[0]
        return CodeUsage.of(counts)


def _squared_chord(distance: Tensor, lengths: Tensor) -> Tensor:
    """||x - c||^2 for c of length 1 from the cosine distance, with x as `UnitRows` made it."""
    length = lengths / lengths.clamp(min=EPS)  # 1, but for vectors near zero
    return length.square() + 1 - 2 * length * (1 - distance)
