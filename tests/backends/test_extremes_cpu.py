"""The C++ backend at its edges: sums of many terms, infinities, lazy copies, what it refuses."""

import math

import pytest
import torch

import tilewise as tw

EPS = {torch.float32: 2**-23, torch.float64: 2**-52}
LOSSES = ["sigmoid_loss", "clip_loss", "info_nce", "itc_loss"]


@pytest.fixture(autouse=True)
def cpu_backends():
    with tw.backend("cpu"):
        yield


def roundings(value: torch.Tensor, exact: float) -> float:
    return abs(value.item() / exact - 1) / EPS[value.dtype]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_beyond_float32_is_infinite(loss):
    x = torch.tensor([[1e19], [-1e19]])
    args = (x, x, -3.0) if loss == "sigmoid_loss" else (x, -x, 3.0)
    eager = torch.nn.functional.softplus(torch.tensor(3e38)) * 2
    assert eager.isinf() and getattr(tw, loss)(*args).item() == math.inf


def test_a_gradient_of_tau_beyond_float32_is_infinite():
    y, grad = torch.tensor([[0.9, 0.1]]), torch.tensor([[1e38, -1e38]])
    tau, seed = torch.tensor(1e-3), torch.tensor([1])
    d_tau = torch.ops.tilewise.gumbel_softmax_backward(grad, y, tau, seed, 0, 1, False, True)[1]
    assert d_tau.isinf()


def test_float64_sums_of_equal_terms_are_exact():
    """Two roundings, however many terms there are: plain sums lose a bit each time they double."""
    rows = 1024
    zeros, ids = torch.zeros(rows, 1, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)
    bias = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = tw.sigmoid_loss(zeros, zeros, 1.0, bias, positives=(ids, ids))
    loss.backward()
    assert roundings(loss, rows * math.log1p(math.exp(-0.7))) <= 2
    assert roundings(bias.grad, -rows / (1 + math.exp(0.7))) <= 2
    bias.grad = None
    tw.sigmoid_loss(zeros, zeros, 1.0, bias, positives=None).backward()
    assert roundings(bias.grad, rows / (1 + math.exp(-0.7))) <= 2
    for loss in (tw.clip_loss, tw.info_nce, tw.itc_loss):
        assert roundings(loss(zeros, zeros, 1.0), math.log(rows)) <= 2
    ones = torch.ones(1, 65536, dtype=torch.float64)
    kl = tw.gaussian_sample(torch.zeros_like(ones), ones, seed=1)[1]
    assert roundings(kl, 65536 * (math.e - 2) / 2) <= 4


@pytest.mark.parametrize("b", [5.0, 1.3, -0.4, 2.7])
def test_float32_lanes_of_equal_terms_lose_nothing(b):
    bias = torch.tensor(b, requires_grad=True)
    texts = torch.zeros(512, 1)
    tw.sigmoid_loss(torch.zeros(3, 1), texts, 1.0, bias, positives=None).backward()
    assert roundings(bias.grad, 512 / (1 + math.exp(-float(torch.tensor(b))))) <= 1.5
    kl = tw.gaussian_sample(torch.zeros(1, 4096), torch.full((1, 4096), b), seed=1)[1]
    v = float(torch.tensor(b))
    assert roundings(kl, 4096 * (math.exp(v) - 1 - v) / 2) <= 2.5


@pytest.mark.parametrize("gap", [0.3, 1.7, 2.9])
def test_columns_of_equal_exponentials_lose_nothing(gap):
    """One image is nearest to every text, the others are equally far."""
    rows = 512
    images = torch.full((rows, 1), -gap)
    images[0] = 0
    g = float(torch.tensor(gap))
    loss = tw.clip_loss(images, torch.ones(1, 1), 1.0)
    column = math.log(1 + (rows - 1) * math.exp(-g))
    assert roundings(loss, column / 2) <= 2  # the only match is the nearest; its row has one text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("texts", [511, 512, 513, 1100])
def test_unmatched_texts_of_infinite_distance(texts, dtype):
    """Logits of -inf in whole rows of blocks: no text is ever nearer than another."""
    images = torch.ones(2, 1, dtype=dtype)
    near = torch.tensor([[1.0], [2.0]], dtype=dtype)
    far = torch.full((texts, 1), -math.inf, dtype=dtype)
    loss = tw.clip_loss(images, torch.cat([near, far]), 1.0)
    assert torch.allclose(loss, tw.clip_loss(images, near, 1.0))


