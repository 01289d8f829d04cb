"""All quantisers as training uses them: dtypes, in-place decoders, torch.func, arguments."""

import copy

import pytest
import torch
import torch.nn.functional as F

import tilewise as tw
from tests.common.contrastive_cases import DEVICE
from tests.common.quantizer_cases import (
    CLOSE,
    assert_same_state,
    assert_same_step,
    grouped,
    quantizer,
    residual,
    rows,
)
from tilewise import _backend
from tilewise.nn.quantizers._sampling import Wanted, sample_rows


def gumbel(**settings):
    torch.manual_seed(0)
    return tw.nn.GumbelQuantizer(16, 32, **settings)


MAKE = {
    "plain": quantizer,
    "straight-through": lambda **more: quantizer(rotation_trick=False, **more),
    "projected": lambda **more: quantizer(codebook_dim=8, **more),
    "cosine": lambda **more: quantizer(codebook_dim=8, use_cosine_sim=True, **more),
    "heads": lambda **more: quantizer(
        codebook_dim=4, heads=2, separate_codebook_per_head=True, **more
    ),
    "learnable": lambda **more: quantizer(codebook_dim=8, learnable_codebook=True, **more),
    "residual": residual,
    "residual cosine": lambda **more: residual(codebook_dim=8, use_cosine_sim=True, **more),
    "grouped": lambda **more: grouped(codebook_dim=4, **more),
    "gumbel": gumbel,
    "soft gumbel": lambda **more: gumbel(straight_through=False, **more),
}
every_quantizer = pytest.mark.parametrize("name", MAKE)


def train(module, x):
    """quantized and loss of one step, and the gradient of x."""
    x = x.clone().requires_grad_()
    quantized, _, loss, *_ = module(x)
    (quantized.float().square().mean() + loss.sum()).backward()
    return quantized, loss, x.grad


# Dtypes


@every_quantizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_of_another_dtype(name, dtype):
    module, x = MAKE[name]().to(dtype), rows(2, 5, 16).to(dtype)
    quantized, loss, grad = train(module, x)
    assert quantized.dtype == grad.dtype == dtype and grad.isfinite().all()
    assert loss.dtype == torch.promote_types(dtype, torch.float32) or dtype == torch.float64
    quantized, index, *_ = module.eval()(x)
    decoded = module.get_output_from_indices(index)
    assert module.get_codes_from_indices(index).dtype == decoded.dtype == dtype
    torch.testing.assert_close(decoded, quantized, **CLOSE)


