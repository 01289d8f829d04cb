"""The distributions whose expectations are differentiated."""

from typing import NamedTuple

from torch import Tensor


class Categorical(NamedTuple):
    """Independent categories, each one of K, with the probabilities softmax(logits).

    logits: (B, ..., K), float16, bfloat16, float32 or float64; -inf masks a category. The first
    dimension counts rows, each with an expectation of its own; those between are independent
    variables of a row. A sample is one-hot: (B, ..., K).
    """

    logits: Tensor


class Gaussian(NamedTuple):
    """Independent normal variables, N(mean, exp(logvar)).

    mean: (B, ...), float16, bfloat16, float32 or float64; the first dimension counts rows.
    logvar: of the variance; same dtype, a shape that broadcasts with mean's.
    """

    mean: Tensor
    logvar: Tensor


Distribution = Categorical | Gaussian
