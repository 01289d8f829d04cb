"""What the gradient formulas of quantisers do not support."""

import torch


def refuse_second_derivative() -> None:
    """For backward passes that write in place; `once_differentiable` would let some calls pass."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "tilewise's quantisers have no second derivative: the gradient of a chosen code is an "
            "estimate, not a function to differentiate (create_graph=True)"
        )


def in_functorch() -> bool:
    """Whether a torch.func transform is at work, which needs formulas of differentiable ops."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None
