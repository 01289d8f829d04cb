"""Quantisers of other packages: converted, trained beside them, and converted back."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tilewise as tw
from benchmarks.baselines import open_clip_loss
from tests.common.quantizer_cases import CLOSE, HEADS, assert_same_step, rows, step


def lucidrains():
    return pytest.importorskip("vector_quantize_pytorch")


LUCIDRAINS = [
    dict(decay=0.9, eps=1e-3, commitment_weight=0.3, rotation_trick=False),
    dict(HEADS, use_cosine_sim=True, separate_codebook_per_head=True),
    dict(codebook_dim=4, channel_last=False),
    dict(accept_image_fmap=True, threshold_ema_dead_code=1e-9, freeze_codebook=True),
]


@pytest.mark.parametrize("settings", LUCIDRAINS, ids=str)
def test_from_and_to_lucidrains(settings):
    theirs = lucidrains().VectorQuantize(16, 32, **settings)
    shape = (2, 16, 5, 5) if "accept_image_fmap" in settings else (2, 16, 16)
    theirs(rows(*shape))  # averages that are not those of a new module
    ours = tw.nn.from_lucidrains(theirs)
    for seed in range(2):
        assert_same_step(ours, theirs, rows(*shape, seed=seed))
    back = lucidrains().VectorQuantize(16, 32, **settings)
    back.load_state_dict(tw.nn.to_lucidrains(ours))
    assert_same_step(ours, back, rows(*shape))
    assert not tw.nn.from_lucidrains(theirs.eval()).training


def test_learnable_codebook_of_lucidrains():
    theirs = lucidrains().VectorQuantize(
        16, 32, learnable_codebook=True, ema_update=False, commitment_weight=0.4
    )
    ours = tw.nn.from_lucidrains(theirs)
    assert_same_step(ours, theirs, rows(50, 16), loss_factor=2.0)
    torch.testing.assert_close(
        ours._codebook.embed.grad, theirs._codebook.embed.grad, **CLOSE
    )


def test_kmeans_is_still_to_come():
    theirs = lucidrains().VectorQuantize(16, 32, kmeans_init=True)
    assert tw.nn.from_lucidrains(theirs)._codebook.needs_init
    assert tw.nn.from_lucidrains(theirs.state_dict())._codebook.needs_init
    theirs(rows(50, 16))
    ours = tw.nn.from_lucidrains(theirs)
    assert not ours._codebook.needs_init
    assert_same_step(ours, theirs, rows(50, 16))


@pytest.mark.parametrize("settings", [
    dict(codebook_dim=5),
    dict(shared_codebook=True, use_cosine_sim=True),
    dict(codebook_size=(8, 16, 4), num_quantizers=None, quant_grad_frac=1.0),
], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_residuals_of_lucidrains(settings, grouped):
    settings = {**dict(dim=16, codebook_size=32, num_quantizers=3), **settings}
    kind = lucidrains().GroupedResidualVQ if grouped else lucidrains().ResidualVQ
    theirs = kind(**settings, **(dict(groups=2) if grouped else {}))
    ours = tw.nn.from_lucidrains(theirs)
    for seed in range(2):
        assert_same_step(ours, theirs, rows(4, 9, 16, seed=seed))
    theirs.load_state_dict(tw.nn.to_lucidrains(ours))


@pytest.mark.parametrize("settings", [
    dict(), dict(codebook_dim=5), dict(HEADS, separate_codebook_per_head=True),
    dict(heads=2, codebook_dim=6),
], ids=str)
def test_state_dicts_of_lucidrains(settings):
    theirs = nn.ModuleDict({"vq": lucidrains().VectorQuantize(16, 32, **settings)})
    ours = tw.nn.from_lucidrains(theirs.state_dict(), prefix="vq.")
    assert_same_step(ours, theirs["vq"], rows(4, 9, 16))
    kinds = lucidrains().ResidualVQ, lucidrains().GroupedResidualVQ
    for kind, more in zip(kinds, (dict(), dict(groups=2)), strict=True):
        theirs = kind(dim=16, codebook_size=(8, 4), codebook_dim=6, quant_grad_frac=1.0, **more)
        ours = tw.nn.from_lucidrains(theirs.state_dict(), quant_grad_frac=1.0)
        assert_same_step(ours, theirs, rows(4, 9, 16))


@pytest.mark.parametrize("settings", [
    dict(affine_param=True),
    dict(codebook_diversity_loss_weight=0.1),
    dict(commitment_use_cross_entropy_loss=True),
    dict(codebook_dim=4, layernorm_after_project_in=True),
    dict(orthogonal_reg_weight=1.0, ema_update=False, learnable_codebook=True),
    dict(stochastic_sample_codes=True),
    dict(sync_update_v=0.5, ema_update=False, learnable_codebook=True),
    dict(route_gradients_to_input=False),
], ids=str)
def test_what_we_lack_is_refused(settings):
    theirs = lucidrains().VectorQuantize(16, 32, **settings)
    with pytest.raises(ValueError, match="source: .* is not supported"):
        tw.nn.from_lucidrains(theirs)


def test_residuals_that_we_lack_are_refused():
    for settings in (dict(beam_size=2), dict(diveq=True), dict(implicit_neural_codebook=True)):
        theirs = lucidrains().ResidualVQ(
            dim=16, codebook_size=32, num_quantizers=2, threshold_ema_dead_code=1, **settings
        )
        with pytest.raises(ValueError, match="source: .* is not supported"):
            tw.nn.from_lucidrains(theirs)


# taming-transformers and diffusers: images in, (quantized, loss, (perplexity, one-hot, index)) out


class Published(nn.Module):
    """What both packages compute, in the state dict's layout and in a few lines."""

    def __init__(self, n_e, e_dim, beta, legacy=True):
        super().__init__()
        self.beta, self.legacy = beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z):
        z = z.movedim(1, -1)
        index = torch.cdist(z.reshape(-1, z.shape[-1]), self.embedding.weight).argmin(1)
        q = self.embedding(index).view(z.shape)
        first, second = F.mse_loss(q.detach(), z), F.mse_loss(q, z.detach())
        loss = first + self.beta * second if self.legacy else self.beta * first + second
        return (z + (q - z).detach()).movedim(-1, 1), loss, (None, None, index)


