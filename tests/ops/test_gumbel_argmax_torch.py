"""tilewise.gumbel_argmax within torch: tracing, autocast, what it keeps, errors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import tilewise as tw
from tests.common import random_cases as cases
from tests.common.contrastive_cases import DEVICE
from tests.common.random_cases import OPERATORS, backends, kernels, normal

backend = pytest.fixture(cases.serve)


@kernels
@pytest.mark.parametrize("log_prob", [False, True])
def test_backward_keeps_no_matrix_of_its_own(backend, log_prob):
    """Nothing without log-probabilities; with them the logits and the indices."""
    x = normal(40, 33).float().requires_grad_()
    saved = cases.Saved()
    with saved:
        result = tw.gumbel_argmax(x, 2, seed=1, log_prob=log_prob)
    if log_prob:
        assert saved.bytes_beyond(x, result[0]) <= 64
    else:
        assert not saved.tensors and not result.requires_grad


@kernels
@pytest.mark.parametrize("log_prob", [False, True])
def test_opcheck(backend, log_prob):
    x, seed = normal(2, 3, 5).float().requires_grad_(), torch.tensor(3)
    # Not the fourth one: see test_nearest_code.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        OPERATORS[backend].gumbel_argmax.default, (x, seed, 2, 1, 2, log_prob), test_utils=tests
    )


def step(x):
    index, log_prob = tw.gumbel_argmax(2 * x, 2, dim=0, seed=12, log_prob=True)
    return index, (log_prob * x.detach()[0]).sum()


@kernels
def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for columns in (4, 4, 7):
        x = normal(5, columns).float().requires_grad_()
        (index, value), (expected_index, expected) = compiled(x), step(x)
        assert torch.equal(index, expected_index)
        torch.testing.assert_close(value, expected)
        ours, eager = (torch.autograd.grad(v, x)[0] for v in (value, expected))
        torch.testing.assert_close(ours, eager)


@backends
def test_autocast_changes_nothing(backend):
    x = normal(4, 33).float()
    expected = tw.gumbel_argmax(x, seed=1, log_prob=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        index, log_prob = tw.gumbel_argmax(x, seed=1, log_prob=True)
    assert log_prob.dtype == torch.float32
    assert torch.equal(index, expected[0]) and torch.equal(log_prob, expected[1])


@backends
def test_inputs_are_left_alone(backend):
    x = cases.masked(5, 33).float()
    copy = x.clone()
    tw.gumbel_argmax(x, 3, seed=1, log_prob=True)
    assert torch.equal(x, copy)


@kernels
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_functorch_raises(backend, transform):
    x = normal(3, 4).float()

    def loss(x):
        return tw.gumbel_argmax(x, seed=1, log_prob=True)[1].sum()

    with pytest.raises(RuntimeError, match="gumbel_argmax.*torch.func"):
        torch.func.grad(loss)(x) if transform == "grad" else torch.vmap(loss)(x[None])


X = torch.zeros(3, 4)
BAD = [
    (dict(logits=[[0.0]]), TypeError, "logits.*list"),
    (dict(logits=X.long()), TypeError, "logits.*int64"),
    (dict(logits=torch.tensor(1.0)), ValueError, r"logits.*one dimension.*\(\)"),
    (dict(k=0), ValueError, "k.*at least 1.*0"),
    (dict(k=-1), ValueError, "k.*at least 1.*-1"),
    (dict(k=5), ValueError, "k.*4 categories.*5"),
    (dict(k=4, dim=0), ValueError, "k.*3 categories.*4"),
    (dict(k=1.0), TypeError, "k.*float"),
    (dict(logits=X[:, :0]), ValueError, "0 categories"),
    (dict(logits=X[:, :0], k=1), ValueError, "0 categories.*1"),
    (dict(logits=X[:0, :0]), ValueError, "0 categories"),
    (dict(dim=2), ValueError, r"dim.*-2 to 1.*2"),
    (dict(dim="1"), TypeError, "dim.*str"),
    (dict(seed=1.5), TypeError, "seed.*float"),
    (dict(seed=2**63), ValueError, "seed.*9223372036854775808"),
    (dict(seed=torch.tensor([1, 2])), TypeError, r"seed.*\(2,\)"),
    (dict(row_offset="0"), TypeError, "row_offset.*str"),
]


@cases.exact_backends
@pytest.mark.parametrize("arguments, error, message", BAD)
def test_bad_arguments_are_named(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        tw.gumbel_argmax(**{"logits": X, **arguments})


def test_activation_checkpointing():
    """It lets a backward pass read what was saved once."""
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        x = torch.arange(12.0).view(3, 4).requires_grad_()
        run(lambda x: tw.gumbel_argmax(x, seed=3, log_prob=True)[1].sum(), x).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
