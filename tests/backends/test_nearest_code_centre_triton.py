"""The centre that the Triton backend of nearest_code rounds codebooks around."""

import pytest
import torch

from tests.triton_tools import interpreter  # noqa: F401  (its corrections)
from tilewise.kernels import nearest_code as kernels


@pytest.mark.parametrize("codes", [1, 2, 125, 126, 300])
def test_centre_is_the_median_of_a_sample(codes):
    """Of elements of either sign, and of what is not finite as of 0."""
    codebook = torch.randn(2, codes, 19)
    codebook[0, :, 3], codebook[1, 0, 4] = -3e38, float("nan")
    sample = codebook[:, :: max(codes // 63, 1)].nan_to_num()
    middle = sample.sort(1).values[:, sample.shape[1] // 2]
    assert torch.equal(kernels.centre_of(codebook, "l2"), middle)
    unit = torch.nn.functional.normalize(codebook[1:, :: max(codes // 63, 1), :3], dim=2)
    middle = unit.sort(1).values[:, unit.shape[1] // 2]
    torch.testing.assert_close(kernels.centre_of(codebook[1:, :, :3], "cosine"), middle)
