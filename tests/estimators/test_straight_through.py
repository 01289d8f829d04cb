"""Made-up gradients against their formulas."""

import torch

from tests.estimators.cases import LOGITS
from tilewise.estimators import Categorical, gradient, gumbel_rao, reinmax, straight_through

SLOPE = torch.tensor([0.3, -1.0, 2.0, 0.5])


def f(y):
    """Its slope depends on the sample."""
    return (SLOPE * y).sum(-1).exp()


def jacobian(p):
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def test_formulas_at_a_temperature():
    tau, rows = 0.6, Categorical(LOGITS.expand(40, 4))
    p, q = torch.softmax(LOGITS, -1), torch.softmax(LOGITS / tau, -1)
    seen = []

    def keeping(y):
        seen.append(y.detach())
        return f(y)

    ours = gradient(keeping, rows, straight_through, tau=tau, seed=2).logits
    slope = (SLOPE * f(seen[0])[..., None])[0]
    torch.testing.assert_close(ours, slope @ jacobian(q) / tau)
    ours = gradient(f, rows, reinmax, tau=tau, seed=2).logits
    expected = 2 * jacobian((seen[0][0] + q) / 2) - jacobian(p) / 2
    torch.testing.assert_close(ours, (slope[:, None] @ expected).squeeze(1))


def test_reinmax_and_gumbel_rao_cost_one_call_of_f():
    for estimator in (straight_through, reinmax, gumbel_rao):
        calls = []
        gradient(lambda y, calls=calls: calls.append(len(y)) or f(y), Categorical(LOGITS[None]),
                 estimator, 7)  # fmt: skip
        assert calls == [7]
