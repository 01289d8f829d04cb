"""GumbelQuantizer: taming-transformers' GumbelQuantize without one-hot vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tilewise.nn import _sync
from tilewise.nn.quantizers._base import Quantizer, check_codes, code_indices
from tilewise.nn.quantizers._gumbel_codes import HARD, MODE, SOFT, choose_codes
from tilewise.nn.quantizers._projection import project
from tilewise.nn.quantizers._straight_through import gather
from tilewise.nn.quantizers._usage import CodeUsage, count_codes
from tilewise.nn.sampling._temperature import HasTemperature, Schedule, Temperature, checked
from tilewise.ops import _arguments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from tilewise.nn.quantizers._base import Quantized


class GumbelQuantizer(HasTemperature, Quantizer):
    r"""Replaces each vector by one of K codes, drawn at random as a linear layer finds them likely.

        l = W x + b,    index = argmax_k (l_k + g_k),    quantized = c_index,    g Gumbel noise
        loss = kl_weight * mean sum_k p_k log(K p_k),    p = softmax(l)

    Gradients reach x and the codes as if quantized were y C, with the relaxed sample
    y = softmax((l + g) / tau) (straight-through). Takes the place of taming-transformers'
    `GumbelQuantize`, and its weights. Drawing and looking up codes needs no one-hot vectors; beside
    the logits (rows, K), nothing of their size is stored for the backward pass.

    Args:
        dim: channels of the input.
        codebook_size: K.
        codebook_dim: channels D of a code and of the result. None: dim.
        straight_through: False trains with the relaxed sample itself, quantized = y C.
        kl_weight: of the divergence of p from uniform, which keeps the codes in use.
        tau: the temperature, >= 0, or a schedule of it; see `GumbelSoftmax`.
        learnable_tau: make it a parameter.
        sample_in_eval: draw in evaluation too, as taming does. Otherwise evaluation takes the most
            likely code, and the same input always gives the same codes.
        channel_last: (B, ..., dim), or (B, dim, ...) if False.
        accept_image_fmap, accept_3d_fmap: input is (B, dim, H, W), or (B, dim, T, H, W).
        group: processes that draw what one would with the batches of all, joined in the order of
            their ranks: the first one's seed, and a row offset for each. All must then call it
            where it draws. None: each draws for itself.

    Raises:
        ValueError, TypeError: sizes below 1; tau below 0; two layouts at once.

    State dict: `proj.weight` (K, dim), `proj.bias` (K), `embed.weight` (K, D) the codes, and
    `temperature.*`, see `GumbelSoftmax`. The first three are taming's names: its checkpoints load,
    their 1 x 1 convolution included, and leave the temperature as it is. `from_taming` does both.

    Differences to taming: results are (quantized, indices, loss); evaluation is deterministic; the
    loss is float32. Not here: remapped indices.

    Cost: the linear layer, and the passes over its logits that draw and that the loss needs (none
    with `kl_weight` 0). Work space is fixed, whatever the sizes. There is no second derivative.

    Papers: Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax, ICLR 2017; Esser
    et al., Taming Transformers (VQGAN), CVPR 2021; Ramesh et al., Zero-Shot Text-to-Image
    Generation (DALL-E), ICML 2021.

    Example:
        >>> tau = tw.nn.CosineSchedule(start=1.0, end=1 / 16, steps=150_000)
        >>> quantizer = tw.nn.GumbelQuantizer(256, 8192, tau=tau, accept_image_fmap=True)
        >>> quantized, indices, loss = quantizer(torch.randn(8, 256, 16, 16))
        >>> quantizer.step()  # after the optimiser's
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        *,
        straight_through: bool = True,
        kl_weight: float = 5e-4,
        tau: float | Schedule = 1.0,
        learnable_tau: bool = False,
        sample_in_eval: bool = False,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        group: ProcessGroup | None = None,
    ):
        Quantizer.__init__(self, dim, channel_last, accept_image_fmap, accept_3d_fmap)
        codebook_dim = self.dim if codebook_dim is None else codebook_dim
        self.codebook_size = _arguments.integer("codebook_size", codebook_size, least=1)
        self.codebook_dim = _arguments.integer("codebook_dim", codebook_dim, least=1)
        _arguments.check_between("kl_weight", kl_weight, 0, float("inf"))
        self.straight_through, self.kl_weight = straight_through, kl_weight
        self.sample_in_eval = sample_in_eval
        self.group = group
        self.proj = nn.Linear(self.dim, self.codebook_size)
        self.embed = nn.Embedding(self.codebook_size, self.codebook_dim)
        self.temperature = Temperature(tau, learnable_tau)

    @property
    def codebook(self) -> Tensor:
        """The codes, (K, D). Can be assigned to."""
        return self.embed.weight

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        check_codes(codes, self.codebook)
        with torch.no_grad():
            self.embed.weight.copy_(codes)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        lens: Tensor | None = None,
        tau: Tensor | float | None = None,
        seed: Tensor | int | None = None,
        row_offset: int = 0,
        return_usage: bool = False,
    ) -> Quantized:
        """Quantises x.

        Args:
            x: (B, ..., dim), or (B, dim, ...) as the constructor said; any floating dtype.
            mask: (B, ...) bool; rows where it is False have no part in the loss.
            lens: (B) int64, lengths of sequences (B, N, dim), in place of a mask.
            tau: overrides the module's.
            seed, row_offset: as in `tilewise.gumbel_softmax`; a row is a vector of the input. Equal
                seeds on several processes need the number of the first of their rows.
            return_usage: appends a `CodeUsage`.

        Returns:
            quantized like x, with D channels, zeros where masked; indices (B, ...) int64, -1 where
            masked; loss () float32, over the rows of this process; `CodeUsage` if asked for.

        Raises:
            ValueError, TypeError: an argument of the wrong shape or dtype, named in the text.
        """
        x, mask = self._take(x, mask, lens)  # (B, ..., dim)
        if mask is not None:  # padding may be anything, and 0 * NaN would be its gradient
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        logits = project(self.proj, x).flatten(0, -2)  # (N, K)
        tau = self.tau if tau is None else checked(tau)
        kind = self._kind()
        if self.group is not None and kind != MODE:
            seed, first = _sync.place_in_stream(
                "tilewise.nn.GumbelQuantizer", len(logits), seed, logits.device, self.group
            )
            row_offset += first
        quantized, index, kl = choose_codes(
            logits,
            self.codebook,
            _arguments.scalar("tau", tau, logits).reshape(()),
            _arguments.seed(0 if kind == MODE else seed, logits.device),
            _arguments.row_offset(row_offset),
            kind,
            self.kl_weight != 0,
        )
        loss = self._loss(kl, mask)
        quantized = self._give(quantized.view(*x.shape[:-1], self.codebook_dim), x, mask)
        index = index.view(x.shape[:-1])
        # A copy, since the backward pass needs ours, and who appends other tokens adds in place.
        index = index.clone() if mask is None else torch.where(mask, index, -1)
        if not return_usage:
            return quantized, index, loss
        return quantized, index, loss, CodeUsage.of(count_codes(index, self.codebook_size))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of indices (B, ...), (B, ..., D) or (B, D, ...) as quantized is; zeros for -1.

        Raises:
            ValueError, TypeError: no integers, or on a CPU beyond the last code.
        """
        indices = code_indices(indices, self.codebook_size)
        codes = gather(self.codebook, indices.reshape(-1), masked=True)
        return self._layout.restore(codes.view(*indices.shape, self.codebook_dim))

    get_output_from_indices = get_codes_from_indices  # `VectorQuantizer` may project codes

    def _kind(self) -> str:
        if self.training:
            return HARD if self.straight_through else SOFT
        return HARD if self.sample_in_eval else MODE

    def _loss(self, kl: Tensor, mask: Tensor | None) -> Tensor:
        if self.kl_weight == 0:
            return kl.new_zeros(())
        if mask is None:
            return self.kl_weight * kl.sum() / max(kl.numel(), 1)
        keep = mask.reshape(-1)
        return self.kl_weight * torch.where(keep, kl, 0.0).sum() / keep.sum().clamp(min=1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(prefix + "proj.weight")
        if weight is not None and weight.dim() > 2:
            state_dict[prefix + "proj.weight"] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, codebook_size={self.codebook_size}, "
            f"codebook_dim={self.codebook_dim}, straight_through={self.straight_through}, "
            f"kl_weight={self.kl_weight}, sample_in_eval={self.sample_in_eval}"
        )
