"""Modules with the constructors and calls of the packages that they replace."""

from tilewise.nn.convert.blip import from_blip
from tilewise.nn.convert.diffusers import from_diffusers, to_diffusers
from tilewise.nn.convert.lucidrains import from_lucidrains, to_lucidrains
from tilewise.nn.convert.taming import from_taming, to_taming
from tilewise.nn.losses.clip_loss import ClipLoss
from tilewise.nn.losses.itc_loss import ItcLoss
from tilewise.nn.losses.momentum import momentum_update
from tilewise.nn.losses.sigmoid_loss import SigLipLoss
from tilewise.nn.quantizers.grouped_residual_vector_quantizer import (
    GroupedResidualVectorQuantizer,
)
from tilewise.nn.quantizers.gumbel_quantizer import GumbelQuantizer
from tilewise.nn.quantizers.residual_vector_quantizer import ResidualVectorQuantizer
from tilewise.nn.quantizers.vector_quantizer import CodeUsage, VectorQuantizer
from tilewise.nn.sampling.diagonal_gaussian import DiagonalGaussian
from tilewise.nn.sampling.gumbel_softmax import (
    CosineSchedule,
    ExponentialSchedule,
    GumbelSoftmax,
    LinearSchedule,
)

__all__ = [
    "ClipLoss",
    "CodeUsage",
    "CosineSchedule",
    "DiagonalGaussian",
    "ExponentialSchedule",
    "GroupedResidualVectorQuantizer",
    "GumbelQuantizer",
    "GumbelSoftmax",
    "ItcLoss",
    "LinearSchedule",
    "ResidualVectorQuantizer",
    "SigLipLoss",
    "VectorQuantizer",
    "from_blip",
    "from_diffusers",
    "from_lucidrains",
    "from_taming",
    "momentum_update",
    "to_diffusers",
    "to_lucidrains",
    "to_taming",
]
