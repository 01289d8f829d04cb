"""Baselines that learn."""

import pytest
import torch

from tests.estimators.cases import LOGITS, curved
from tilewise.estimators import Categorical, MovingAverage, score_function

D = Categorical(LOGITS.expand(50, 4))


def test_a_baseline_that_requires_a_gradient_moves_towards_f():
    critic = torch.nn.Parameter(torch.tensor(-3.0))
    optimizer = torch.optim.SGD([critic], 0.5)
    for seed in range(30):
        optimizer.zero_grad()
        score_function(curved, D, 4, baseline=critic, seed=seed).mean().backward()
        optimizer.step()
    p = torch.softmax(LOGITS, -1)
    assert critic.item() == pytest.approx((p * curved(torch.eye(4)[None])[0]).sum().item(), abs=0.2)


def test_a_learned_baseline_gets_the_gradient_of_its_error_alone():
    critic = torch.full((50,), 0.3, requires_grad=True)
    logits = LOGITS.expand(50, 4).clone().requires_grad_()
    values = score_function(curved, Categorical(logits), baseline=critic, seed=0)
    values.sum().backward()
    torch.testing.assert_close(critic.grad, 0.3 - values.detach())
    constant = LOGITS.expand(50, 4).clone().requires_grad_()
    score_function(curved, Categorical(constant), baseline=0.3, seed=0).sum().backward()
    torch.testing.assert_close(logits.grad, constant.grad)


def test_moving_average_is_of_what_came_before():
    average = MovingAverage(decay=0.9)
    assert average() == 0
    means = []
    for seed in range(3):
        plain = score_function(curved, D, seed=seed)
        found = score_function(curved, D, seed=seed, baseline=average)
        assert torch.equal(plain, found)
        means.append(plain.mean())
    weights = torch.tensor([0.81, 0.9, 1.0])
    expected = (weights * torch.stack(means)).sum() / weights.sum()
    torch.testing.assert_close(average(), expected)
    copy = MovingAverage()
    copy.load_state_dict(average.state_dict())
    assert copy() == average()


def test_leave_one_out_of_two_is_their_difference():
    logits = LOGITS.expand(50, 4).clone().requires_grad_()
    seen = []
    found = score_function(
        lambda y: seen.append(y) or curved(y), Categorical(logits), 2, baseline="leave_one_out"
    )
    found.sum().backward()
    f, p = curved(seen[0]), torch.softmax(LOGITS, -1)
    score = seen[0] - p
    expected = ((f[0] - f[1])[:, None] * (score[0] - score[1])) / 2
    torch.testing.assert_close(logits.grad, expected, rtol=1e-4, atol=1e-6)
