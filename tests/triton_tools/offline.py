"""Triton without a GPU: launches compile for an architecture of your choice, and run nothing."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tilewise.kernels import _common

if triton.knobs.runtime.interpret:
    raise ImportError("TRITON_INTERPRET is set: nothing would be compiled")


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, _common.warp_size(arch))


class _Driver:
    """What JITFunction asks a driver for before it compiles."""

    def __init__(self, arch: str):
        self.arch = arch

    def get_current_device(self):
        return self.arch  # a key: compiled kernels are kept by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return target_of(self.arch)


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[list]:
    """Yields a list that every launch inside the block appends its compiled kernel to.

    Launchers are called as they are, on CPU tensors; what they compute is meaningless.
    """
    launched: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launched.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return launched[-1]

    previous = driver._active
    driver.set_active(_Driver(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(_common, "architecture", lambda device: arch),
        ):
            yield launched
    finally:
        driver._active = previous
