"""State that `.half()` and its like must not round."""

from collections.abc import Callable

from torch import Tensor


def without_halving(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """For `Module._apply`: what fn does, but where that is half precision, only move."""

    def apply(x: Tensor) -> Tensor:
        y = fn(x)
        half = y.is_floating_point() and y.element_size() < 4
        return x.to(y.device) if half else y

    return apply
