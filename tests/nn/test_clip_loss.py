"""nn.ClipLoss against open_clip's."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import tilewise as tw
from benchmarks.baselines import open_clip_loss


@pytest.fixture(scope="module")
def peer():
    return open_clip_loss().ClipLoss


def test_module_equals_open_clip(peer):
    results = []
    for module in (peer(), tw.nn.ClipLoss()):
        torch.manual_seed(0)
        leaves = [F.normalize(torch.randn(37, 24), dim=1).requires_grad_() for _ in range(2)]
        leaves.append(torch.tensor(14.3, requires_grad=True))
        loss = module(*leaves)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_module_takes_open_clips_arguments(peer):
    for method in ("__init__", "forward"):
        theirs, ours = (
            [(p.name, p.default) for p in inspect.signature(getattr(x, method)).parameters.values()]
            for x in (peer, tw.nn.ClipLoss)
        )
        assert ours == theirs
    arguments = [torch.randn(20, 8), torch.randn(20, 8), torch.tensor(3.0)]
    assert tw.nn.ClipLoss()(*arguments, output_dict=True).keys() == {"contrastive_loss"}
    with pytest.raises(NotImplementedError, match="world_size=2"):
        tw.nn.ClipLoss(world_size=2)
