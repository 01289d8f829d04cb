"""Drop-in faster PyTorch ops for contrastive, vector-quantised and reparameterised training.

The big matrix (logits, distances, one-hots, noise) is computed tile by tile, used, and never
stored. Every op has the same name in every backend: `tilewise.ops` (what you call),
`tilewise.reference` (plain PyTorch), the C++ extension, `tilewise.kernels` (Triton).
"""

from tilewise import distributed as distributed
from tilewise import estimators as estimators
from tilewise import evaluation as evaluation
from tilewise import nn as nn
from tilewise import reference as reference
from tilewise import smooth as smooth
from tilewise._backend import backend as backend
from tilewise._backend import backends as backends
from tilewise.ops import *  # noqa: F403  # each function that it names
from tilewise.receptive_field import receptive_field as receptive_field

__version__ = "0.1.0"
