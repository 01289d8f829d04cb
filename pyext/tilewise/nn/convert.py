"""Modules of other packages as ours, and our state dicts as theirs. None needs the package."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tilewise.nn.losses.itc_loss import ItcLoss
from tilewise.nn.quantizers.grouped_residual_vector_quantizer import (
    GroupedResidualVectorQuantizer,
)
from tilewise.nn.quantizers.gumbel_quantizer import GumbelQuantizer
from tilewise.nn.quantizers.residual_vector_quantizer import ResidualVectorQuantizer
from tilewise.nn.quantizers.vector_quantizer import VectorQuantizer

Quantizer = VectorQuantizer | ResidualVectorQuantizer | GroupedResidualVectorQuantizer
StateDict = Mapping[str, Tensor]

_EMBED = "_codebook.embed"
_GUMBEL_KEYS = {"proj.weight", "proj.bias", "embed.weight"}

# What lucidrains' modules can do and ours do not: attribute and the value that switches it off.
_UNSUPPORTED = {
    "affine_param": False,
    "commitment_use_cross_entropy_loss": False,
    "directional_reparam": False,
    "has_codebook_diversity_loss": False,
    "has_codebook_orthogonal_loss": False,
    "in_place_codebook_optimizer": None,
    "route_gradients_to_input": True,
    "sync_update_v": 0.0,
    "vq_bridge": None,
    "beam_size": None,
    "diveq": False,
    "implicit_neural_codebook": False,
}


def from_lucidrains(
    source: nn.Module | StateDict, *, prefix: str = "", **settings: Any
) -> Quantizer:
    """A quantiser of vector_quantize_pytorch as ours: the same indices, outputs, loss and learning.

    Args:
        source: a `VectorQuantize`, `ResidualVQ` or `GroupedResidualVQ`; or a state dict with one.
        prefix: of the quantiser's keys, where the state dict is that of a larger model.
        settings: arguments of our constructor, in place of what `source` says. A state dict says
            only sizes: other arguments are the constructor's defaults.

    Returns:
        `VectorQuantizer`, `ResidualVectorQuantizer` or `GroupedResidualVectorQuantizer`, with
        copies of the weights. The loss of a learnable codebook is twice lucidrains', its gradients
        are the same.

    Raises:
        ValueError: `source` uses an option that we do not have, or has none of the keys.
    """
    if isinstance(source, nn.Module):
        state, read = source.state_dict(), _read_module(source)
    else:
        state = _without_prefix(source, prefix)
        read = _read_state(state)
    kind, arguments = read
    return _build(kind, {**arguments, **settings}, state, source)


def to_lucidrains(module: Quantizer) -> dict[str, Tensor]:
    """A state dict that the module of vector_quantize_pytorch with the same arguments loads."""
    return dict(module.state_dict())


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
    state = source.state_dict() if isinstance(source, nn.Module) else source
    state = _without_prefix(state, prefix)
    if set(state) == _GUMBEL_KEYS:
        return _gumbel_quantizer(source, state, settings)
    return _vector_quantizer(source, state, beta, legacy, settings)


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
    state = source.state_dict() if isinstance(source, nn.Module) else source
    return _vector_quantizer(source, _without_prefix(state, prefix), beta, legacy, settings)


def to_diffusers(module: VectorQuantizer) -> dict[str, Tensor]:
    """A state dict that diffusers' `VectorQuantizer` loads; see `to_taming`."""
    return to_taming(module)


def _vector_quantizer(
    source: object, state: StateDict, beta: float | None, legacy: bool | None, settings: dict
) -> VectorQuantizer:
    if set(state) != {"embedding.weight"}:
        raise ValueError(f"source: expected the key embedding.weight alone, got {sorted(state)}")
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
    module = VectorQuantizer(**{**arguments, **settings})
    ours = module.state_dict()
    ours[_EMBED] = ours["_codebook.embed_avg"] = embed.detach().unsqueeze(0)
    module.load_state_dict(ours)
    module.to(embed.device)
    return module.train(source.training) if isinstance(source, nn.Module) else module


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
    return _build(GumbelQuantizer, {**arguments, **settings}, state, source)


def _build(kind: type, arguments: dict, state: StateDict, source: object) -> Any:
    module = kind(**arguments)
    module.load_state_dict(state)
    module.to(next(iter(state.values())).device)
    return module.train(source.training) if isinstance(source, nn.Module) else module


