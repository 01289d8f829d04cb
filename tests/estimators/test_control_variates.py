"""Controls that learn, and the conditional noise that they need."""

import torch

from tests.estimators.cases import LOGITS, curved
from tilewise import estimators, gumbel_argmax, gumbel_softmax
from tilewise.estimators import Categorical, _conditional
from tilewise.reference import _philox

ROWS = 300


def spread(name, **options):
    rows = Categorical(LOGITS.expand(4000, 4))
    return estimators.gradient(curved, rows, name, seed=99, **options).logits.var(0).sum()


def learn(estimator, parameters, steps=60, **options):
    optimizer = torch.optim.Adam(parameters, 0.1)
    for seed in range(steps):
        optimizer.zero_grad()
        rows = Categorical(LOGITS.expand(ROWS, 4))
        estimator(curved, rows, seed=seed, **options).mean().backward()
        optimizer.step()


def test_temperature_and_scale_of_rebar_learn_to_lower_the_variance():
    eta, tau = (torch.tensor(x, requires_grad=True) for x in (-0.5, 2.0))
    before = spread("rebar", eta=eta.detach(), tau=tau.detach())
    learn(estimators.rebar, [eta, tau], eta=eta, tau=tau)
    after = spread("rebar", eta=eta.detach(), tau=tau.detach())
    assert after < 0.5 * before and eta > 0


def test_control_of_relax_learns():
    class Control(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4))

        def forward(self, y):
            return (y * self.weight).sum(-1)

    control = Control()
    before = spread("relax", control=control)
    learn(estimators.relax, list(control.parameters()), control=control)
    assert spread("relax", control=control) < 0.6 * before
    assert abs(before - spread("score_function")) < 1e-4 * before  # no control: the plain one


def test_learning_a_control_leaves_f_alone():
    layer = torch.nn.Linear(4, 1)
    eta = torch.tensor(1.0, requires_grad=True)
    grads = []
    for learned in (eta, eta.detach()):
        layer.zero_grad()
        rows = Categorical(LOGITS.expand(5, 4))
        value = estimators.rebar(lambda y: layer(y).squeeze(-1).sin(), rows, eta=learned, seed=0)
        value.mean().backward()
        grads.append(layer.weight.grad.clone())
    torch.testing.assert_close(*grads)
    assert eta.grad.abs() > 0


def test_conditional_noise_has_the_law_of_what_it_is_conditioned_on():
    """Perturbed logits that are drawn, and drawn again given their argmax: all means agree."""
    logits = LOGITS.expand(20_000, 4)
    seed = torch.tensor(3)
    first = torch.softmax(logits + _philox.gumbel(seed, 20_000, 4, 0), -1)
    torch.testing.assert_close(first, gumbel_softmax(logits, seed=seed), rtol=1e-4, atol=1e-6)
    sample = torch.nn.functional.one_hot(gumbel_argmax(logits, seed=seed), 4).float()
    perturbed = _conditional.perturbed(logits, sample, seed, 1)
    assert torch.equal(perturbed.argmax(-1), first.argmax(-1))
    again = torch.softmax(perturbed, -1)
    for power in (1, 2, 3):  # of each category, given each argmax
        for winner in range(4):
            a, b = (x[sample[:, winner] == 1].pow(power) for x in (first, again))
            error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
            assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all()
    correlation = torch.corrcoef(torch.stack([first[sample[:, 0] == 1, 2],
                                              again[sample[:, 0] == 1, 2]]))  # fmt: skip
    assert abs(correlation[0, 1]) < 0.05
