"""What torch does around every op's backward pass: checkpoints, hooks, modes, compiling it."""

import pytest
import torch
from torch._dynamo import compiled_autograd

from tests.common import random_cases as cases
from tests.common.random_cases import backends, cpu_backends, kernels
from tests.ops.test_contracts import SCALARS, by_op, leaf

backend = pytest.fixture(cases.serve)
losses = pytest.mark.parametrize("op", ["clip_loss", "info_nce", "itc_loss", "sigmoid_loss"])


@backends
@by_op
def test_backward_may_read_what_was_saved_once(backend, op):
    """Activation checkpointing lets it; a graph that is retained lets it again."""
    x = leaf()
    value = SCALARS[op](x)
    value.backward(retain_graph=True)
    once, x.grad = x.grad, None
    value.backward()
    assert torch.equal(x.grad, once)
    x.grad = None
    torch.utils.checkpoint.checkpoint(SCALARS[op], x, use_reentrant=False).backward()
    assert torch.equal(x.grad, once)


@kernels
@by_op
def test_saved_tensors_pass_through_hooks(backend, op):
    """As offloading them to another memory does."""
    x = leaf()
    expected, = torch.autograd.grad(SCALARS[op](x), x)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        value = SCALARS[op](x)
    assert torch.equal(torch.autograd.grad(value, x)[0], expected)


def sigmoid_operator():
    """What the operator returns, and the features that want a gradient."""
    image, text = (cases.normal(6, 5, seed=i).float().requires_grad_() for i in (0, 1))
    scale = torch.tensor(10.0)
    operator = torch.ops.tilewise.sigmoid_loss.default
    outputs = operator(image, text, scale, None, 0, None, None, True, True, False, False)
    return *outputs[:3], image


@cpu_backends
def test_a_finished_gradient_becomes_the_features(backend):
    """In its own memory, where it is the result and nobody else can tell."""
    loss, gradient, other, image = sigmoid_operator()
    expected, place = gradient.clone(), gradient.data_ptr()
    loss.backward()
    assert torch.equal(image.grad, expected) and image.grad.data_ptr() != place
    for factor in (1, 3):
        loss, gradient, other, image = sigmoid_operator()
        place = gradient.data_ptr()
        del gradient, other
        (factor * loss).backward()
        assert torch.equal(image.grad, factor * expected)
        assert (image.grad.data_ptr() == place) == (factor == 1)


@cpu_backends
def test_a_gradient_that_others_may_read_stays(backend):
    """Because of a view of it, a graph that is retained, or hooks."""
    loss, gradient, other, image = sigmoid_operator()
    expected, view = gradient.clone(), gradient[1:]
    del gradient, other
    torch.autograd.grad(loss, image)[0].zero_()
    assert torch.equal(view, expected[1:])
    loss, *rest, image = sigmoid_operator()
    del rest
    torch.autograd.grad(loss, image, retain_graph=True)[0].zero_()
    assert torch.equal(torch.autograd.grad(loss, image)[0], expected)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x) or len(kept) - 1, lambda i: kept[i]
    ):
        loss, *rest, image = sigmoid_operator()
    del rest
    torch.autograd.grad(loss, image)[0].zero_()
    assert torch.equal(kept[0], expected)


@cpu_backends
@losses
def test_results_may_be_written_to(backend, op):
    """Gradients are no views, whose owners autograd watches."""
    x = leaf()
    gradient, = torch.autograd.grad(SCALARS[op](x), x)
    assert not gradient._is_view()
    gradient.mul_(torch.ones((), requires_grad=True))


@kernels
@losses
def test_lazily_negated_and_absent_gradients(backend, op):
    """As autograd makes them where numbers are complex, or zero by construction."""
    x, loss = leaf(), SCALARS[op]
    expected, = torch.autograd.grad(loss(x), x)
    factor = torch.complex(torch.tensor(1.0), torch.tensor(1.0)).conj().imag  # -1, not yet negated
    assert factor.is_neg()
    assert torch.equal(torch.autograd.grad(loss(x), x, factor)[0], -expected)
    nothing = torch._efficientzerotensor((), dtype=torch.float32)
    assert torch.equal(torch.autograd.grad(loss(x), x, nothing)[0], torch.zeros_like(x))


@kernels
@by_op
def test_inference_mode(backend, op):
    x = leaf()
    expected = SCALARS[op](x).detach()
    with torch.inference_mode():
        assert torch.equal(SCALARS[op](x.clone()), expected)


class Module(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op, self.x = op, torch.nn.Parameter(leaf().detach() + 1)

    def forward(self):
        return SCALARS[self.op](self.x)


@kernels
@by_op
def test_functional_call(backend, op):
    x = leaf()
    expected, = torch.autograd.grad(SCALARS[op](x), x)
    value = torch.func.functional_call(Module(op), {"x": x}, ())
    assert torch.equal(torch.autograd.grad(value, x)[0], expected)


@pytest.mark.parametrize("op", ["gumbel_softmax", "nearest_code", "sigmoid_loss"])
def test_backward_compiles(op):
    """As torch.compile's compiled autograd does it: the graph of all backward passes is one."""
    x = leaf()
    expected, = torch.autograd.grad(SCALARS[op](x), x)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        SCALARS[op](x).backward()
    assert torch.equal(x.grad, expected)
