"""The public functions, one file per op."""

from tilewise.ops.code_sums import code_sums
from tilewise.ops.nearest_code import PreparedCodebook, nearest_code, prepare_codebook
from tilewise.ops.sigmoid_loss import sigmoid_loss

__all__ = ["PreparedCodebook", "code_sums", "nearest_code", "prepare_codebook", "sigmoid_loss"]
