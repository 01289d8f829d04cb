"""The quantiser that taming-transformers and diffusers share, whose codes are an nn.Embedding."""

from tilewise.nn.convert._state import StateDict, build, some
from tilewise.nn.quantizers.vector_quantizer import VectorQuantizer


def vector_quantizer(
    source: object, state: StateDict, beta: float | None, legacy: bool | None, settings: dict
) -> VectorQuantizer:
    """Codes that learn by gradient; `beta` weighs one or the other part of the loss (`legacy`)."""
    if set(state) != {"embedding.weight"}:
        raise ValueError(f"source: expected the key embedding.weight alone, got {some(state)}")
    if beta is None:
        beta = getattr(source, "beta", 0.25)
    if legacy is None:
        legacy = getattr(source, "legacy", True)
    embed = state["embedding.weight"]
    arguments = dict(
        dim=embed.shape[1],
        codebook_size=embed.shape[0],
        accept_image_fmap=True,
        learnable_codebook=True,
        rotation_trick=False,
        commitment_weight=1.0 if legacy else beta,
        codebook_weight=beta if legacy else 1.0,
    )
    ours = {
        "_codebook.embed": embed.unsqueeze(0),
        "_codebook.embed_avg": embed.unsqueeze(0),
        "_codebook.cluster_size": embed.new_ones(1, len(embed)),
        "_codebook.initted": embed.new_ones(()),
    }
    return build(VectorQuantizer, {**arguments, **settings}, ours, source)
