"""Modules with the constructors and calls of the packages that they replace."""

from tilewise.nn.convert.blip import from_blip as from_blip
from tilewise.nn.convert.diffusers import from_diffusers as from_diffusers
from tilewise.nn.convert.diffusers import to_diffusers as to_diffusers
from tilewise.nn.convert.lucidrains import from_lucidrains as from_lucidrains
from tilewise.nn.convert.lucidrains import to_lucidrains as to_lucidrains
from tilewise.nn.convert.taming import from_taming as from_taming
from tilewise.nn.convert.taming import to_taming as to_taming
from tilewise.nn.losses.clip_loss import ClipLoss as ClipLoss
from tilewise.nn.losses.grad_cache import grad_cache as grad_cache
from tilewise.nn.losses.info_nce import InfoNCELoss as InfoNCELoss
from tilewise.nn.losses.itc_loss import ItcLoss as ItcLoss
from tilewise.nn.losses.momentum import momentum_update as momentum_update
from tilewise.nn.losses.sigmoid_loss import SigLipLoss as SigLipLoss
from tilewise.nn.quantizers.grouped_residual_vector_quantizer import (
    GroupedResidualVectorQuantizer as GroupedResidualVectorQuantizer,
)
from tilewise.nn.quantizers.gumbel_quantizer import GumbelQuantizer as GumbelQuantizer
from tilewise.nn.quantizers.residual_vector_quantizer import (
    ResidualVectorQuantizer as ResidualVectorQuantizer,
)
from tilewise.nn.quantizers.vector_quantizer import CodeUsage as CodeUsage
from tilewise.nn.quantizers.vector_quantizer import VectorQuantizer as VectorQuantizer
from tilewise.nn.sampling.diagonal_gaussian import DiagonalGaussian as DiagonalGaussian
from tilewise.nn.sampling.gumbel_softmax import CosineSchedule as CosineSchedule
from tilewise.nn.sampling.gumbel_softmax import ExponentialSchedule as ExponentialSchedule
from tilewise.nn.sampling.gumbel_softmax import GumbelSoftmax as GumbelSoftmax
from tilewise.nn.sampling.gumbel_softmax import LinearSchedule as LinearSchedule

__all__ = sorted(
    name for name, value in globals().items()
    if getattr(value, "__module__", "").startswith("tilewise.nn.")
)
