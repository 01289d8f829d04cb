"""Drop-in faster PyTorch ops for contrastive, vector-quantised and reparameterised training.

The big matrix (logits, distances, one-hots, noise) is computed tile by tile, used, and never
stored. Every op has the same name in every backend: `tilewise.ops` (what you call),
`tilewise.reference` (plain PyTorch), the C++ extension.
"""

from tilewise import evaluation, nn, reference
from tilewise._backend import backend, backends
from tilewise.ops import (
    clip_loss,
    code_sums,
    gaussian_sample,
    gumbel_argmax,
    gumbel_softmax,
    hard_negatives,
    itc_loss,
    nearest_code,
    prepare_codebook,
    sigmoid_loss,
)

__version__ = "0.1.0"
__all__ = [
    "backend",
    "backends",
    "clip_loss",
    "code_sums",
    "evaluation",
    "gaussian_sample",
    "gumbel_argmax",
    "gumbel_softmax",
    "hard_negatives",
    "itc_loss",
    "nearest_code",
    "nn",
    "prepare_codebook",
    "reference",
    "sigmoid_loss",
]