def lazy_calls():
    """Every op, of inputs that are lazy copies; what it must equal is the same of plain ones."""
    a, b = torch.randn(2, 40, 8, generator=torch.manual_seed(0))
    ids = torch.arange(40) % 7
    yield "sigmoid_loss", lambda c: tw.sigmoid_loss(c(a), c(b), 2.0, positives=(c(ids), c(ids)))
    yield "clip_loss", lambda c: tw.clip_loss(c(a), c(b), c(torch.tensor(2.0)))
    yield "info_nce", lambda c: tw.info_nce(c(a), c(b), c(torch.tensor(2.0)))
    yield "itc_loss", lambda c: tw.itc_loss(c(a), c(b), 2.0, queue=c(b), teacher_query=c(a))
    yield "hard_negatives", lambda c: torch.stack(tw.hard_negatives(c(a), c(b), 2.0, seed=1))
    yield "nearest_code", lambda c: tw.nearest_code(c(a), c(b)).index
    yield "code_sums", lambda c: tw.code_sums(c(a), c(ids), 7)[1]
    yield "gumbel_softmax", lambda c: tw.gumbel_softmax(c(a), seed=1)
    yield "gumbel_softmax_dim", lambda c: tw.gumbel_softmax(c(a), dim=0, seed=1)
    yield "gumbel_softmax_half", lambda c: tw.gumbel_softmax(c(a.half()), seed=1)
    yield "hard", lambda c: tw.gumbel_softmax(c(a), hard=True, seed=1)
    yield "gumbel_argmax", lambda c: tw.gumbel_argmax(c(a), seed=1)
    yield "gaussian_sample", lambda c: tw.gaussian_sample(c(a), c(b), seed=1)[0]


@pytest.mark.parametrize("name", [name for name, _ in lazy_calls()])
def test_lazy_copies_are_read_and_stay_lazy(name):
    call, copies = dict(lazy_calls())[name], []

    def lazy(x):
        copies.append(torch._lazy_clone(x))
        return copies[-1]

    assert torch.equal(call(lazy), call(lambda x: x))
    assert all(map(torch._C._is_cow_tensor, copies)), "an input was copied"


def test_lazy_copies_in_the_gradients():
    x = torch.randn(6, 5, generator=torch.manual_seed(0))
    grad = torch.ones(6, 5)
    soft, gaussian = tw.gumbel_softmax, tw.gaussian_sample
    for op in (lambda x: soft(x, seed=1), lambda x: gaussian(x, x, seed=1)[0]):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        op(leaves[0]).backward(grad)
        op(leaves[1]).backward(torch._lazy_clone(grad))
        assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("shape", [(70_001, 3), (3, 70_001, 2), (1_100_000, 2)], ids=str)
def test_long_rows_along_a_first_dimension(shape):
    """So long that fewer than sixteen of them are transposed at once: no bit depends on it."""
    x = torch.randn(shape, generator=torch.manual_seed(0))
    dim = len(shape) - 2
    rows = x.movedim(dim, -1).contiguous()
    sample = tw.gumbel_softmax(x, dim=dim, seed=1)
    assert torch.equal(sample.movedim(dim, -1), tw.gumbel_softmax(rows, seed=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gaussian_gradient_reaches_the_largest_number(dtype):
    """Half of what overflows still has room."""
    largest = torch.finfo(dtype).max
    mean, logvar = (torch.zeros(1, 64, dtype=dtype, requires_grad=True) for _ in range(2))
    z = tw.gaussian_sample(mean, logvar, seed=1)[0]
    noise = z.detach()  # mean 0, deviation 1
    z.backward(torch.full_like(z, largest / 2))
    expected = largest / 4 * noise
    inside = (noise.abs() > 1.01) & (noise.abs() < 1.99)  # the product overflows, half of it not
    inside |= (noise.abs() > 2) & (noise.abs() < 3.99)
    assert (noise.abs() > 2).any()
    assert torch.allclose(logvar.grad[inside], expected[inside])


def test_refusals_say_what_was_expected():
    ops = torch.ops.tilewise
    x, y, one = torch.zeros(4, 3), torch.zeros(4, 2), torch.ones(())
    ids = torch.zeros(4, dtype=torch.int64)
    cases = [
        (lambda: ops.clip_loss(x, y, one, 0, None, None, 0.0, False, False, False),
         r"text_features: expected \(N, 3\), got \[4, 2\]"),
        (lambda: ops.clip_loss(x, x, x, 0, None, None, 0.0, False, False, False),
         "logit_scale: expected one element, got"),
        (lambda: ops.clip_loss(x, x, one, None, ids[:3], ids, 0.0, False, False, False),
         "positives: expected 4 and 4 ids, got"),
        (lambda: ops.itc_loss(x, y, one, None, None, one, x, ids, False, False),
         r"keys: expected \(N, 3\), got"),
        (lambda: ops.itc_loss(x, x, one, y, None, one, x, ids, False, False), "queue: expected"),
        (lambda: ops.nearest_code(x[None], y[None], "l2", 1, None, None), "codebook: expected"),
        (lambda: ops.nearest_code(x[None], x[None], "l2", 9, None, None), "k: expected from 1 to"),
        (lambda: ops.code_sums(x[None], ids[None, :3], 2), r"index: expected \[1, 4\], got"),
        (lambda: ops.gaussian_sample(x, y, ids[:1], 0, -1.0, 1.0), r"logvar: expected \[4, 3\]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
