"""The public functions, one file per op."""

from tilewise.ops.clip_loss import clip_loss
from tilewise.ops.code_sums import code_sums
from tilewise.ops.gaussian_sample import gaussian_sample
from tilewise.ops.gumbel_argmax import gumbel_argmax
from tilewise.ops.gumbel_softmax import gumbel_softmax
from tilewise.ops.hard_negatives import hard_negatives
from tilewise.ops.itc_loss import itc_loss
from tilewise.ops.nearest_code import PreparedCodebook, nearest_code, prepare_codebook
from tilewise.ops.sigmoid_loss import sigmoid_loss

__all__ = [
    "PreparedCodebook", "clip_loss", "code_sums", "gaussian_sample", "gumbel_argmax",
    "gumbel_softmax", "hard_negatives", "itc_loss", "nearest_code", "prepare_codebook",
    "sigmoid_loss",
]
