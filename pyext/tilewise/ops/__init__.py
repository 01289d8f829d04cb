"""The public functions, one file per op."""

from tilewise.ops.sigmoid_loss import sigmoid_loss

__all__ = ["sigmoid_loss"]
