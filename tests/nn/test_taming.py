"""taming-transformers' quantisers: converted and converted back (Gumbel: test_gumbel_quantizer)."""

import pytest
import torch
from torch import nn

import tilewise as tw
from tests.common.quantizer_cases import rows
from tests.common.taming_cases import assert_converts


@pytest.mark.parametrize("name, settings", [
    ("equation", dict(legacy=True)),
    ("equation", dict(legacy=False)),
    ("taming", dict()),  # of version 0.0.1: there, legacy is all there is
], ids=str)
def test_from_and_to_taming(name, settings):
    assert_converts(name, tw.nn.from_taming, tw.nn.to_taming, **settings)


def test_what_taming_lacks_is_refused():
    with pytest.raises(ValueError, match="expected the key embedding.weight alone"):
        tw.nn.from_taming({"embedding.weight": rows(3, 4), "used": rows(3)})
    with pytest.raises(ValueError, match="prefix"):
        tw.nn.from_taming({"embedding.weight": rows(3, 4)}, prefix="quantize.")
    with pytest.raises(ValueError, match="no projections"):
        tw.nn.to_taming(tw.nn.VectorQuantizer(16, 32, codebook_dim=4))


def test_conversion_copies():
    embed = rows(32, 16)
    ours = tw.nn.from_taming({"embedding.weight": embed})
    before = embed.clone()
    with torch.no_grad():
        ours._codebook.embed.zero_()
    assert torch.equal(embed, before)
    ours = tw.nn.from_taming({"embedding.weight": embed}, rotation_trick=True, ema_update=True,
                             learnable_codebook=False)
    assert ours.rotation_trick and not isinstance(ours._codebook.embed, nn.Parameter)
    assert torch.equal(ours._codebook.embed_avg[0], embed)  # where its averages begin


def test_modules_on_meta():
    with torch.device("meta"):
        gumbel = nn.ModuleDict(dict(proj=nn.Conv2d(16, 32, 1), embed=nn.Embedding(32, 8)))
        state = {"embedding.weight": torch.empty(32, 16)}
    for ours in (tw.nn.from_taming(gumbel), tw.nn.from_taming(state)):
        assert all(x.is_meta for x in ours.state_dict().values())
