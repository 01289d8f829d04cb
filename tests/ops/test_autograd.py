"""What torch does around every op's backward pass: checkpoints, hooks, modes, compiling it."""

import pytest
import torch
from torch._dynamo import compiled_autograd

from tests.common import random_cases as cases
from tests.common.random_cases import backends, kernels
from tests.ops.test_contracts import SCALARS, by_op, leaf

backend = pytest.fixture(cases.serve)


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
