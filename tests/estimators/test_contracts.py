"""What every estimator promises: values, f's own gradient, seeds, dtypes, masks, messages."""

import inspect

import pytest
import torch

from tests.common.contrastive_cases import DEVICE
from tests.estimators.cases import LOGITS, TWO, curved, normal
from tilewise import estimators
from tilewise.estimators import Categorical, Gaussian, gradient

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="its tensors were made on the CPU")
OPTIONS = {"relax": {"control": curved}, "exact": {}}
CATEGORICAL = (
    "exact", "score_function", "gumbel_softmax", "gumbel_rao", "straight_through", "reinmax",
    "rebar", "relax",
)  # fmt: skip
SAMPLED = pytest.mark.parametrize("name", CATEGORICAL[1:])
ALL = pytest.mark.parametrize("name", [*CATEGORICAL, "reparameterized"])


def call(name, f, distribution, **options):
    return getattr(estimators, name)(f, distribution, **OPTIONS.get(name, {}), **options)


def test_every_estimator_is_here_and_documented():
    functions = {k for k, v in vars(estimators).items() if inspect.isfunction(v)}
    assert functions == {*CATEGORICAL, "reparameterized", "gradient"}
    for name in functions:
        parts = ["Args:", "Returns:", "Cost:", "Raises:"]
        parts += ["Paper:"] * (name not in ("exact", "gradient"))
        for part in parts:
            assert part in getattr(estimators, name).__doc__, f"{name}: docstring lacks {part}"


@SAMPLED
def test_value_is_the_mean_of_f_over_one_hot_samples(name):
    if name == "gumbel_softmax":
        OPTIONS.setdefault(name, {"hard": True})
    d, seen = Categorical(TWO.expand(3, 2, 4)), []

    def f(y):
        seen.append(y.detach())
        return curved(y)

    found = call(name, f, d, num_samples=5, seed=7)
    one_hot = [y for y in seen if bool(((y == 0) | (y == 1)).all())]
    assert found.shape == (3,) and one_hot[0].shape == (5, 3, 2, 4)
    torch.testing.assert_close(found, curved(one_hot[0]).mean(0))
    first = call("score_function", lambda y: y[..., 0, 0], d, num_samples=5, seed=7)
    torch.testing.assert_close(first, one_hot[0][..., 0, 0].mean(0))  # one sample for all of them
    OPTIONS.pop("gumbel_softmax", None)


