"""tilewise.clip_loss and PyTorch: compiling, autocast, errors, memory, threads."""

import pytest
import torch

import tilewise as tw
from tests.common.compilers import once
from tests.common.concurrency import assert_same_bits
from tests.common.contrastive_cases import Case, related
from tests.common.fresh import peak_bytes_each
from tests.ops.test_clip_loss import check


def features(b=20, n=20, d=8, dtype=torch.float32):
    return [x.requires_grad_() for x in Case("f", related(b, n, d)).features(dtype)]


@pytest.mark.parametrize("flags", [(False, True, False), (True, False, True), (False,) * 3])
def test_only_the_gradients_asked_for(flags):
    leaves = [*(x.detach() for x in features()), torch.tensor(9.0)]
    loss, *gradients = torch.ops.tilewise.clip_loss(*leaves, 0, None, None, 0.0, *flags)
    full = torch.ops.tilewise.clip_loss(*leaves, 0, None, None, 0.0, True, True, True)
    assert torch.equal(loss, full[0])
    for flag, gradient, whole in zip(flags, gradients, full[1:], strict=True):
        assert torch.equal(gradient, whole) if flag else gradient.shape == (0,)


@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_compiled_training_step(compiler):
    torch._dynamo.reset()
    compiled = torch.compile(
        tw.clip_loss, fullgraph=True, backend=compiler, dynamic=once(compiler)
    )
    for count in (16, 19):
        gradients = []
        for function in (tw.clip_loss, compiled):
            leaves = [*features(count, count), torch.tensor(10.0, requires_grad=True)]
            gradients.append(torch.autograd.grad(function(*leaves), leaves))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_second_derivatives_only_in_the_reference():
    image, text = features(dtype=torch.float64)
    gradient, = torch.autograd.grad(tw.clip_loss(image, text, 10.0), image, create_graph=True)
    with pytest.raises(RuntimeError, match="reference"):
        gradient.sum().backward()
    with tw.backend("reference"):
        gradient, = torch.autograd.grad(tw.clip_loss(image, text, 10.0), image, create_graph=True)
    gradient.square().sum().backward()
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(lambda x: tw.clip_loss(x, text.detach(), 1.0))(image.detach())


def test_same_bits_for_every_thread_count(threads):
    image, text = Case("t", related(700, 900, 24)).features(torch.float32)
    arguments = image, text, torch.tensor(20.0), 0, None, None, 0.1, True, True, True
    assert_same_bits(threads, lambda: torch.ops.tilewise.clip_loss(*arguments))


def test_several_tiles_are_one_problem():
    """More rows and columns than a tile of the C++ backend has."""
    check(Case("s", related(2100, 2200, 4), logit_scale=30.0), torch.float32)


def test_far_apart_rows_at_scale_100():
    """One row's largest logit is 200 above another's: no common maximum serves both."""
    image = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    text = torch.tensor([[1.0, 0.0], [1.0, 1e-3]])
    leaves = [x.requires_grad_() for x in (image, text)]
    loss = tw.clip_loss(*leaves, 100.0)
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = tw.reference.clip_loss(*exact_leaves, 100.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, exact_leaves), strict=True
    ):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-9)


def prepare(rows: int):
    leaves = [torch.randn(rows, 64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(10.0, requires_grad=True)

    def call():
        return torch.autograd.grad(tw.clip_loss(*leaves, scale), [*leaves, scale])

    return call


@pytest.mark.alone
def test_memory_grows_with_the_rows_alone():
    """Eager keeps several matrices of rows x rows: 268 MB each at 8192."""
    small, large = peak_bytes_each(prepare, [{"rows": rows} for rows in (4096, 8192)])
    assert large < 100e6 and large - small < 20e6
