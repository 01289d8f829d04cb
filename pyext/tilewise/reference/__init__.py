"""The same functions in plain PyTorch: float64 inside, any device, the whole matrix in memory.

They define what the kernels must return, and can be differentiated any number of times.
"""

from tilewise.reference.code_sums import code_sums
from tilewise.reference.nearest_code import nearest_code
from tilewise.reference.sigmoid_loss import sigmoid_loss

__all__ = ["code_sums", "nearest_code", "sigmoid_loss"]
