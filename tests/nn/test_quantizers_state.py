"""What decides how a quantiser behaves lies in buffers: loaded, copied, averaged, set by hand."""

import copy

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tilewise as tw
from tests.common.quantizer_cases import (
    CLOSE,
    assert_same_state,
    grouped,
    quantizer,
    residual,
    rows,
    step,
)

KMEANS = dict(kmeans_init=True, kmeans_iters=2, threshold_ema_dead_code=1e-9)


def trained(make):
    """Codes that one more k-means would wipe out, since the next data lie elsewhere."""
    module = make(**KMEANS)
    for seed in range(2):
        module(rows(200, 16, seed=seed))
    return module


# k-means


@pytest.mark.parametrize("make", [quantizer, residual])
@pytest.mark.parametrize("first", ["NaN", "masked", "empty"])
def test_kmeans_waits_for_a_batch_with_rows(make, first):
    module, x = make(**KMEANS), rows(1, 400, 16) + 20
    before = copy.deepcopy(module.state_dict())
    if first == "NaN":
        module(torch.full_like(x, float("nan")))
    elif first == "masked":
        module(x, torch.zeros(1, 400, dtype=torch.bool))
    else:
        module(x[:, :0])
    books = [book for name, book in module.named_modules() if name.endswith("_codebook")]
    assert all(book.needs_init for book in books)
    for key, value in module.state_dict().items():  # averages of nothing shrink, codes stay
        if not key.endswith(("cluster_size", "embed_avg")):
            torch.testing.assert_close(value, before[key], **CLOSE)
    index = module(x)[1]
    assert len(index.flatten(1 if make is quantizer else 2).unique()) >= 30
    assert not any(book.needs_init for book in books) and (books[0].initted == 1).all()


def load(source, target):
    target.load_state_dict(source.state_dict())
    return target


def assign(source, target):
    target.load_state_dict(source.state_dict(), assign=True)
    return target


def copy_buffers(source, target):
    """As weight averaging, or a distributed checkpoint that loads in place, does it."""
    theirs = source.state_dict()
    for key, value in target.state_dict().items():
        value.copy_(theirs[key])
    return target


