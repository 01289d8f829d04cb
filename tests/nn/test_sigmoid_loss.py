"""Modules against the packages that they replace."""

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
    return open_clip_loss().SigLipLoss


def features(count=37, dim=24):
    torch.manual_seed(0)
    leaves = [F.normalize(torch.randn(count, dim), dim=1) for _ in range(2)]
    return [x.requires_grad_() for x in (*leaves, torch.tensor(10.0), torch.tensor(-10.0))]


@pytest.mark.parametrize("bias", [True, False])
def test_siglip_loss_equals_open_clip(peer, bias):
    results = []
    for module in (peer(), tw.nn.SigLipLoss()):
        leaves = features()[: 4 if bias else 3]
        loss = module(*leaves, *([] if bias else [None]))
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_siglip_loss_takes_open_clips_arguments(peer):
    theirs, ours = (inspect.signature(module) for module in (peer, tw.nn.SigLipLoss))
    assert list(ours.parameters)[: len(theirs.parameters)] == list(theirs.parameters)
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].default == parameter.default, name
    theirs, ours = (inspect.signature(module.forward) for module in (peer, tw.nn.SigLipLoss))
    assert list(ours.parameters) == list(theirs.parameters)
    tw.nn.SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="shift", chunk_size=256)


def test_output_dict(peer):
    arguments = [x.detach() for x in features()]
    theirs = peer()(*arguments, output_dict=True)
    ours = tw.nn.SigLipLoss()(*arguments, output_dict=True)
    assert ours.keys() == theirs.keys()


def test_several_processes_need_a_group():
    with pytest.raises(RuntimeError, match="SigLipLoss: expected an initialised process group"):
        tw.nn.SigLipLoss(rank=0, world_size=2)(*features())
