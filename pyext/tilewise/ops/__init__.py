"""The public functions, one file per op."""

from tilewise.ops.clip_loss import clip_loss as clip_loss
from tilewise.ops.code_sums import CodeSums as CodeSums
from tilewise.ops.code_sums import code_sums as code_sums
from tilewise.ops.gaussian_sample import GaussianSample as GaussianSample
from tilewise.ops.gaussian_sample import gaussian_sample as gaussian_sample
from tilewise.ops.gumbel_argmax import GumbelArgmax as GumbelArgmax
from tilewise.ops.gumbel_argmax import gumbel_argmax as gumbel_argmax
from tilewise.ops.gumbel_softmax import gumbel_softmax as gumbel_softmax
from tilewise.ops.hard_negatives import HardNegatives as HardNegatives
from tilewise.ops.hard_negatives import hard_negatives as hard_negatives
from tilewise.ops.info_nce import info_nce as info_nce
from tilewise.ops.itc_loss import itc_loss as itc_loss
from tilewise.ops.nearest_code import NearestCode as NearestCode
from tilewise.ops.nearest_code import PreparedCodebook as PreparedCodebook
from tilewise.ops.nearest_code import nearest_code as nearest_code
from tilewise.ops.nearest_code import prepare_codebook as prepare_codebook
from tilewise.ops.sigmoid_loss import sigmoid_loss as sigmoid_loss
