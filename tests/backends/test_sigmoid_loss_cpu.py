"""The C++ backend of sigmoid_loss: tiles, threads, instruction sets, memory."""

import pytest
import torch

import tilewise as tw
from tests.common import fresh
from tests.common.concurrency import assert_same_bits, holds_after_fork, in_threads
from tests.common.contrastive_cases import Case, related
from tests.ops.test_sigmoid_loss import check, outputs, reference_gradcheck_inputs

BIG = [  # more than one tile in both directions, and sizes that no block divides
    Case("many-tiles", related(2099, 2251, 3)),
    Case("tiles-less-one", related(2047, 4351, 2), logit_scale=5.0),
    Case("many-tiles-offset", related(2099, 2251, 3), positives=-1501),
]


@pytest.fixture(autouse=True)
def cpu_backends():
    with tw.backend("cpu"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BIG, ids=lambda case: case.name)
def test_within_error_budget_over_tiles(case, dtype):
    check(case, dtype)


def test_every_sigmoid_is_accurate():
    """With one image (1) and scale 1 the logits are the texts, and d_text their sigmoids."""
    z = torch.cat([torch.linspace(-86, 86, 10007), torch.logspace(-30, 0, 1009)]).float()
    one = torch.ones(1, 1)
    text = z[:, None].clone().requires_grad_()
    tw.sigmoid_loss(one, text, 1.0, positives=None).backward()
    exact = torch.sigmoid(z.double())
    assert ((text.grad[:, 0].double() - exact) / exact).abs().max() < 3e-7


@pytest.mark.parametrize("sign", [1, -1])
def test_every_softplus_is_accurate(sign):
    """Sixteen equal logits at a time, so that the vector code computes them."""
    for z in torch.linspace(-86, 86, 301).tolist():
        text = torch.full((16, 1), z)
        loss = tw.sigmoid_loss(torch.ones(1, 1), sign * text, 1.0, positives=None)
        exact = 16 * torch.nn.functional.softplus(sign * text[0, 0].double())
        assert abs(loss.double() / exact - 1) < 4e-7, z


def test_float16_gradients_survive_loss_scaling():
    """Single gradients are far below float16's range until a scaler multiplies them."""
    check(Case("scaled", related(2048, 2048, 16)), torch.float16, factor=65536.0)


def test_kernel_gradcheck():
    assert torch.autograd.gradcheck(tw.sigmoid_loss, reference_gradcheck_inputs())


def everything(case: Case, dtype=torch.float32):
    values = outputs(tw.sigmoid_loss, case, case.features(dtype), torch.float32)
    return [v.clone() for v in values.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(7, 1800, 517), (600, 600, 33), (2100, 2200, 40)], ids=str)
def test_same_bits_for_every_thread_count(threads, shape, dtype):
    case = Case("bits", related(*shape))
    assert_same_bits(threads, lambda: everything(case, dtype))


@pytest.mark.alone
def test_calls_from_several_threads():
    case = Case("mt", related(300, 300, 16))
    expected = everything(case)
    for got in in_threads(lambda: everything(case)):
        assert all(map(torch.equal, got, expected))


def prepare_memory(batch, dim, dtype):
    """Runs in a process of its own: see tests.common.fresh."""
    features = [torch.randn(batch, dim).to(getattr(torch, dtype)) for _ in range(2)]
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    leaves = [x.requires_grad_() for x in features]

    def step(count):
        tw.sigmoid_loss(leaves[0][:count], leaves[1][:count], scale, bias).backward()
        return [x.grad for x in leaves]

    step(64)
    for leaf in leaves:
        leaf.grad = None
    return lambda: step(batch)


@pytest.mark.alone
def test_memory_grows_like_the_features():
    """Four times the batch may add gradients, which are linear in it, but no B x B matrix."""
    dim, batches, dtypes = 16, (4096, 16384), ("float32", "bfloat16", "float16")
    cases = [dict(batch=batch, dim=dim, dtype=dtype) for dtype in dtypes for batch in batches]
    peaks = fresh.peak_bytes_each(prepare_memory, cases)
    linear = (batches[1] - batches[0]) * dim * 4 * 2  # both gradients, once, in float32
    for dtype, small, large in zip(dtypes, peaks[::2], peaks[1::2], strict=True):
        figures = f"{dtype}: {small / 2**20:.1f} -> {large / 2**20:.1f} MiB"
        assert large - small <= 4 * linear + 2**21, figures
        assert small <= 40 * 2**20, figures  # the workspace


CAPABILITY_SCRIPT = """
import torch, tilewise as tw
from tilewise import _extension
from tests.common.contrastive_cases import CASES, Case, related
from tests.ops.test_sigmoid_loss import check
with tw.backend("cpu"):
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            check(case, dtype)
    check(Case("tiles", related(2099, 2251, 4)), torch.float32)
print(_extension.build_info()["cpu_capability"])
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability):
    """ATEN_CPU_CAPABILITY lowers what is used, and the results stay within the budget."""
    child = fresh.run(CAPABILITY_SCRIPT, ATEN_CPU_CAPABILITY=capability)
    assert child.returncode == 0, child.stderr[-2000:]
    has_avx2 = torch.cpu._is_avx2_supported()  # by the machine: this process may be lowered
    expected = "AVX2" if capability == "avx2" and has_avx2 else "DEFAULT"
    assert child.stdout.split()[-1] == expected


@pytest.mark.alone
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork():
    case = Case("fork", related(300, 300, 16))
    expected = everything(case)
    assert holds_after_fork(lambda: all(map(torch.equal, everything(case), expected)))
