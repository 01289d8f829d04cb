"""Means against sums over all outcomes and closed forms: what is unbiased, and what is when."""

import pytest
import torch

from tests.common.contrastive_cases import DEVICE
from tests.estimators.cases import (
    LOGITS,
    TWO,
    curved,
    errors,
    estimates,
    linear,
    normal,
    quadratic,
    step,
    truth,
)  # fmt: skip
from tilewise import estimators
from tilewise.estimators import Categorical, Gaussian, MovingAverage, gradient

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="its tensors were made on the CPU")
SHAPES = pytest.mark.parametrize("logits", [LOGITS, TWO], ids=["one", "two variables"])
UNBIASED = [
    ("score_function", {}),
    ("score_function", {"baseline": 0.7}),
    ("score_function", {"baseline": "leave_one_out", "num_samples": 2}),
    ("score_function", {"baseline": MovingAverage()}),
    ("rebar", {}),
    ("rebar", {"tau": 2.0, "eta": 0.4, "num_samples": 2}),
    ("relax", {"control": lambda y: y[..., 0].flatten(2).sum(-1).exp()}),
]

NAMES = ["none", "constant", "leave one out", "moving average", "rebar", "rebar 2", "relax"]


@SHAPES
@pytest.mark.parametrize("name, options", UNBIASED, ids=NAMES)
def test_unbiased(name, options, logits):
    """Within four standard errors of the sum over all outcomes."""
    if isinstance(options.get("baseline"), MovingAverage):
        estimates(curved, logits, name, seed=1, **options)  # fills it
        assert options["baseline"]() > 0.1
    if "control" in options and logits.dim() == 1:
        options = {"control": lambda y: y[..., 0].exp()}
    found = estimates(curved, logits, name, **options)
    assert errors(found, truth(curved, logits)).max() < 4


@pytest.mark.parametrize("name, options", [UNBIASED[0], UNBIASED[2]], ids=str)
def test_functions_without_a_slope(name, options):
    assert errors(estimates(step, LOGITS, name, **options), truth(step, LOGITS)).max() < 4
    assert truth(step, LOGITS).abs().max() > 0.1
    control = {"control": lambda y: torch.sigmoid(4 * (linear(y) - 0.25))}
    assert errors(estimates(step, LOGITS, "relax", **control), truth(step, LOGITS)).max() < 4


@SHAPES
@pytest.mark.parametrize("name, options", [
    ("gumbel_softmax", {}), ("gumbel_softmax", {"hard": True}), ("gumbel_rao", {}),
    ("straight_through", {}), ("reinmax", {}),
], ids=str)  # fmt: skip
def test_biased_ones_are(name, options, logits):
    assert errors(estimates(curved, logits, name, **options), truth(curved, logits)).max() > 10


def test_straight_through_is_exact_for_linear_functions():
    found = estimates(linear, LOGITS, "straight_through")
    torch.testing.assert_close(found, truth(linear, LOGITS).expand_as(found), rtol=0, atol=1e-6)
    assert errors(estimates(quadratic, LOGITS, "straight_through"),
                  truth(quadratic, LOGITS)).max() > 10  # fmt: skip


@SHAPES
@pytest.mark.parametrize("f", [linear, quadratic])
def test_reinmax_is_unbiased_for_quadratic_functions(f, logits):
    assert errors(estimates(f, logits, "reinmax"), truth(f, logits)).max() < 4


def test_bias_of_gumbel_softmax_falls_with_the_temperature_and_its_variance_grows():
    expected = truth(quadratic, LOGITS)
    found = [estimates(quadratic, LOGITS, "gumbel_softmax", tau=tau) for tau in (1.0, 0.5, 0.2)]
    bias = [(x.mean(0) - expected).norm() for x in found]
    spread = [x.var(0).sum() for x in found]
    assert bias[0] > 1.3 * bias[1] and bias[1] > 1.3 * bias[2]
    assert spread[2] > 2 * spread[1] and spread[1] > 2 * spread[0]


