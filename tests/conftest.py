"""Fixtures of all tests, and what holds for every process that runs some of them."""

import importlib.util
import inspect
import os
import shutil
import tempfile

import pytest
import torch
import torch._functorch.config
from hypothesis import settings

from tests.common.contrastive_cases import DEVICE

# Files that a run on a device leaves out: of the CPU's backends and of the interpreter.
NOT_ON_A_DEVICE = ["*_cpu.py", "*_triton.py", "*/test_triton_tools.py"]

if DEVICE == "cpu":  # before anything imports triton or tilewise
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        import tests.triton_tools.interpreter  # noqa: F401  (its corrections)

    collect_ignore_glob = ["*_gpu.py"]
else:  # `make test-gpu`
    collect_ignore_glob = NOT_ON_A_DEVICE

IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ
# Inductor's cache is one for all processes of a run, and new in each run: what an earlier one left
# would hide a change.
OWN_CACHE = not IS_WORKER and "TORCHINDUCTOR_CACHE_DIR" not in os.environ
if OWN_CACHE:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="tilewise-inductor-")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# It need not make fast code, so it need not find out by building which vectors it could use.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
if hasattr(torch._functorch.config, "error_on_custom_op_aliasing"):
    torch._functorch.config.error_on_custom_op_aliasing = True  # as it is where CI=1
if IS_WORKER:  # a core each, for what they start too
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("fuzz", max_examples=5000, deadline=None)  # `make fuzz`
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_collection_modifyitems(items):
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid} is named after an address, so that no two processes agree on it: "
                "give the parameter an id"
            )
        # Tests that use several threads, or measure memory, don't run beside each other.
        in_threads = "threads" in inspect.signature(item.function).parameters
        if in_threads or item.get_closest_marker("alone"):
            item.add_marker(pytest.mark.xdist_group("alone"))


def pytest_unconfigure():
    if OWN_CACHE:
        shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


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


OWN_VARIABLES = ("ATEN_", "OMP_", "TILEWISE_", "TRITON_INTERPRET")


def process_state() -> dict:
    """What a test could leave behind for those after it, whichever these are."""
    from tilewise import _backend

    return {
        "backend": _backend._forced,
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "float32 products": torch.get_float32_matmul_precision(),
        "anomalies": torch.is_anomaly_enabled(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(OWN_VARIABLES)},
    }


@pytest.fixture(autouse=True)
def leaves_nothing_behind(default_device, poisoned_memory):
    """Tests run in any order, on any worker: none may change the process for the others."""
    before = process_state()
    yield
    after = process_state()
    changed = {name: after[name] for name in before if after[name] != before[name]}
    assert not changed, f"left behind: {changed}"


@pytest.fixture
def one_thread():
    """So little work in each op is done sooner than a second thread wakes up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
