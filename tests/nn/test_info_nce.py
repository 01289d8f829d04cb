"""nn.InfoNCELoss against sentence-transformers' formula; its temperature."""

import math

import pytest
import torch

import tilewise as tw
from benchmarks.baselines import sentence_transformers_loss


def rows(*shape: int) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.manual_seed(sum(shape)))).requires_grad_()


@pytest.mark.parametrize("negatives", [None, (9, 16), (12, 3, 16)], ids=str)
def test_equals_sentence_transformers(negatives):
    """Rows of any length; hard negatives by themselves, or some of each query."""
    leaves = [rows(12, 16), rows(12, 16) * 1.5] + ([rows(*negatives)] if negatives else [])
    columns = [x.flatten(0, -2) for x in leaves[1:]]
    expected = sentence_transformers_loss(leaves[0], columns, 20.0)
    ours = tw.nn.InfoNCELoss(temperature=0.05)(*leaves)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(x, leaves) for x in (ours, expected))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_temperature_learns():
    query, keys = rows(6, 8), rows(9, 8)
    loss = tw.nn.InfoNCELoss(0.07, learnable=True)
    assert list(loss.state_dict()) == ["logit_scale"] and "learnable=True" in repr(loss)
    fixed = tw.nn.InfoNCELoss(0.07)
    assert not fixed.state_dict()
    torch.testing.assert_close(loss(query, keys), fixed(query, keys))
    loss(query, keys).backward()
    other = tw.nn.InfoNCELoss(0.07, learnable=True)
    with torch.no_grad():
        other.logit_scale += 1e-3
        slope = (other(query, keys) - loss(query, keys)) / 1e-3
    assert float(loss.logit_scale.grad) == pytest.approx(float(slope), rel=0.05)
    assert loss.half().logit_scale.dtype == torch.float32


def test_options_reach_the_op():
    query, keys, more = rows(4, 8).detach(), rows(4, 8).detach() + 1, rows(3, 8).detach()
    ids = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 4, 1, 9, 4])
    loss = tw.nn.InfoNCELoss(0.5, normalize=False, label_smoothing=0.1)
    expected = tw.info_nce(
        query, torch.cat([keys, more]), 2.0, positives=ids, label_smoothing=0.1
    )
    torch.testing.assert_close(loss(query, keys, more, positives=ids), expected)


@pytest.mark.parametrize("options, message", [
    (dict(temperature=0), "temperature: expected more than 0, got 0"),
    (dict(temperature=-1.0), "temperature: .*-1"),
    (dict(temperature=math.nan), "temperature: .*nan"),
    (dict(label_smoothing=2), "label_smoothing: .*2"),
], ids=str)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tw.nn.InfoNCELoss(**options)