def test_gumbel_rao_has_the_mean_of_what_it_averages_and_less_variance():
    options = {"tau": 0.3}
    plain = estimates(curved, LOGITS, "gumbel_softmax", hard=True, **options)
    averaged = estimates(curved, LOGITS, "gumbel_rao", num_conditional=20, **options)
    difference = plain - averaged  # of the same samples
    assert errors(difference, torch.zeros(4)).max() < 4
    assert averaged.var(0).sum() < 0.7 * plain.var(0).sum()
    once = estimates(curved, LOGITS, "gumbel_rao", num_conditional=1, **options)
    assert once.var(0).sum() == pytest.approx(plain.var(0).sum().item(), rel=0.15)


def test_baselines_and_controls_lower_the_variance():
    spread = {
        key: estimates(lambda y: 5 + curved(y), LOGITS, name, **options).var(0).sum()
        for key, name, options in (
            ("none", "score_function", {"num_samples": 4}),
            ("mean", "score_function", {"num_samples": 4, "baseline": 5.5}),
            ("others", "score_function", {"num_samples": 4, "baseline": "leave_one_out"}),
            ("rebar", "rebar", {"num_samples": 4, "tau": 2.0, "eta": 0.5}),
        )
    }
    assert spread["none"] > 5 * spread["mean"] and spread["none"] > 5 * spread["others"]
    assert spread["none"] > 3 * spread["rebar"]


def test_variance_falls_as_one_over_the_samples():
    one, many = (
        estimates(curved, LOGITS, "score_function", num_samples=n).var(0).sum() for n in (1, 16)
    )
    assert one / many == pytest.approx(16, rel=0.15)


@pytest.mark.parametrize("name, options", [
    ("reparameterized", {}), ("score_function", {}),
    ("score_function", {"baseline": "leave_one_out", "num_samples": 3}),
    ("score_function", {"baseline": 5.0}),
], ids=str)  # fmt: skip
def test_gaussian_against_the_closed_form(name, options):
    """E sum w (z - a)^2 = sum w ((mean - a)^2 + exp(logvar))."""
    weights, target = torch.tensor([1.0, -0.5, 0.3]), torch.tensor([1.0, 0.0, -1.0])
    found = gradient(
        lambda z: (weights * (z - target).square()).sum(-1), normal(), name, seed=0, **options
    )
    mean, logvar = (x[0] for x in normal())
    assert isinstance(found, Gaussian)
    assert errors(found.mean.double(), 2 * weights * (mean - target)).max() < 4
    assert errors(found.logvar.double(), weights * logvar.exp()).max() < 4


def test_gaussian_with_one_variance_for_all():
    mean, logvar = torch.zeros(5, 3), torch.zeros(3)
    for name in ("reparameterized", "score_function"):
        found = gradient(lambda z: z.square().sum(-1), Gaussian(mean, logvar), name, 4000, seed=0)
        assert found.logvar.shape == (3,)  # 5 rows share it
        torch.testing.assert_close(found.logvar, torch.full((3,), 5.0), rtol=0.1, atol=0)


def test_names_and_functions_are_the_same():
    d = Categorical(TWO[None])
    for name in ("score_function", "gumbel_softmax", "reinmax"):
        results = [gradient(curved, d, x, 2, seed=3) for x in (name, getattr(estimators, name))]
        assert torch.equal(results[0].logits, results[1].logits)
    with pytest.raises(ValueError, match="there is no 'reinforce'"):
        gradient(curved, d, "reinforce")
    with pytest.raises(ValueError, match="there is no 'Categorical'"):
        gradient(curved, d, "Categorical")


def test_no_parameter_gets_a_gradient_from_looking():
    layer = torch.nn.Linear(4, 1)
    logits = LOGITS[None].clone().requires_grad_()
    with torch.no_grad():
        found = gradient(lambda y: layer(y).squeeze(-1), Categorical(logits), "reinmax").logits
    assert found.any() and layer.weight.grad is None and logits.grad is None
