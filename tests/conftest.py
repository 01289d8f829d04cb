"""Fixtures of all tests."""

import os

import pytest
import torch
from hypothesis import settings

from tests.common.contrastive_cases import DEVICE

if DEVICE == "cpu":  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import tests.triton_tools.interpreter  # noqa: F401  (its corrections)

    collect_ignore_glob = ["*_gpu.py"]
else:  # `make test-gpu`
    collect_ignore_glob = ["*_cpu.py", "*_triton.py", "test_triton_tools.py"]


settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("fuzz", max_examples=5000, deadline=None)  # `make fuzz`
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def default_device():
    """New tensors are made where the tests run."""
    torch.set_default_device(DEVICE if DEVICE != "cpu" else None)
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills every uninitialised tensor with NaN, so that an element left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
