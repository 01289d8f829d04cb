"""Triton without a GPU: launches compile for an architecture of your choice, and run nothing."""

import contextlib
import functools
import hashlib
import re
import subprocess
from collections.abc import Container, Iterator
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.triton_tools.figures import nvidia_tool
from tilewise.kernels import _common

if triton.knobs.runtime.interpret:
    raise ImportError("TRITON_INTERPRET is set: nothing would be compiled")


def target_of(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, _common.warp_size(arch))


@functools.cache
def compilers(arch: str) -> str:
    """The versions of what a kernel is compiled with; AMD's compiler is a part of Triton."""
    if not arch.startswith("sm_"):
        return f"triton {triton.__version__}"
    ptxas = "ptxas-blackwell" if int(arch.removeprefix("sm_")) >= 100 else "ptxas"
    version = subprocess.check_output([nvidia_tool(ptxas), "--version"], text=True)
    return f"triton {triton.__version__}, {re.search(r'V[0-9.]+', version)[0]}"


@functools.cache
def sources(kernel: JITFunction) -> str:
    """The text of a kernel and of all that it calls, without comments, and the constants there."""
    texts: dict[str, str] = {}
    todo = [("", kernel)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, tl.constexpr):
            texts[name] = repr(value.value)
        elif isinstance(value, JITFunction) and value.module.startswith("tilewise."):
            name = f"{value.module}.{value.fn.__name__}"
            if name not in texts:
                texts[name] = re.sub(r"[ \t]*#.*", "", value.src)
                todo += _globals(value)
    return "\n".join(f"{name}: {text}" for name, text in sorted(texts.items()))


def _globals(function: JITFunction) -> Iterator[tuple[str, object]]:
    """What a function may mean by the names in it, and by those in modules of ours."""
    names = function.fn.__code__.co_names
    for name in names:
        value = function.fn.__globals__.get(name)
        yield name, value
        if isinstance(value, ModuleType) and value.__name__.startswith("tilewise."):
            yield from ((f"{name}.{part}", getattr(value, part, None)) for part in names)


class Launched(NamedTuple):
    """A launch: what its kernel is made from, and what came out if it was compiled."""

    name: str
    made_from: str  # a hash of the sources, the arguments' types, constants, options and compilers
    products: bool
    binary: CompiledKernel | None


class Launches(list[Launched]):
    """Launches, and what was compiled for later ones: hashes, as `made_from`."""

    def __init__(self):
        super().__init__()
        self.prepared: set[str] = set()


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
def launching_for(arch: str, compiling: Container[str] | None = None) -> Iterator[Launches]:
    """Yields a list that every launch inside the block is added to.

    Those are compiled that are made from one of `compiling`; all, if it is None.

    What is compiled and not launched is not added, but to the list's attribute `prepared`.
    Launchers are called as they are, on CPU tensors; what they compute is meaningless.
    """
    launched = Launches()
    run = JITFunction.run

    def follow(self, *args, grid, warmup, **kwargs):
        binder = self.device_caches[arch][-1]
        _, types, options = binder(*args, **kwargs)
        recipe = sources(self), types, sorted(options.items()), arch, compilers(arch)
        made_from = hashlib.sha256(repr(recipe).encode()).hexdigest()[:10]
        if warmup:
            launched.prepared.add(made_from)
            return
        wanted = compiling is None or made_from in compiling
        binary = run(self, *args, grid=grid, warmup=True, **kwargs) if wanted else None
        products = "tl.dot(" in sources(self)
        launched.append(Launched(self.fn.__name__, made_from, products, binary))

    previous = driver._active
    driver.set_active(_Driver(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", follow),
            mock.patch.object(_common, "architecture", lambda device: arch),
        ):
            yield launched
    finally:
        driver._active = previous
