"""lucidrains' quantisers, and EnCodec's: converted, trained beside them, and converted back."""

import pytest
import torch
from torch import nn

import tilewise as tw
from tests.common.quantizer_cases import CLOSE, HEADS, assert_same_step, rows


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


def older(codes=(1, 16, 8), flag="initted", shape=(1,)):
    """A codebook as older releases, or EnCodec, save it."""
    embed = rows(*codes)
    return {flag: torch.ones(shape), "cluster_size": torch.ones(codes[:-1]),
            "embed_avg": embed.clone(), "embed": embed}


@pytest.mark.parametrize("book", [older(), older(shape=()), older((16, 8)),
                                  older((16, 8), "inited")], ids=lambda book: str([*book][0]))
def test_older_checkpoints(book):
    """`initted` was a float of shape (1,), codes once had no dimension of heads."""
    state = {f"_codebook.{key}": x for key, x in book.items()}
    loaded = tw.nn.VectorQuantizer(8, 16, kmeans_init=True)
    loaded.load_state_dict(state)
    for ours in (tw.nn.from_lucidrains(state), loaded):
        assert torch.equal(ours.codebook, book["embed"].view(16, 8))
        assert not ours._codebook.needs_init


@pytest.mark.parametrize("prefix, name", [
    ("quantizer.vq.", "_codebook"), ("quantizer.", "codebook"),  # its own, and transformers'
])
def test_encodec(prefix, name):
    book = older((16, 8), "inited")
    state = {f"{prefix}layers.{i}.{name}.{key}": x for i in range(2) for key, x in book.items()}
    ours = tw.nn.from_lucidrains(state, prefix=prefix, decay=0.99)
    assert torch.equal(ours.codebooks, rows(16, 8).expand(2, 16, 8))
    x, total = rows(5, 8), torch.zeros(5, 8)
    quantized, index, _ = ours.eval()(x)
    for layer in range(2):
        chosen = torch.cdist(x - total, rows(16, 8)).argmin(1)
        assert torch.equal(index[:, layer], chosen)
        total += rows(16, 8)[chosen]
    torch.testing.assert_close(quantized, total)


def test_what_is_not_lucidrains_is_named():
    dac = {"quantizers.0.in_proj.weight_g": rows(2), "quantizers.0.codebook.weight": rows(3, 2)}
    with pytest.raises(ValueError, match="DAC"):
        tw.nn.from_lucidrains(dac)
    with pytest.raises(ValueError, match="source: expected the key _codebook.embed, got .*weight"):
        tw.nn.from_lucidrains(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="source: expected the key"):
        tw.nn.from_lucidrains({f"weight{i}": rows(3) for i in range(99)})
    with pytest.raises(TypeError, match="source: expected a module or a state dict, got int"):
        tw.nn.from_lucidrains(3)


def test_modules_on_meta():
    peer = lucidrains()
    with torch.device("meta"):
        sources = (
            peer.VectorQuantize(16, 32, codebook_dim=4, kmeans_init=True),
            peer.ResidualVQ(dim=16, codebook_size=32, num_quantizers=2),
        )
    for theirs in sources:
        ours = tw.nn.from_lucidrains(theirs)
        assert all(x.is_meta for x in ours.state_dict().values())
        assert {k: x.shape for k, x in ours.state_dict().items()} == {
            k: x.shape for k, x in theirs.state_dict().items()
        }