@every_quantizer
def test_half_precision_input_of_a_float32_module(name):
    module, x = MAKE[name](), rows(2, 5, 16).bfloat16()
    quantized, loss, grad = train(module, x)
    assert quantized.dtype == grad.dtype == torch.bfloat16 and loss.dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):
        index = module(x)[1]
        assert module.get_output_from_indices(index).shape == x.shape
        quantized, loss, grad = train(module, x.float())
    assert quantized.dtype == grad.dtype == loss.dtype == torch.float32


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("settings", [
    dict(), dict(use_cosine_sim=True), dict(learnable_codebook=True), dict(codebook_dim=8),
], ids=str)
def test_default_dtype(default, settings):
    """transformers and DeepSpeed make modules under a default of half precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        module = quantizer(**settings)
    finally:
        torch.set_default_dtype(before)
    book = module._codebook
    precise = torch.promote_types(default, torch.float32)
    assert {x.dtype for x in (book.embed, book.embed_avg, book.cluster_size)} == {precise}
    assert book.initted.dtype == torch.float32
    quantized, _, grad = train(module, rows(2, 5, 16).to(default))
    assert quantized.dtype == grad.dtype == default
    indices = torch.zeros(3, dtype=torch.int64)
    assert module.get_output_from_indices(indices).dtype == default


# Results that are changed in place


@every_quantizer
@pytest.mark.parametrize("n", [3, 70])  # fewer and more rows than codes
def test_results_may_be_changed_in_place(name, n):
    """A decoder begins with ReLU(inplace=True); indices get an offset beside other tokens."""
    results = []
    for inplace in (True, False):
        module, x = MAKE[name](), rows(2, n, 16).requires_grad_()
        torch.manual_seed(1)
        quantized, index, loss, *_ = module(x * 1.0, rows(2, n) > -1)
        hidden = F.relu(quantized, inplace=inplace)
        index.add_(7 * inplace)
        ((hidden * rows(2, n, 16, seed=9)).sum() + loss.sum()).backward()
        results.append([x.grad, *(p.grad for p in module.parameters())])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_results_are_not_copied_for_the_backward_pass():
    module, x = quantizer(), rows(70, 16).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quantized = module(x)[0]
    assert quantized.data_ptr() in {t.data_ptr() for t in saved}


# torch.func


@pytest.mark.parametrize("name", [*MAKE][:-1])  # hard in evaluation
@pytest.mark.parametrize("masked", [False, True])
def test_torch_func_of_the_reference(name, masked):
    module, x = MAKE[name]().eval(), rows(3, 5, 16)
    mask = rows(3, 5) > 0 if masked else None

    def total(x):
        quantized, _, loss, *_ = module(x, mask)
        return (quantized * rows(3, 5, 16, seed=9)).sum() + 3 * loss.sum()

    leaf = x.clone().requires_grad_()
    total(leaf).backward()
    with tw.backend("reference"):
        grad, value = torch.func.grad_and_value(total)(x)
    torch.testing.assert_close(value, total(x), **CLOSE)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(_backend.choose(torch.device(DEVICE)) == "reference", reason="no kernel")
def test_torch_func_without_the_reference_says_what_works():
    module = quantizer().eval()
    with pytest.raises(RuntimeError, match="torch.func.*reference"):
        torch.func.grad(lambda x: module(x)[0].sum())(rows(3, 16))


@pytest.mark.parametrize("settings", [
    {}, dict(use_cosine_sim=True), dict(heads=2, codebook_dim=8, separate_codebook_per_head=True),
], ids=str)
def test_micro_batches_are_one_step_of_the_averages(settings):
    whole, parts = quantizer(**settings), quantizer(**settings)
    for seed in range(2):
        x = rows(90, 16, seed=seed)
        whole(x)
        for i, part in enumerate(x.split(30)):
            before = parts.codebook.clone()
            parts(part, accum_ema_update=i < 2)
            assert torch.equal(parts.codebook, before) == (i < 2)
        assert_same_state(parts, whole, rtol=1e-5, atol=1e-6)


def test_micro_batches_are_lucidrains():
    peer = pytest.importorskip("vector_quantize_pytorch")
    ours, theirs = quantizer(), peer.VectorQuantize(16, 32)
    theirs.load_state_dict(ours.state_dict())
    for i in range(5):
        assert_same_step(ours, theirs, rows(30, 16, seed=i), accum_ema_update=i % 3 < 2)
        assert_same_state(ours, theirs)


def test_no_code_is_revived_between_micro_batches():
    module = quantizer(threshold_ema_dead_code=100)
    before = copy.deepcopy(module.state_dict())
    module(rows(30, 16), accum_ema_update=True)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    module(rows(30, 16, seed=1))
    assert not torch.equal(module.codebook, before["_codebook.embed"][0])


def test_what_waits_ends_with_other_codes():
    waiting, fresh = quantizer(), quantizer()
    x = rows(30, 16)
    waiting(x + 3, accum_ema_update=True)
    waiting.load_state_dict(fresh.state_dict())
    for module in (waiting, fresh):
        module(x)
    assert torch.equal(waiting.codebook, fresh.codebook)


# Arguments


@pytest.mark.parametrize("name", MAKE)
def test_indices_are_checked(name):
    module = MAKE[name]().eval()
    index = module(rows(5, 16))[1]
    codes = module.get_output_from_indices(index)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(module.get_output_from_indices(index.to(dtype)), codes)
    for bad in (index.float(), index > 0, [1]):
        with pytest.raises(TypeError, match="indices: expected a tensor of integers"):
            module.get_codes_from_indices(bad)
    with pytest.raises(ValueError, match="indices: expected less than 32 codes, got 32"):
        module.get_codes_from_indices(torch.full_like(index, 32))


@pytest.mark.parametrize("make", [quantizer, residual, grouped])
@pytest.mark.parametrize("settings, error, text", [
    (dict(codebook_size="512"), TypeError, "codebook_size: expected an int, got str"),
    (dict(dim=16.5), TypeError, "dim: expected an int"),
    (dict(decay=2), ValueError, "decay: expected from 0 to 1, got 2"),
    (dict(eps=-1.0), ValueError, "eps"),
    (dict(threshold_ema_dead_code=-1), ValueError, "threshold_ema_dead_code"),
    (dict(kmeans_iters=-1), ValueError, "kmeans_iters"),
    (dict(commitment_weight="1"), TypeError, "commitment_weight"),
    (dict(affine_param=True), TypeError, "affine_param: is not supported, expected False"),
    (dict(orthogonal_reg_weight=0.1), TypeError, "orthogonal_reg_weight: is not supported"),
    (dict(colour=3), TypeError, "colour: unexpected"),
], ids=str)
def test_bad_arguments(make, settings, error, text):
    with pytest.raises(error, match=text):
        make(**settings)


def test_options_of_lucidrains_that_are_off():
    off = dict(affine_param=False, sync_kmeans=True, manual_ema_update=False,
               learnable_codebook=None, codebook_diversity_temperature=50.0,
               in_place_codebook_optimizer=None)
    call = dict(indices=None, sample_codebook_temp=0.5)
    x = rows(3, 16)
    for make, more, other in (
        (quantizer, {}, dict(topk=None, accum_ema_update=False)),
        (residual, dict(implicit_neural_codebook=False, heads=1, beam_size=None), {}),
        (grouped, dict(diveq=False, mlp_kwargs={}), dict(beam_size=None)),
    ):
        expected, result = make()(x), make(**off, **more)(x, **call, **other)
        assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
        with pytest.raises(TypeError, match="indices: is not supported"):
            make()(x, indices=rows(3) > 0)
    for make in (quantizer, residual, gumbel):
        mask = rows(3) > 0
        torch.manual_seed(1)
        by_name = make()(x, mask=mask)[0]
        torch.manual_seed(1)
        assert torch.equal(make()(x, mask)[0], by_name)


def test_temperature_as_tamings_schedulers_set_it():
    module = gumbel()
    module.temperature = 0.5
    assert module.tau == 0.5 and "temperature.tau" in module.state_dict()
    with pytest.raises(ValueError, match="tau"):
        module.temperature = -1.0


@every_quantizer
def test_print_shows_sizes(name):
    assert "dim=16" in str(MAKE[name]()) and "32" in str(MAKE[name]())


def test_as_many_codes_as_rows_get_each_of_them():
    x, valid = rows(20, 3), torch.arange(20) % 5 > 0  # 8 of each head
    wanted = Wanted(x, valid, torch.ones(2, 8, dtype=torch.bool))
    ((samples, found, _),) = sample_rows([wanted], sync=False)
    assert found.all()
    for head in range(2):
        match = (samples[head][:, None] == x[head::2][valid[head::2]]).all(-1)
        assert (match.sum(0) == 1).all() and (match.sum(1) == 1).all()
