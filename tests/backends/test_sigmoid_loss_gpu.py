"""sigmoid_loss on a real GPU: what an interpreter is too slow for, or cannot show."""

import pytest
import torch

import tilewise as tw
from benchmarks.harness.measure import peak_bytes
from tests.common.contrastive_cases import Case, related
from tests.ops.test_sigmoid_loss import check, outputs

BIG = [
    Case("whole-tiles", related(4096, 8192, 512)),
    Case("ragged", related(8191, 8191, 100), logit_scale=5.0),
    Case("several-chunks", related(20001, 9001, 64), positives=-3001),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", BIG, ids=lambda case: case.name)
def test_within_error_budget(case, dtype):
    check(case, dtype)


def test_automatic_choice_is_the_triton_backends():
    image, text = Case("auto", related(40, 40, 16)).features(torch.bfloat16)
    automatic = tw.sigmoid_loss(image, text, 10.0)
    with tw.backend("triton"):
        assert torch.equal(automatic, tw.sigmoid_loss(image, text, 10.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_on_every_run(dtype):
    case = Case("bits", related(3000, 5000, 256))
    runs = [outputs(tw.sigmoid_loss, case, case.features(dtype), torch.float32) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


def test_no_host_sync():
    image, text = Case("sync", related(512, 512, 64)).features(torch.bfloat16)
    scale = torch.tensor(10.0, requires_grad=True)
    image.requires_grad_()
    tw.sigmoid_loss(image, text, scale).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        tw.sigmoid_loss(image, text, scale).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def prepare_memory(batch, dim, device):
    """Runs in a process of its own: see benchmarks.harness.measure.peak_bytes."""
    features = [torch.randn(batch, dim, device=device, dtype=torch.bfloat16) for _ in range(2)]
    leaves = [x.requires_grad_() for x in features]

    def step(count):
        tw.sigmoid_loss(leaves[0][:count], leaves[1][:count], 10.0, -10.0).backward()
        return [x.grad for x in leaves]

    step(64)
    for leaf in leaves:
        leaf.grad = None
    return lambda: step(batch)


def test_memory_grows_like_the_features():
    dim, batches = 64, (16384, 65536)
    small, large = (peak_bytes(prepare_memory, batch=b, dim=dim, device="cuda") for b in batches)
    linear = (batches[1] - batches[0]) * dim * 4 * 2  # both gradients, once, in float32
    assert large - small <= 5 * linear, f"{small / 2**20:.1f} -> {large / 2**20:.1f} MiB"
    assert small <= 5 * batches[0] * dim * 4 * 2 + 2**28