def average(source, target):
    averaged = AveragedModel(target, use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(source)
    return averaged.module


def average_exponentially(source, target):
    averaged = AveragedModel(target, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(source)
    return averaged.module


def fill_empty(source, target):
    return copy_buffers(source, copy.deepcopy(target).to("meta").to_empty(device="cpu"))


def copy_after_a_look(source, target):
    target(rows(0, 16))  # looks at `initted`, which says no
    return copy_buffers(source, target)


@pytest.mark.parametrize("make", [quantizer, residual, grouped])
@pytest.mark.parametrize("move", [
    load, assign, copy_buffers, copy_after_a_look, average, average_exponentially, fill_empty,
], ids=lambda f: f.__name__)
def test_trained_codes_survive(make, move):
    source = trained(make)
    target = move(copy.deepcopy(source), make(**KMEANS))
    x = rows(300, 16, seed=7) + 5
    for module in (source, target):
        module.train()(x)
    assert_same_state(source, target)


def test_functional_call_decides_by_what_it_is_given():
    source, target = trained(quantizer), quantizer(**KMEANS)
    state = {key: x.clone() for key, x in source.state_dict().items()}
    x = rows(300, 16, seed=7) + 5
    torch.func.functional_call(target, state, (x,))
    source(x)
    for key, value in source.state_dict().items():
        torch.testing.assert_close(state[key], value, **CLOSE)
    assert target._codebook.needs_init  # its own is still to come
    target(x)
    assert (target.codebook.mean() - 5).abs() < 0.5


def test_a_fresh_state_brings_kmeans_back():
    module, fresh = trained(quantizer), quantizer(**KMEANS)
    module.load_state_dict(fresh.state_dict())
    module(rows(300, 16) + 5)
    assert (module.codebook.mean() - 5).abs() < 0.5


# Codes set by hand


@pytest.mark.parametrize("settings", [
    dict(), KMEANS, dict(use_cosine_sim=True), dict(threshold_ema_dead_code=3),
    dict(learnable_codebook=True), dict(heads=2, codebook_dim=8, separate_codebook_per_head=True),
], ids=str)
def test_codes_set_by_hand_stay(settings):
    module = quantizer(**settings)
    codes = 3 + rows(*module.codebook.shape, seed=4)
    if "use_cosine_sim" in settings:
        codes = torch.nn.functional.normalize(codes, dim=-1)
    module.codebook = codes
    torch.testing.assert_close(module.codebook, codes)
    module(rows(0, 16))  # refreshes the codes from their averages, which have seen nothing new
    torch.testing.assert_close(module.codebook, codes, **CLOSE)
    assert module._codebook.initted == 1


def test_codebooks_set_by_hand():
    for module in (residual(kmeans_init=True), residual(shared_codebook=True), grouped()):
        codes = module.codebooks + 1
        module.codebooks = codes
        assert torch.equal(module.codebooks, codes)
        module(rows(0, 16))
        torch.testing.assert_close(module.codebooks, codes, **CLOSE)
    sizes = residual(codebook_size=(8, 4), num_quantizers=None)
    sizes.codebooks = [rows(8, 16), rows(4, 16)]
    assert torch.equal(sizes.codebooks[1], rows(4, 16)) and sizes.codebook_size == 8
    gumbel = tw.nn.GumbelQuantizer(16, 32, 8)
    gumbel.codebook = rows(32, 8)
    assert torch.equal(gumbel.codebook, rows(32, 8)) and gumbel.embed.weight.requires_grad
    for module, codes in ((quantizer(), None), (gumbel, [[1.0]])):
        with pytest.raises(TypeError, match="codebook: expected a tensor, got"):
            module.codebook = codes
    with pytest.raises(TypeError, match="codebook: expected float16.* got torch.int64"):
        gumbel.codebook = torch.ones(32, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"codebook: expected \(32, 16\), got \(31, 16\)"):
        quantizer().codebook = rows(31, 16)
    with pytest.raises(AttributeError, match="codebook"):
        residual().codebook = rows(4, 32, 16)
    for module, name, codes in (
        (quantizer(), "codebook", rows(31, 16)), (gumbel, "codebook", rows(32, 16)),
        (residual(), "codebooks", rows(2, 32, 16)), (grouped(), "codebooks", rows(3, 4, 32, 8)),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            setattr(module, name, codes)


# Frozen codes


@pytest.mark.parametrize("make", [quantizer, residual, grouped])
@pytest.mark.parametrize("settings", [
    dict(), dict(learnable_codebook=True), dict(learnable_codebook=True, rotation_trick=False),
    dict(threshold_ema_dead_code=2),
], ids=str)
@pytest.mark.parametrize("where", ["constructor", "call"])
def test_frozen_codes_stay(make, settings, where):
    freeze = dict(freeze_codebook=True)
    module = make(**settings, **(freeze if where == "constructor" else {}))
    learned, before = list(module.parameters()), copy.deepcopy(module.state_dict())
    (_, _, loss, *_), grad = step(module, rows(50, 16), **(freeze if where == "call" else {}))
    assert all(p.grad is None for p in learned) and grad.abs().sum() > 0
    assert all(torch.equal(x, before[key]) for key, x in module.state_dict().items())
    if learned:  # what is left of the loss is the commitment
        both = make(**settings)(rows(50, 16))[2]
        torch.testing.assert_close(2 * loss, both)


# In a graph


def test_a_graph_decides_by_the_buffer():
    """It was made while k-means was still to come; then trained codes are copied in."""
    torch._dynamo.reset()
    source, target = trained(quantizer), quantizer(**KMEANS)
    compiled = torch.compile(target, fullgraph=True, backend="aot_eager")
    compiled(torch.full((300, 16), torch.nan))
    assert target._codebook.needs_init
    copy_buffers(source, target)
    x = rows(300, 16, seed=7) + 5
    for _ in range(2):  # with k-means, whose result is thrown away, and without
        source(x), compiled(x)
        assert_same_state(source, target)


# Temperatures


@pytest.mark.parametrize("tau", [0.3, tw.nn.CosineSchedule(steps=10)], ids=["constant", "schedule"])
@pytest.mark.parametrize("learnable_tau", [False, True])
def test_modules_from_meta_have_a_temperature(tau, learnable_tau):
    """A strict load of taming's keys, which have no temperature, leaves nothing uninitialised."""
    if learnable_tau and not isinstance(tau, float):
        tau = 0.7
    settings = dict(dim=4, codebook_size=8, tau=tau, learnable_tau=learnable_tau)
    state = tw.nn.GumbelQuantizer(**settings).state_dict()
    state = {key: x for key, x in state.items() if not key.startswith("temperature")}
    with torch.device("meta"):
        modules = [tw.nn.GumbelQuantizer(**settings) for _ in range(2)]
    used = tw.nn.GumbelQuantizer(**settings)
    used.tau = 0.9
    for module in (modules[0], used):
        module.to_empty(device="cpu").load_state_dict(state)
        assert module.tau == tw.nn.GumbelQuantizer(**settings).tau
    with pytest.raises(RuntimeError, match="Missing key.*temperature"):
        modules[1].load_state_dict(state, assign=True)


def test_a_schedule_goes_on_from_a_copied_step():
    schedule = tw.nn.LinearSchedule(1.0, 0.0, steps=100)
    source, target = (tw.nn.GumbelQuantizer(4, 8, tau=schedule) for _ in range(2))
    source.step(40)
    copy_buffers(source, target)
    target.step()
    assert target.tau == torch.tensor(schedule(41)) and target.temperature.step_count == 41
