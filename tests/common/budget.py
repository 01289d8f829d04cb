"""The error budget: our error against float64 may not exceed that of the eager op, plus rounding.

Errors are relative to a magnitude that the test states for each output, because a sum that cancels
to nothing still carries the rounding of its terms.
"""

import torch
from torch import Tensor

# What the result's own rounding may add to the eager op's error, in units of its dtype's epsilon.
ROUNDINGS = {torch.float64: 16.0, torch.float32: 4.0, torch.bfloat16: 0.5, torch.float16: 0.5}


def error(value: Tensor, truth: Tensor, magnitude: float) -> float:
    """Largest deviation from the truth, relative to `magnitude`."""
    if truth.numel() == 0:
        return 0.0
    # Below this the kernels' arithmetic has no full precision: denormals count as zero.
    computed = torch.finfo(torch.float64 if value.dtype == torch.float64 else torch.float32)
    smallest = computed.tiny / computed.eps
    return float((value.double() - truth).abs().max()) / max(magnitude, smallest)


def assert_within_budget(
    ours: dict[str, Tensor],
    eager: dict[str, Tensor],
    truth: dict[str, Tensor],
    magnitude: dict[str, float],
) -> None:
    """Compares output by output; NaN must stand where the truth has NaN, and nowhere else."""
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        value = ours[name]
        assert value.shape == exact.shape, f"{name}: {value.shape}, expected {exact.shape}"
        if exact.isnan().any():
            assert torch.equal(value.isnan(), exact.isnan()), f"{name}: NaN in other places"
            continue
        mine = error(value, exact, magnitude[name])
        theirs = error(eager[name], exact, magnitude[name])
        if not theirs < float("inf"):  # where eager overflows, ours must still be right
            theirs = 0.0
        limit = theirs + ROUNDINGS[value.dtype] * torch.finfo(value.dtype).eps
        assert mine <= limit, f"{name}: error {mine:.2e}, eager {theirs:.2e}, limit {limit:.2e}"