def published(name, **settings):
    if name == "equation":
        return Published(32, 16, beta=0.25, **settings)
    module, kind = {
        "taming": ("taming.modules.vqvae.quantize", "VectorQuantizer"),
        "diffusers": ("diffusers.models.autoencoders.vae", "VectorQuantizer"),
    }[name]
    if name == "diffusers":
        open_clip_loss()  # makes torchvision importable, which diffusers needs too
    try:
        return getattr(importlib.import_module(module), kind)(32, 16, beta=0.25, **settings)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name, settings", [
    ("equation", dict(legacy=True)),
    ("equation", dict(legacy=False)),
    ("taming", dict()),  # of version 0.0.1: there, legacy is all there is
    ("diffusers", dict()),
    ("diffusers", dict(legacy=True)),
    ("diffusers", dict(legacy=False)),
], ids=str)
def test_from_and_to_taming_and_diffusers(name, settings):
    diffusers = name == "diffusers"
    convert = tw.nn.from_diffusers if diffusers else tw.nn.from_taming
    back = tw.nn.to_diffusers if diffusers else tw.nn.to_taming
    theirs = published(name, **settings)
    nn.init.normal_(theirs.embedding.weight)
    from_state = convert(
        {"quantize." + key: x for key, x in theirs.state_dict().items()},
        prefix="quantize.", beta=0.25, **settings,
    )
    for ours in (convert(theirs), from_state):
        theirs.zero_grad()
        (q, index, loss), grad = step(ours, rows(2, 16, 5, 7))
        x = rows(2, 16, 5, 7).requires_grad_()
        their_q, their_loss, (_, _, their_index) = theirs(x)
        ((their_q * rows(2, 16, 5, 7, seed=9)).sum() + 3.0 * their_loss).backward()
        assert torch.equal(index.flatten(), their_index.flatten())
        for a, b in (
            (q, their_q), (loss, their_loss), (grad, x.grad),
            (ours._codebook.embed.grad[0], theirs.embedding.weight.grad),
        ):
            torch.testing.assert_close(a, b, **CLOSE)
    theirs.load_state_dict(back(ours))


def test_what_taming_lacks_is_refused():
    with pytest.raises(ValueError, match="expected the key embedding.weight alone"):
        tw.nn.from_taming({"embedding.weight": rows(3, 4), "used": rows(3)})
    with pytest.raises(ValueError, match="prefix"):
        tw.nn.from_taming({"embedding.weight": rows(3, 4)}, prefix="quantize.")
    with pytest.raises(ValueError, match="no projections"):
        tw.nn.to_taming(tw.nn.VectorQuantizer(16, 32, codebook_dim=4))
    with pytest.raises(ValueError, match="expected a quantiser"):
        tw.nn.from_lucidrains(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="source: expected the key"):
        tw.nn.from_lucidrains({"weight": rows(3)})


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
