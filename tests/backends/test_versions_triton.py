"""What depends on the GPU and on the versions of torch and Triton, with these pretended."""

from types import SimpleNamespace

import pytest
import torch

from tests.backends.contrast_adapters import CONTRASTS
from tilewise import _backend
from tilewise.kernels import _common, _contrast_tiles, nearest_code

FEATURES = torch.zeros(16, 32)
descriptors_round = pytest.mark.skipif(
    not _common.DESCRIPTORS_ROUND, reason="Triton's descriptors round from 3.7 on"
)


class OldDescriptor:
    """Triton's before 3.7."""

    @staticmethod
    def from_tensor(tensor, block_shape, padding="zero"):
        return tuple(block_shape)


def test_descriptors_of_older_triton(monkeypatch):
    monkeypatch.setattr(_common, "TensorDescriptor", OldDescriptor)
    monkeypatch.setattr(_common, "DESCRIPTORS_ROUND", False)
    for arch in ("sm_90", "sm_100", "sm_120"):
        for kind, dtype in (("half", torch.bfloat16), ("tf32", torch.float32)):
            tile = _common.choose_tile(
                _contrast_tiles.TILES, _contrast_tiles.DEFAULT_TILES, arch, kind
            )
            source = _common.source(FEATURES.to(dtype), tile.rows, tile, kind)
            # Without a descriptor that rounds, the kernel does.
            assert source == (tile.rows, tile.depth) if tile.tma else kind == "tf32"


@descriptors_round
def test_descriptors_round_float32_for_matrix_units_alone():
    tile = _contrast_tiles.TILES["sm_90", "tf32"]
    assert _common.source(FEATURES, 16, tile, "tf32").round_f32_to_tf32
    assert not _common.source(FEATURES.half(), 16, tile, "half").round_f32_to_tf32


class OnGpu(SimpleNamespace):
    is_cuda, dtype = True, torch.bfloat16


@pytest.mark.parametrize("adds", [True, False], ids=["torch 2.10", "torch 2.9"])
@pytest.mark.parametrize("accumulate", [True, False])
def test_products_of_half_precision_are_added_in_float32(monkeypatch, adds, accumulate):
    calls = []

    def product(name, result):
        def call(*arguments, out=None, out_dtype=None):
            calls.append((name, out is not None, out_dtype))
            return result

        return call

    monkeypatch.setattr(_common, "ADDS_TO_FLOAT32", adds)
    monkeypatch.setattr(torch, "mm", product("mm", torch.ones(2, 2)))
    monkeypatch.setattr(torch, "addmm", product("addmm", None))
    out = torch.ones(2, 2)
    _common.add_product(out, OnGpu(), OnGpu(), accumulate)
    separate = accumulate and not adds
    name = "addmm" if accumulate and adds else "mm"
    assert calls == [(name, not separate, torch.float32)]
    assert (out == (2 if separate else 1)).all()


@pytest.mark.parametrize("module, value, kind", [
    (torch.backends, "tf32", "tf32"),
    (torch.backends.cuda.matmul, "tf32", "tf32"),
    (torch.backends.mkldnn.matmul, "bf16", "ieee"),
], ids=["all", "cuda", "mkldnn"])
def test_precision_by_the_newer_settings(module, value, kind):
    modules = torch.backends.cuda.matmul, module
    before = [x.fp32_precision for x in modules]
    try:
        modules[0].fp32_precision = "none"  # else what was set for CUDA comes before what all have
        module.fp32_precision = value
        assert _common.product_kind(torch.float32, "sm_90") == kind
        # The library's products have the same precision.
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == (kind == "tf32")
    finally:
        for x, precision in zip(modules, before, strict=True):
            x.fp32_precision = precision


def test_relatives_of_an_architecture_have_its_tiles():
    for arch, relative in (("sm_103", "sm_100"), ("sm_121", "sm_120"), ("gfx950", "gfx942")):
        one, other = (
            _common.choose_tile(_contrast_tiles.TILES, _contrast_tiles.DEFAULT_TILES, x, "half")
            for x in (arch, relative)
        )
        assert one is other is _contrast_tiles.TILES[relative, "half"]


@descriptors_round
@pytest.mark.parametrize("name", ["sigmoid_loss", "clip_loss"])
def test_tf32_rounds_with_and_without_descriptors(monkeypatch, name):
    contrast = CONTRASTS[name]
    problem = contrast.make(40, 40, 32)
    tensors = contrast.tensors(problem, torch.float32)
    tensors = {key: 1.7 * x for key, x in tensors.items()}
    results = []
    for tma in (True, False):
        tile = contrast.kernels.TILES["interpreter", "tf32"]._replace(tma=tma)
        monkeypatch.setitem(contrast.kernels.TILES, ("interpreter", "tf32"), tile)
        monkeypatch.setattr(_common, "product_kind", lambda dtype, arch: "tf32")
        results.append(contrast.run(problem, tensors))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("capability, serves", [((7, 0), False), ((7, 5), False), ((8, 0), True)])
def test_gpus_that_are_too_old(monkeypatch, capability, serves):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    _backend._lacks.cache_clear()
    reason = _backend.why_not("triton", torch.device("cuda", 3))
    _backend._lacks.cache_clear()
    number = ".".join(map(str, capability))
    expected = f"Tesla T4 has compute capability {number}, it needs 8.0"
    assert reason == (None if serves else expected)


def test_choice_by_age_is_traced(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")

    def choose(x):
        return x + 1 if _backend.why_not("triton", torch.device("cuda", 5)) else x

    torch._dynamo.reset()
    assert torch.compile(choose, fullgraph=True, backend="eager")(torch.ones(())) == 2
    _backend._lacks.cache_clear()


@pytest.mark.parametrize("small", [0, 2**30], ids=["filter", "brute"])
def test_more_heads_than_a_grid_holds(monkeypatch, small):
    monkeypatch.setitem(nearest_code.SMALL, "interpreter", small)
    x, codebook = torch.randn(5, 3, 8), torch.randn(5, 9, 8)
    mask = torch.arange(15).view(5, 3) % 4 > 0
    expected = nearest_code.nearest_code(x, codebook, "cosine", 2, mask, None)
    monkeypatch.setattr(nearest_code, "MAX_HEADS", 2)
    found = nearest_code.nearest_code(x, codebook, "cosine", 2, mask, None)
    assert all(map(torch.equal, found, expected))
