"""What groups add to ResidualVectorQuantizer, whose tests run over both."""

import pytest
import torch

from tests.common.quantizer_cases import LAYERS, assert_trains_alike, grouped, rows


@pytest.mark.parametrize("settings", [dict(), dict(rotation_trick=False, codebook_dim=6)], ids=str)
def test_groups_equal_lucidrains(settings):
    peer = pytest.importorskip("vector_quantize_pytorch")
    ours = grouped(**settings)
    theirs = peer.GroupedResidualVQ(
        dim=16, groups=2, codebook_size=32, num_quantizers=LAYERS, **settings
    )
    x = assert_trains_alike(ours, theirs, steps=2)
    assert ours.codebooks.shape == theirs.codebooks.shape
    _, index, _ = grouped(quantize_dropout=True)(x)
    assert torch.equal(*(index >= 0))  # both groups keep the same layers


def test_bad_arguments():
    with pytest.raises(ValueError, match="groups: expected a divisor of dim=16, got 3"):
        grouped(groups=3)
    with pytest.raises(ValueError, match=r"x: expected \(..., 16\), got \(2, 8\)"):
        grouped()(rows(2, 8))
    with pytest.raises(ValueError, match="indices: expected 2 groups first"):
        grouped().get_codes_from_indices(torch.zeros(3, 5, 4).long())
