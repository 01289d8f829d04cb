"""nn.ClipLoss against open_clip's."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import tilewise as tw
from benchmarks.baselines import open_clip_loss
from tests.common.peers import need


@pytest.fixture(scope="module")
def peer():
    need("open_clip", "torchvision")
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
        assert ours[: len(theirs)] == theirs
    arguments = [torch.randn(20, 8), torch.randn(20, 8), torch.tensor(3.0)]
    assert tw.nn.ClipLoss()(*arguments, output_dict=True).keys() == {"contrastive_loss"}
    with pytest.raises(RuntimeError, match="ClipLoss: expected an initialised process group"):
        tw.nn.ClipLoss(world_size=2)(*arguments)


def test_bias_has_a_gradient_of_zero():
    """As open_clip's, or DistributedDataParallel waits for it; of an infinite one too."""
    image, text = torch.eye(4), torch.eye(4)
    for value in (-10.0, float("inf")):
        bias = torch.tensor(value, requires_grad=True)
        loss = tw.nn.ClipLoss()(image, text, 2.0, bias)
        assert torch.equal(loss.detach(), tw.clip_loss(image, text, 2.0))
        loss.backward()
        assert bias.grad == 0


def test_unequal_batches_are_refused():
    for loss in (tw.nn.ClipLoss(), tw.nn.SigLipLoss()):
        with pytest.raises(ValueError, match="text_features: expected 4 rows.*got 3"):
            loss(torch.eye(4), torch.eye(4)[:3], 1.0)


def test_hooks_of_subclasses():
    """What they compute of logits and labels is the loss."""
    image, text = torch.eye(4), torch.eye(4).roll(1, 0) + 0.5
    clip, siglip = tw.nn.ClipLoss(), tw.nn.SigLipLoss()
    forth, back = clip.get_logits(image, text, 3.0, 1.0)
    labels = clip.get_ground_truth(image.device, 4)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(forth, labels) + cross_entropy(back, labels)) / 2
    torch.testing.assert_close(clip(image, text, 3.0), expected)
    for negative_only in (False, True):
        signs = siglip.get_ground_truth(image.device, image.dtype, 4, negative_only)
        logits = siglip.get_logits(image, text, 3.0, -1.0)
        expected = -torch.nn.functional.logsigmoid(signs * logits).sum() / 4
        torch.testing.assert_close(
            siglip._loss(image, text, 3.0, -1.0, negative_only=negative_only), expected
        )
    with pytest.raises(ValueError, match="dist_impl: expected one of bidir.*'nope'"):
        tw.nn.SigLipLoss(dist_impl="nope")
