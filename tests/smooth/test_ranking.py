"""The k largest, ranks and sorted values beside torch's and scipy's."""

import pytest
import torch
from scipy.stats import rankdata

import tilewise as tw
from tilewise.smooth import _pairs


def coarse(rows=20, n=30):
    """Full of ties."""
    return torch.randint(-8, 8, (rows, n)).double()


def test_hard_twins():
    torch.manual_seed(0)
    x = coarse()
    assert torch.equal(tw.smooth.rank(x, 0), torch.tensor(rankdata(x.numpy(), axis=1)))
    assert torch.equal(
        tw.smooth.rank(x, 0, descending=True), torch.tensor(rankdata(-x.numpy(), axis=1))
    )
    assert torch.equal(tw.smooth.sort(x, 0), x.sort(-1).values)
    assert torch.equal(tw.smooth.sort(x, 0, descending=True), x.sort(-1, descending=True).values)
    y = torch.randn(20, 30)
    expected = torch.zeros(20, 30).scatter(1, y.topk(7).indices, 1.0)
    assert torch.equal(tw.smooth.topk(y, 7, 0), expected)


@pytest.mark.parametrize("tau", [0.01, 1.0, 100.0])
def test_sums_that_hold_at_every_temperature(tau):
    torch.manual_seed(0)
    x = coarse()
    for k in (1, 7, 29, 30):
        chosen = tw.smooth.topk(x, k, tau)
        torch.testing.assert_close(chosen.sum(-1), torch.full((20,), float(k)).double())
        assert (chosen >= 0).all() and (chosen <= 1).all()
    ranks = tw.smooth.rank(x, tau)
    torch.testing.assert_close(ranks.sum(-1), torch.full((20,), 465.0).double())
    torch.testing.assert_close(ranks + tw.smooth.rank(x, tau, descending=True),
                               torch.full_like(x, 31.0))  # fmt: skip


def test_topk_is_the_best_point_for_its_entropy():
    """Beside other points of the same sum."""
    torch.manual_seed(0)
    x, tau = torch.randn(8, dtype=torch.float64), 0.7

    def objective(y):
        return x @ y - tau * (torch.special.xlogy(y, y) + torch.special.xlogy(1 - y, 1 - y)).sum()

    best = tw.smooth.topk(x, 3, tau)
    for _ in range(50):
        change = torch.randn(8, dtype=torch.float64)
        other = best + 0.02 * (change - change.mean())
        assert objective(best) > objective(other.clamp(1e-9, 1 - 1e-9))


def test_topk_finds_the_threshold_in_float32_of_many():
    torch.manual_seed(0)
    for spread in (1e-3, 1.0, 1e3):
        chosen = tw.smooth.topk(spread * torch.randn(3, 10_000), 100, 0.1)
        torch.testing.assert_close(chosen.sum(-1), torch.full((3,), 100.0), rtol=1e-4, atol=0)


def test_rows_that_are_shorter_than_k_take_all():
    x = torch.randn(2, 5).requires_grad_()
    mask = torch.tensor([[True, False, False, True, False], [True] * 5])
    for tau in (0, 0.5):
        assert tw.smooth.topk(x, 3, tau, mask=mask)[0].tolist() == [1, 0, 0, 1, 0]
    tw.smooth.topk(x, 3, 0.5, mask=mask)[:, 0].sum().backward()
    assert not x.grad[0].any() and x.grad[1].any()


@pytest.mark.parametrize("name", ["rank", "sort"])
def test_pieces_are_the_whole(name, monkeypatch):
    """Values, gradients, and gradients of these."""
    function = getattr(tw.smooth, name)
    mask = torch.rand(3, 40) > 0.2
    results = []
    for pairs in (_pairs.PAIRS, 1000):
        monkeypatch.setattr(_pairs, "PAIRS", pairs)
        torch.manual_seed(0)
        x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
        found = function(x, 0.3, mask=mask)
        (first,) = torch.autograd.grad(found.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((found, first, second))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(whole, parts)


def test_memory_is_not_that_of_all_pairs():
    """What stays for the backward pass of 3000 elements are 9 million pairs, or none of them."""
    x = torch.randn(3000).requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = tw.smooth.rank(x)
    found.square().sum().backward()
    assert max(kept) <= 10_000 and x.grad.any()