def from_blip(source: nn.Module | StateDict, *, prefix: str = "", alpha: float = 0.4) -> ItcLoss:
    """An `ItcLoss` with the queues and the temperature of a model of BLIP, ALBEF or LAVIS.

    Args:
        source: the model or its state dict, with `temp` (), `image_queue` and `text_queue` (D, Q),
            `queue_ptr` or `ptr_queue` (1,), and `idx_queue` (1, Q) if it has ids. Other keys change
            nothing.
        prefix: of these keys, where the state dict is that of a larger model.
        alpha: as in `ItcLoss`; no state dict says it.

    Returns:
        `ItcLoss`, with copies of these tensors in float32.

    Raises:
        ValueError: one of the keys is missing.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    state = _without_prefix(state, prefix)
    pointer = "ptr_queue" if "ptr_queue" in state else "queue_ptr"
    for key in ("temp", "image_queue", "text_queue", pointer):
        if key not in state:
            raise ValueError(f"source: expected the key {key!r} of a BLIP or ALBEF model")
    dim, size = state["image_queue"].shape
    loss = ItcLoss(dim, size, alpha)
    loss.load_state_dict({
        "temperature": state["temp"].view(()),
        "image_queue": state["image_queue"].T,
        "text_queue": state["text_queue"].T,
        "id_queue": state.get("idx_queue", loss.id_queue).view(-1),
        "queue_pointer": state[pointer].view(()),
    })
    return loss


def _without_prefix(state: StateDict, prefix: str) -> dict[str, Tensor]:
    found = {key[len(prefix) :]: x for key, x in state.items() if key.startswith(prefix)}
    if not found:
        raise ValueError(f"prefix: expected that of some keys, got {prefix!r} for {list(state)}")
    return found


def _read_state(state: StateDict) -> tuple[type, dict[str, Any]]:
    """Our class and its arguments, as far as shapes tell them."""
    if "rvqs.0.layers.0._codebook.embed" in state:
        _, arguments = _read_state(_without_prefix(state, "rvqs.0."))
        groups = _count(state, "rvqs.{}.layers.0._codebook.embed")
        return GroupedResidualVectorQuantizer, {
            **arguments, "groups": groups, "dim": groups * arguments["dim"],
        }
    if "layers.0._codebook.embed" in state:
        embeds = [
            state[f"layers.{i}._codebook.embed"]
            for i in range(_count(state, "layers.{}._codebook.embed"))
        ]
        return ResidualVectorQuantizer, dict(
            dim=_outer(state, embeds[0].shape[2]),
            codebook_size=tuple(x.shape[1] for x in embeds),
            codebook_dim=embeds[0].shape[2],
            kmeans_init=not bool(state["layers.0._codebook.initted"]),
        )
    if _EMBED not in state:
        raise ValueError(f"source: expected the key {_EMBED}, got {sorted(state)}")
    h, k, d = state[_EMBED].shape
    weight = state.get("project_in.weight")
    return VectorQuantizer, dict(
        dim=_outer(state, h * d),
        codebook_size=k,
        codebook_dim=d,
        heads=h if weight is None else weight.shape[0] // d,
        separate_codebook_per_head=h > 1,
        kmeans_init=not bool(state["_codebook.initted"]),
    )


def _outer(state: StateDict, inner: int) -> int:
    """Channels of the input, before a projection."""
    weight = state.get("project_in.weight")
    return inner if weight is None else weight.shape[1]


def _count(state: StateDict, key: str) -> int:
    number = 0
    while key.format(number) in state:
        number += 1
    return number


def _read_module(source: nn.Module) -> tuple[type, dict[str, Any]]:
    """Our class and its arguments from lucidrains' module."""
    _refuse(source)
    theirs: Any = source
    if hasattr(source, "rvqs"):
        _, arguments = _read_module(theirs.rvqs[0])
        return GroupedResidualVectorQuantizer, {
            **arguments, "dim": theirs.dim, "groups": theirs.groups,
        }
    if hasattr(source, "layers"):
        return ResidualVectorQuantizer, _read_residual(theirs)
    if hasattr(source, "_codebook"):
        return VectorQuantizer, _read_quantizer(theirs)
    raise ValueError(f"source: expected a quantiser of lucidrains', got {type(source).__name__}")


def _read_quantizer(theirs: Any) -> dict[str, Any]:
    book = theirs._codebook
    _refuse(book)
    if isinstance(theirs.project_in, nn.Sequential):
        raise ValueError("source: layernorm_after_project_in is not supported")
    if getattr(book.gumbel_sample, "keywords", {}).get("stochastic"):
        raise ValueError("source: stochastic_sample_codes is not supported")
    return dict(
        dim=theirs.dim,
        codebook_size=theirs.codebook_size,
        codebook_dim=book.embed.shape[-1],
        heads=theirs.heads,
        separate_codebook_per_head=theirs.separate_codebook_per_head,
        decay=book.decay,
        eps=book.eps,
        freeze_codebook=theirs.freeze_codebook,
        kmeans_init=not bool(book.initted),
        kmeans_iters=book.kmeans_iters,
        use_cosine_sim=theirs.use_cosine_sim,
        threshold_ema_dead_code=book.threshold_ema_dead_code,
        channel_last=theirs.channel_last,
        accept_image_fmap=theirs.accept_image_fmap,
        accept_3d_fmap=theirs.accept_3d_fmap,
        commitment_weight=theirs.commitment_weight,
        codebook_weight=theirs.commitment_weight,
        rotation_trick=theirs.rotation_trick,
        ema_update=book.ema_update,
        learnable_codebook=theirs.learnable_codebook,
        return_zeros_for_masked_padding=theirs.return_zeros_for_masked_padding,
    )


def _read_residual(theirs: Any) -> dict[str, Any]:
    layer = theirs.layers[0]
    _refuse(layer)
    if layer._codebook.manual_ema_update and not theirs.shared_codebook:
        raise ValueError("source: manual_ema_update is not supported")
    arguments = _read_quantizer(layer)
    for name in ("heads", "separate_codebook_per_head"):
        del arguments[name]
    projected = isinstance(theirs.project_in, nn.Linear)
    arguments.update(
        dim=theirs.project_in.in_features if projected else theirs.codebook_dim,
        codebook_size=tuple(theirs.codebook_sizes),
        codebook_dim=theirs.codebook_dim,
        shared_codebook=theirs.shared_codebook,
        quantize_dropout=theirs.quantize_dropout,
        quantize_dropout_cutoff_index=theirs.quantize_dropout_cutoff_index,
        quantize_dropout_multiple_of=theirs.quantize_dropout_multiple_of,
        accept_image_fmap=theirs.accept_image_fmap,
        quant_grad_frac=theirs.quant_grad_frac,
        return_zeros_for_masked_padding=theirs.return_zeros_for_masked_padding,
    )
    return arguments


def _refuse(theirs: object) -> None:
    for name, off in _UNSUPPORTED.items():
        value = getattr(theirs, name, off)
        if value is not off and value != off:
            raise ValueError(f"source: {name}={value} is not supported")
