"""What test_devices_gpu.py asks of a GPU, as far as the interpreter and counted launches tell."""

import pytest
import torch

import tilewise as tw
from tests.common.device_cases import STEPS, in_small_chunks
from tests.triton_tools.launches import counted

every_step = pytest.mark.parametrize("name", STEPS)


@every_step
def test_nothing_waits_for_the_device(name):
    """What reads a tensor's value on the host raises; launches do nothing."""
    step = STEPS[name](300, "cpu")
    with counted() as count:
        step()
    assert count.triton.total() > 0


def with_modules_slow():
    """They are made of ops, each of which is seen by itself."""
    for name in STEPS:
        yield pytest.param(name, marks=[pytest.mark.slow] if name.startswith("nn.") else [])


@pytest.mark.parametrize("name", list(with_modules_slow()))
def test_several_chunks_like_one_and_equal_bits(name, monkeypatch):
    step = STEPS[name](70, "cpu")
    with tw.backend("triton"):
        expected = step()
        in_small_chunks(monkeypatch, 70)
        found, again = step(), step()
    for ours, repeated, one in zip(found, again, expected, strict=True):
        assert torch.equal(ours, repeated)
        torch.testing.assert_close(ours.double(), one.double(), rtol=1e-4, atol=1e-5)