@ALL
def test_parameters_of_f_get_their_own_gradient(name):
    """That of the returned mean, with no noise of the estimator's."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1).double()
    d = Categorical(LOGITS.double().expand(3, 4).clone().requires_grad_())
    seen = []

    def f(y):
        seen.append(y.detach())
        return torch.tanh(layer(y).squeeze(-1))

    options = {} if name == "exact" else {"num_samples": 2, "seed": 0}
    if name == "reparameterized":
        mean = torch.zeros(3, 4).double().requires_grad_()
        d = Gaussian(mean, torch.zeros(3, 4).double())
    if name == "relax":
        options["control"] = f
        found = estimators.relax(f, d, **options)
    else:
        found = call(name, f, d, **options)
    found.sum().backward()
    sample = seen[0] if len(seen) == 1 else seen[-1]
    ours = layer.weight.grad.clone()
    if name == "exact":
        p = torch.softmax(d.logits.detach(), -1)
        expected = (p.T * f(torch.eye(4).double()[:, None].expand(4, 3, 4))).sum()
    else:
        expected = f(sample).mean(0).sum()
    layer.zero_grad()
    expected.backward()
    torch.testing.assert_close(ours, layer.weight.grad)
    assert d[0].grad.any()


@SAMPLED
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(name, dtype):
    logits = TWO.expand(3, 2, 4).to(dtype).clone().requires_grad_()
    found = call(name, lambda y: curved(y.float()), Categorical(logits), num_samples=2, seed=0)
    found.sum().backward()
    assert logits.grad.dtype == dtype and logits.grad.isfinite().all() and logits.grad.any()
    again = TWO.expand(3, 2, 4).clone().requires_grad_()
    other = call(name, curved, Categorical(again), num_samples=2, seed=0)
    other.sum().backward()
    torch.testing.assert_close(logits.grad.float(), again.grad, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("name", CATEGORICAL)
def test_masked_categories(name):
    """They are never drawn, get no gradient, and change nothing for the others."""
    masked = torch.tensor([0.5, -torch.inf, 0.3, 0.0]).expand(4, 4)
    options = {} if name == "exact" else {"num_samples": 50, "seed": 0}

    def f(y):
        assert not y[..., 1][..., 0].any() or name == "exact"
        return curved(y)

    found = gradient(f, Categorical(masked), name, **OPTIONS.get(name, {}), **options).logits
    assert found.isfinite().all() and not found[:, 1].any() and found[:, 0].any()


@SAMPLED
def test_seeds(name):
    d = Categorical(TWO.expand(3, 2, 4).clone().requires_grad_())

    def both(seed):
        value = call(name, curved, d, seed=seed)
        return value.detach(), torch.autograd.grad(value.sum(), d.logits)[0]

    for a, b in zip(both(5), both(torch.tensor(5)), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(both(5)[1], both(6)[1])
    torch.manual_seed(0)
    first = both(None)
    torch.manual_seed(0)
    assert torch.equal(first[1], both(None)[1]) and not torch.equal(first[1], both(None)[1])


@ALL
def test_works_where_nothing_is_differentiated(name):
    with torch.no_grad():
        d = normal(3) if name == "reparameterized" else Categorical(TWO.expand(3, 2, 4))
        f = (lambda z: z.sum(-1)) if name == "reparameterized" else curved
        assert not call(name, f, d).requires_grad


D = Categorical(torch.zeros(3, 4))
Z = Gaussian(torch.zeros(3, 4), torch.zeros(3, 4))


@pytest.mark.parametrize("make, error, message", [
    (lambda: estimators.reinmax(curved, Z), TypeError, "reinmax: expected a Cat.*got Gaussian"),
    (lambda: estimators.rebar(curved, D.logits), TypeError, "expected a Categorical, got Tensor"),
    (lambda: estimators.exact(curved, Z), TypeError, "exact: expected a Categorical"),
    (lambda: estimators.reparameterized(curved, D), TypeError, "expected a Gaussian, got Categ"),
    (lambda: estimators.reinmax(curved, Categorical(torch.zeros(4))), ValueError, "logits: expec"),
    (lambda: estimators.reinmax(curved, Categorical(D.logits.long())), TypeError, "logits: expec"),
    (lambda: estimators.reinmax(curved, D, 0), ValueError, "num_samples: expected at least 1"),
    (lambda: estimators.reinmax(curved, D, tau=0), ValueError, "tau: expected above 0, got 0"),
    (lambda: estimators.rebar(curved, D, tau=0.0), ValueError, "tau: expected above 0"),
    (lambda: estimators.gumbel_rao(curved, D, num_conditional=0), ValueError, "num_conditional"),
    (lambda: estimators.score_function(curved, D, baseline="mean"), ValueError, "baseline: expe"),
    (lambda: estimators.score_function(curved, D, baseline="leave_one_out"), ValueError,
     "num_samples: expected at least 2"),
    (lambda: estimators.score_function(curved, D, baseline=torch.zeros(5)), ValueError,
     r"baseline: expected to broadcast to \(1, 3\)"),
    (lambda: estimators.score_function(lambda y: y.sum(), D), ValueError,
     r"f: expected a value for each sample of each row, \(1, 3\), got \(\)"),
    (lambda: estimators.relax(curved, D, lambda y: 1.0), ValueError, "control: expected a value"),
    (lambda: estimators.exact(curved, Categorical(torch.zeros(1, 17, 2))), ValueError,
     "expected at most 65536 outcomes, got 2"),
    (lambda: estimators.MovingAverage(1.5), ValueError, "decay"),
])
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
