"""Quantisers of taming-transformers as ours, and our state dicts as theirs."""

from typing import Any

from torch import Tensor, nn

from tilewise.nn.convert._embedding import vector_quantizer
from tilewise.nn.convert._state import StateDict, build, state_of
from tilewise.nn.quantizers.gumbel_quantizer import GumbelQuantizer
from tilewise.nn.quantizers.vector_quantizer import VectorQuantizer

_GUMBEL_KEYS = {"proj.weight", "proj.bias", "embed.weight"}


def from_taming(
    source: nn.Module | StateDict,
    *,
    prefix: str = "",
    beta: float | None = None,
    legacy: bool | None = None,
    **settings: Any,
) -> VectorQuantizer | GumbelQuantizer:
    """A `VectorQuantizer`, `VectorQuantizer2` or `GumbelQuantize` of taming-transformers as ours.

        loss = mean ||sg(q) - x||^2 + beta * mean ||q - sg(x)||^2       (legacy)
        loss = beta * mean ||sg(q) - x||^2 + mean ||q - sg(x)||^2       (otherwise: VQ-VAE's)

    Args:
        source: the module, or a state dict with its key `embedding.weight`; of `GumbelQuantize`
            with `proj.weight`, `proj.bias` and `embed.weight`.
        prefix: of this key, where the state dict is that of a larger model, as "quantize.".
        beta, legacy: None means what the module says; for a state dict 0.25 and True, which is
            what published models were trained with. `GumbelQuantize` has neither.
        settings: arguments of our constructor, in place of what `source` says.

    Returns:
        A `VectorQuantizer` of image feature maps (B, C, H, W) that learns by gradient, or a
        `GumbelQuantizer` that draws in evaluation too, as theirs does. They return
        (quantized, indices (B, H, W), loss), not (quantized, loss, (perplexity, one-hot, indices)).

    Raises:
        ValueError: `source` remaps its indices, or has other keys.
    """
    state = state_of(source, prefix)
    if set(state) == _GUMBEL_KEYS:
        return _gumbel_quantizer(source, state, settings)
    return vector_quantizer(source, state, beta, legacy, settings)


def to_taming(module: VectorQuantizer | GumbelQuantizer) -> dict[str, Tensor]:
    """A state dict that taming-transformers' quantisers load: `embedding.weight` (K, D).

    Of a `GumbelQuantizer`, `proj.weight` (K, C, 1, 1), `proj.bias` (K) and `embed.weight` (K, D).

    Raises:
        ValueError: the module has projections or separate codebooks, which they lack.
    """
    if isinstance(module, GumbelQuantizer):
        ours = {key: x.detach() for key, x in module.named_parameters() if key in _GUMBEL_KEYS}
        return {**ours, "proj.weight": ours["proj.weight"][..., None, None]}
    if module.has_projections or module.codebook.dim() != 2:
        raise ValueError(
            "module: expected one codebook and no projections, got "
            f"heads={module.heads}, codebook_dim={module.codebook_dim}, dim={module.dim}"
        )
    return {"embedding.weight": module.codebook.detach()}


def _gumbel_quantizer(source: object, state: StateDict, settings: dict) -> GumbelQuantizer:
    k, d = state["embed.weight"].shape
    arguments = dict(
        dim=state["proj.weight"].shape[1],
        codebook_size=k,
        codebook_dim=d,
        straight_through=getattr(source, "straight_through", True),
        kl_weight=getattr(source, "kl_weight", 5e-4),
        tau=getattr(source, "temperature", 1.0),
        sample_in_eval=True,
        accept_image_fmap=True,
    )
    return build(GumbelQuantizer, {**arguments, **settings}, state, source)
