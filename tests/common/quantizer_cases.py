"""Inputs, steps and comparisons that the tests of all quantisers share."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tilewise as tw
from tests.common.contrastive_cases import DEVICE

CLOSE = dict(rtol=2e-5, atol=3e-6)
LAYERS = 4
HEADS = dict(heads=2, codebook_dim=8)


def rows(*shape, seed=0):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(DEVICE)


def quantizer(**settings):
    torch.manual_seed(0)
    return tw.nn.VectorQuantizer(**{"dim": 16, "codebook_size": 32, **settings})


def step(module, x, loss_weight=3.0, **options):
    """One training step: the results, and the gradient of x."""
    x = x.clone().requires_grad_()
    result = module(x, **options)
    grad = rows(*x.shape, seed=9).to(x.dtype)
    ((result[0] * grad).sum() + loss_weight * result[2].sum()).backward()
    return result, x.grad


def assert_same_state(ours, theirs, **tolerance):
    for key, value in ours.state_dict().items():
        other = theirs.state_dict()[key]
        if other.dtype == torch.bool:  # lucidrains' `initted`; ours is a number, to be averaged
            other = other.to(value.dtype)
        torch.testing.assert_close(value, other, **(tolerance or CLOSE))


def assert_same_step(ours, theirs, x, loss_factor=1.0, **options):
    """Results and gradients of one step."""
    (q, index, loss), grad = step(ours, x, **options)
    (their_q, their_index, their_loss), their_grad = step(theirs, x, **options)
    assert torch.equal(index, their_index)
    for a, b in ((q, their_q), (loss, loss_factor * their_loss), (grad, their_grad)):
        torch.testing.assert_close(a, b, **CLOSE)


def assert_trains_alike(ours, theirs, steps):
    """Results, gradients and state of some steps of both; returns the last batch."""
    theirs.load_state_dict(ours.state_dict())
    for seed in range(steps):
        x = rows(4, 50, 16, seed=seed)
        assert_same_step(ours, theirs, x)
        assert_same_state(ours, theirs)
    return x


def residual(**settings):
    torch.manual_seed(0)
    default = dict(dim=16, codebook_size=32, num_quantizers=LAYERS)
    return tw.nn.ResidualVectorQuantizer(**{**default, **settings})


def grouped(**settings):
    torch.manual_seed(0)
    default = dict(dim=16, codebook_size=32, num_quantizers=LAYERS, groups=2)
    return tw.nn.GroupedResidualVectorQuantizer(**{**default, **settings})


class NoHostReads(TorchDispatchMode):
    """Refuses the operators that a GPU would have to be waited for."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonz")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        if func is torch.ops.aten.index.Tensor:  # how many rows a mask selects is data
            assert not any(x.dtype == torch.bool for x in args[1] if x is not None), func
        return func(*args, **(kwargs or {}))
