"""tilewise.hard_negatives and PyTorch: tracing, autocast, errors, threads, memory."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import tilewise as tw
from tests.common.concurrency import assert_same_bits
from tests.common.contrastive_cases import DEVICE, Case, ids, related
from tests.common.fresh import peak_bytes_each

OPERATORS = {"cpu": torch.ops.tilewise, "triton": torch.ops.tilewise_triton}
KERNELS = [name for name in OPERATORS if name == "triton" or DEVICE == "cpu"]


@pytest.fixture
def backend(request):
    with tw.backend(request.param):
        yield request.param


kernels = pytest.mark.parametrize("backend", KERNELS, indirect=True)
backends = pytest.mark.parametrize("backend", ["reference", *KERNELS], indirect=True)


def features(b=20, n=20, d=8):
    return Case("f", related(b, n, d)).features(torch.float32)


def test_compiled():
    torch._dynamo.reset()

    def step(image, text, seed):
        of_image, of_text = tw.hard_negatives(2 * image, text, 10.0, seed=seed)
        return of_image, of_text, text[of_image.clamp(min=0)]

    compiled = torch.compile(step, fullgraph=True, backend="inductor", dynamic=True)
    for rows in (16, 23):
        arguments = *features(rows, rows + 1), torch.tensor(rows)
        for ours, theirs in zip(compiled(*arguments), step(*arguments), strict=True):
            assert torch.equal(ours, theirs)


def test_new_sizes_need_no_new_graph():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(tw.hard_negatives, fullgraph=True, backend=counter, dynamic=True)
    for rows in (16, 19, 23):
        image, text = features(rows, rows + 1)
        found = compiled(image, text, 3.0, seed=7)
        assert all(map(torch.equal, found, tw.hard_negatives(image, text, 3.0, seed=7)))
    assert counter.frame_count == 1


def test_compiled_without_a_seed():
    torch._dynamo.reset()
    compiled = torch.compile(tw.hard_negatives, fullgraph=True, backend="aot_eager")
    image, text = features(60, 60)
    first, second = (torch.cat(compiled(image, text, 1.0)) for _ in range(2))
    assert (first >= 0).all() and (second >= 0).all() and not torch.equal(first, second)


@backends
def test_inputs_may_ask_for_gradients(backend):
    image, text = (x.requires_grad_() for x in features())
    scale = torch.tensor(10.0, requires_grad=True)
    found = tw.hard_negatives(image, text, scale, seed=1)
    assert not any(x.requires_grad for x in found)
    plain = tw.hard_negatives(image.detach(), text.detach(), 10.0, seed=1)
    assert all(map(torch.equal, found, plain))


@backends
def test_scale_may_be_a_tensor(backend):
    expected = tw.hard_negatives(*features(), 10.0, seed=1)
    for scale in (torch.tensor(10.0), torch.full((1, 1), 10.0, dtype=torch.float64)):
        assert all(map(torch.equal, tw.hard_negatives(*features(), scale, seed=1), expected))


def test_same_bits_for_every_thread_count(threads):
    image, text = Case("t", related(900, 1500, 24)).features(torch.float32)
    options = {"positives": ids(900, 1500, 50), "seed": 3}
    assert_same_bits(threads, lambda: tw.hard_negatives(image, text, 20.0, **options))


def prepare(rows: int, ids: bool):
    image, text = (torch.randn(rows, 32) for _ in range(2))
    names = torch.arange(rows) // 5
    positives = (names, names) if ids else 0
    return lambda: tw.hard_negatives(image, text, 1.0, positives=positives, seed=1)


@pytest.mark.alone
def test_memory_has_no_matrix():
    """One of rows x rows takes 268 MB at 8192."""
    cases = [{"rows": 2048, "ids": False}, *({"rows": 8192, "ids": x} for x in (False, True))]
    small, large, with_ids = peak_bytes_each(prepare, cases)
    assert small < 60e6 and large - small < 10e6 and with_ids - small < 10e6
