"""tilewise.gaussian_sample within torch: tracing, autocast, errors."""

import pytest
import torch

import tilewise as tw
from tests.common import random_cases as cases
from tests.common.contrastive_cases import DEVICE
from tests.common.random_cases import INF, NAN, OPERATORS, backends, kernels, normal

backend = pytest.fixture(cases.serve)


@kernels
@pytest.mark.parametrize("bounds", [(-INF, INF), (-1.0, 0.5)], ids=str)
def test_opcheck(backend, bounds):
    mean, logvar = (normal(2, 3, 5, seed=i).float().requires_grad_() for i in (0, 1))
    op, stream = OPERATORS[backend], (torch.tensor(3), 2, *bounds)
    torch.library.opcheck(op.gaussian_sample.default, (mean, logvar, *stream))
    mean, logvar = mean.detach(), logvar.detach()
    for d_z, d_kl in ((mean, mean[:, 0, 0]), (None, mean[:, 0, 0]), (mean, None)):
        torch.library.opcheck(
            op.gaussian_sample_backward.default, (d_z, d_kl, mean, logvar, *stream)
        )


def step(mean, logvar):
    z, kl = tw.gaussian_sample(2 * mean, logvar, seed=12, logvar_range=(-30.0, 20.0))
    return (z * mean.detach().cos()).sum() + 0.1 * kl.mean()


@kernels
def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in (4, 4, 7):
        leaves = [normal(rows, 5, seed=i).float().requires_grad_() for i in (0, 1)]
        results = []
        for function in (compiled, step):
            value = function(*leaves)
            results.append([value, *torch.autograd.grad(value, leaves)])
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


@backends
def test_autocast_changes_nothing(backend):
    leaves = [normal(4, 33, seed=i).float().requires_grad_() for i in (0, 1)]
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=enabled):
            z, kl = tw.gaussian_sample(*leaves, seed=2)
            results.append([z, kl, *torch.autograd.grad(z.square().sum() + kl.sum(), leaves)])
    assert results[1][0].dtype == results[1][1].dtype == torch.float32
    assert all(map(torch.equal, *results))


@backends
def test_inputs_are_left_alone_and_results_are_their_own(backend):
    mean, logvar = normal(4, 9).float(), torch.full((4, 9), -INF)
    copies = mean.clone(), logvar.clone()
    z, kl = tw.gaussian_sample(mean, logvar, seed=1)
    z.add_(1)
    kl.add_(1)
    assert torch.equal(mean, copies[0]) and torch.equal(logvar, copies[1])


@kernels
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_functorch_raises(backend, transform):
    x = normal(3, 4).float()

    def loss(x):
        return tw.gaussian_sample(x, x, seed=1)[1].sum()

    with pytest.raises(RuntimeError, match="gaussian_sample.*torch.func"):
        torch.func.grad(loss)(x) if transform == "grad" else torch.vmap(loss)(x[None])


X = torch.zeros(3, 4)
BAD = [
    (dict(mean=[[0.0]]), TypeError, "mean.*list"),
    (dict(mean=X.int()), TypeError, "mean.*int32"),
    (dict(mean=torch.tensor(1.0)), ValueError, r"mean.*\(B, \.\.\.\).*\(\)"),
    (dict(logvar=0.0), TypeError, "logvar.*float"),
    (dict(logvar=X.double()), TypeError, "logvar.*float32.*float64"),
    (dict(logvar=X.to("meta")), ValueError, "logvar.*meta"),
    (dict(logvar=torch.zeros(5)), ValueError, r"logvar.*\(3, 4\).*\(5,\)"),
    (dict(logvar_range=(1.0, 0.0)), ValueError, r"logvar_range.*\(1\.0, 0\.0\)"),
    (dict(logvar_range=(NAN, 0.0)), ValueError, "logvar_range.*nan"),
    (dict(logvar_range=3.0), (TypeError, ValueError), "logvar_range"),
    (dict(logvar_range=(1.0,)), (TypeError, ValueError), "logvar_range"),
    (dict(logvar_range=("a", "b")), (TypeError, ValueError), "logvar_range"),
    (dict(seed=1.5), TypeError, "seed.*float"),
    (dict(seed=-(2**63) - 1), ValueError, "seed.*-9223372036854775809"),
    (dict(seed=torch.tensor([1, 2])), TypeError, r"seed.*\(2,\)"),
    (dict(row_offset=2.0), TypeError, "row_offset.*float"),
]


@cases.exact_backends
@pytest.mark.parametrize("arguments, error, message", BAD)
def test_bad_arguments_are_named(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        tw.gaussian_sample(**{"mean": X, "logvar": X, **arguments})
