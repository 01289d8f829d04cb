"""Quantisers of vector_quantize_pytorch and of EnCodec as ours, and our state dicts as theirs."""

from typing import Any

from torch import Tensor, nn

from tilewise.nn.convert._state import StateDict, build, some, state_of
from tilewise.nn.quantizers.grouped_residual_vector_quantizer import (
    GroupedResidualVectorQuantizer,
)
from tilewise.nn.quantizers.residual_vector_quantizer import ResidualVectorQuantizer
from tilewise.nn.quantizers.vector_quantizer import VectorQuantizer

Quantizer = VectorQuantizer | ResidualVectorQuantizer | GroupedResidualVectorQuantizer

_EMBED = "_codebook.embed"

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
        source: a `VectorQuantize`, `ResidualVQ` or `GroupedResidualVQ`; or a state dict with one,
            also of an older release, or of EnCodec (prefix "quantizer.vq."; in transformers
            "quantizer."), which began as a copy of it.
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
    state = _today(state_of(source, prefix))
    kind, arguments = _read_state(state)
    if isinstance(source, nn.Module):
        arguments = {**arguments, **_read_module(source)}
    return build(kind, {**arguments, **settings}, state, source)


def to_lucidrains(module: Quantizer) -> dict[str, Tensor]:
    """A state dict that the module of vector_quantize_pytorch with the same arguments loads."""
    return dict(module.state_dict())


def _read_state(state: StateDict) -> tuple[type, dict[str, Any]]:
    """Our class and its arguments, as far as shapes tell them."""
    if any(key.endswith("in_proj.weight_g") for key in state):
        raise ValueError(
            "source: DAC's quantisers, which project in each layer, are not supported; found "
            + some(state)
        )
    if "rvqs.0.layers.0._codebook.embed" in state:
        _, arguments = _read_state(state_of(state, "rvqs.0."))
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
            kmeans_init=_is_to_come(state["layers.0._codebook.initted"]),
        )
    if _EMBED not in state:
        raise ValueError(f"source: expected the key {_EMBED}, got {some(state)}")
    h, k, d = state[_EMBED].shape
    weight = state.get("project_in.weight")
    return VectorQuantizer, dict(
        dim=_outer(state, h * d),
        codebook_size=k,
        codebook_dim=d,
        heads=h if weight is None else weight.shape[0] // d,
        separate_codebook_per_head=h > 1,
        kmeans_init=_is_to_come(state["_codebook.initted"]),
    )


def _today(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys and shapes of today's release, from those of older ones and of EnCodec."""
    result = {}
    for key, value in state.items():
        key = key.replace(".codebook.", "._codebook.")  # transformers' EnCodec
        if "_codebook." in key:
            key = key.removesuffix("inited") + "initted" if key.endswith(".inited") else key
            dims = {"initted": 0, "cluster_size": 2, "embed": 3, "embed_avg": 3}
            dim = dims.get(key.rpartition(".")[2], value.dim())
            value = value.reshape(()) if dim == 0 else value
            value = value.unsqueeze(0) if value.dim() == dim - 1 else value
        result[key] = value
    return result


def _is_to_come(initted: Tensor) -> bool:
    return not (initted.is_meta or bool(initted))


def _outer(state: StateDict, inner: int) -> int:
    """Channels of the input, before a projection."""
    weight = state.get("project_in.weight")
    return inner if weight is None else weight.shape[1]


def _count(state: StateDict, key: str) -> int:
    number = 0
    while key.format(number) in state:
        number += 1
    return number


# Arguments of our constructor that are attributes of theirs, of the quantiser and of its codebook;
# older releases and EnCodec lack some.
_OF_QUANTIZER = (
    "dim", "codebook_size", "heads", "separate_codebook_per_head", "freeze_codebook",
    "use_cosine_sim", "channel_last", "accept_image_fmap", "accept_3d_fmap", "commitment_weight",
    "learnable_codebook", "return_zeros_for_masked_padding",
)
_OF_CODEBOOK = ("decay", "eps", "kmeans_iters", "threshold_ema_dead_code", "ema_update")
_OF_RESIDUAL = (
    "codebook_dim", "shared_codebook", "quantize_dropout", "quantize_dropout_cutoff_index",
    "quantize_dropout_multiple_of", "accept_image_fmap", "quant_grad_frac",
    "return_zeros_for_masked_padding",
)


def _read_module(source: nn.Module) -> dict[str, Any]:
    """Arguments of our class from their module."""
    _refuse(source)
    theirs: Any = source
    if hasattr(source, "rvqs"):
        return {**_read_module(theirs.rvqs[0]), "dim": theirs.dim, "groups": theirs.groups}
    if hasattr(source, "layers"):
        return _read_residual(theirs)
    return _read_quantizer(theirs)


def _read_quantizer(theirs: Any) -> dict[str, Any]:
    book = theirs._codebook
    _refuse(theirs)
    _refuse(book)
    if isinstance(theirs.project_in, nn.Sequential):
        raise ValueError("source: layernorm_after_project_in is not supported")
    if getattr(getattr(book, "gumbel_sample", None), "keywords", {}).get("stochastic"):
        raise ValueError("source: stochastic_sample_codes is not supported")
    arguments = {**_present(theirs, _OF_QUANTIZER), **_present(book, _OF_CODEBOOK)}
    arguments["rotation_trick"] = getattr(theirs, "rotation_trick", False)
    if "commitment_weight" in arguments:
        arguments["codebook_weight"] = arguments["commitment_weight"]
    return arguments


def _read_residual(theirs: Any) -> dict[str, Any]:
    layer = theirs.layers[0]
    arguments = _read_quantizer(layer)
    if getattr(layer._codebook, "manual_ema_update", False) and not theirs.shared_codebook:
        raise ValueError("source: manual_ema_update is not supported")
    for name in ("dim", "codebook_size", "heads", "separate_codebook_per_head"):
        arguments.pop(name, None)  # a layer's; the state dict says the sizes
    return {**arguments, **_present(theirs, _OF_RESIDUAL)}


def _present(theirs: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(theirs, name) for name in names if hasattr(theirs, name)}


def _refuse(theirs: object) -> None:
    for name, off in _UNSUPPORTED.items():
        value = getattr(theirs, name, off)
        if value is not off and value != off:
            raise ValueError(f"source: {name}={value} is not supported")
