"""The same functions in plain PyTorch: float64 inside, any device, the whole matrix in memory.

They define what the kernels must return, and can be differentiated any number of times.
"""

from tilewise.reference.clip_loss import clip_loss as clip_loss
from tilewise.reference.code_sums import code_sums as code_sums
from tilewise.reference.gaussian_sample import gaussian_sample as gaussian_sample
from tilewise.reference.gumbel_argmax import gumbel_argmax as gumbel_argmax
from tilewise.reference.gumbel_softmax import gumbel_softmax as gumbel_softmax
from tilewise.reference.hard_negatives import hard_negatives as hard_negatives
from tilewise.reference.info_nce import info_nce as info_nce
from tilewise.reference.itc_loss import itc_loss as itc_loss
from tilewise.reference.nearest_code import nearest_code as nearest_code
from tilewise.reference.sigmoid_loss import sigmoid_loss as sigmoid_loss
