"""Modules with the constructors and calls of the packages that they replace."""

from tilewise.nn.sigmoid_loss import SigLipLoss

__all__ = ["SigLipLoss"]
