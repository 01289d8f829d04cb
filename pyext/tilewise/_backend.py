"""Which backend serves a call: the reference (plain PyTorch) or a kernel.

The choice is a module global that Python branches on: torch.compile guards on it, which a context
variable would not allow. It holds for the whole process, not for one thread.
"""

import contextlib
import functools
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tilewise import _extension

OLDEST = (8, 0)  # compute capability: Ampere's bfloat16, and what Triton still compiles for
NAMES = ("auto", "reference", "cpu", "triton")

# Ops that multiply matrices of features, in bfloat16 where the CPU does.
_PRODUCTS = ("clip_loss", "hard_negatives", "info_nce", "itc_loss", "sigmoid_loss")

_forced = os.environ.get("TILEWISE_BACKEND", "auto")
_has_triton = importlib.util.find_spec("triton") is not None  # looks, does not import
_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_warned: set[str] = set()


def why_not(name: str, device: torch.device) -> str | None:
    """What keeps backend `name` from serving tensors on `device`; None if nothing does."""
    if name == "reference":
        return None
    if name == "cpu":
        if device.type != "cpu":
            return f"it serves CPU tensors, these are on {device}"
        return _extension.why_missing
    if not _has_triton:
        return "Triton is not installed"
    if device.type == "cuda":
        return _too_old(device.index)
    if not _interpreted:
        return f"it serves CUDA tensors, these are on {device} (TRITON_INTERPRET=1 interprets it)"
    return None


def _too_old(index: int | None) -> str | None:
    return _lacks(index)


# As torch.compiler.assume_constant_result does, which imports dynamo, in seconds, at once.
_too_old._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _lacks(index: int | None) -> str | None:
    """What a GPU lacks; None if kernels run there."""
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip or capability >= OLDEST:
        return None
    number, oldest = (".".join(map(str, x)) for x in (capability, OLDEST))
    return f"{torch.cuda.get_device_name(index)} has compute capability {number}, it needs {oldest}"


def _wanted(device: torch.device) -> str:
    if _forced not in NAMES:
        raise ValueError(f"TILEWISE_BACKEND={_forced!r}: expected one of {', '.join(NAMES)}")
    if _forced != "auto":
        return _forced
    return "cpu" if device.type == "cpu" else "triton"


def choose(device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend that serves a call: the forced one, else the fastest there is."""
    if _forced == "auto" and not _extension.why_missing and device.type == "cpu":
        return "cpu"  # the usual case, at once
    name = _wanted(device)
    reason = why_not(name, device)
    if name == "triton" and torch.float64 in dtypes:
        reason = reason or "it has no float64"
    if not reason:
        return name
    if _forced != "auto":
        raise RuntimeError(f"backend {_forced!r} was asked for but can't serve: {reason}")
    _warn_once(f"no kernel serves this call ({reason}); the PyTorch reference does, which is "
               "slow and stores the whole matrix")
    return "reference"


def operator(name: str, device: torch.device, *dtypes: torch.dtype) -> Callable[..., Any] | None:
    """The dispatcher's operator that serves a call of op `name`; None: the reference does.

    Raises:
        RuntimeError: inside a torch.func transform, which a registered formula does not pass on.
    """
    chosen = choose(device, *dtypes)
    if chosen == "reference":
        return None
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack():
        raise RuntimeError(
            f"tilewise.{name} does not support torch.func transforms (grad, vmap, jvp); "
            "call it under `with tilewise.backend('reference'):`"
        )
    # On a GPU `tilewise` leads to Triton too, and has its autograd formula in C++.
    interpreted = chosen == "triton" and device.type != "cuda"
    library = torch.ops.tilewise_triton if interpreted else torch.ops.tilewise
    return getattr(library, name).default


def triton_operator(
    name: str, device: torch.device, *dtypes: torch.dtype
) -> Callable[..., Any] | None:
    """The operator of what modules have a kernel for in Triton alone; None where others serve."""
    if choose(device, *dtypes) != "triton":
        return None
    return operator(name, device, *dtypes)


def _warn_once(message: str) -> None:
    if message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        warnings.warn(f"tilewise: {message}", stacklevel=5)


@contextlib.contextmanager
def backend(name: str):
    """Forces one backend for every call inside the block, in all threads.

    Args:
        name: `"reference"` (plain PyTorch, stores the whole matrix, can be differentiated twice),
            `"cpu"` (C++), `"triton"`, or `"auto"` (the fastest one that serves the call's device).

    Raises:
        ValueError: there is no backend of that name.

    A forced backend that is missing on this machine raises RuntimeError when an op is called.
    The environment variable `TILEWISE_BACKEND` sets the initial choice.

    Example:
        >>> with tw.backend("reference"):
        ...     loss = tw.sigmoid_loss(image_features, text_features, logit_scale)
    """
    global _forced
    if name not in NAMES:
        raise ValueError(f"backend {name!r}: expected one of {', '.join(NAMES)}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def ops() -> list[str]:
    """The names of all ops: each is a function of the reference."""
    reference = importlib.import_module("tilewise.reference")
    return sorted(n for n, f in vars(reference).items() if inspect.isfunction(f) and n[0] != "_")


def backends() -> None:
    """Prints what serves each op on this machine, and why the other backends do not."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    print(f"backend: {_forced}   torch {torch.__version__}")
    table = [("op", *(f"{device.type.upper()} tensors" for device in devices))]
    table += [(op, *(_serves(op, device) for device in devices)) for op in ops()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    if reason := _extension.why_missing:
        print(f"cpu doesn't serve: {reason}")
    if not _has_triton:
        print("triton doesn't serve: Triton is not installed")
    elif len(devices) > 1 and (reason := why_not("triton", devices[1])):
        print(f"triton doesn't serve: {reason}")
    elif len(devices) == 1 and not _interpreted:
        print("triton doesn't serve: there is no CUDA device (TRITON_INTERPRET=1 interprets it)")


def _serves(op: str, device: torch.device) -> str:
    """The backend that serves float32 tensors on a device, and with what."""
    name = _wanted(device)
    if why_not(name, device):
        name = "reference" if _forced == "auto" else f"none ({name} was asked for)"
    if name == "reference":
        return "reference: PyTorch, slow"
    if name == "triton":
        return "triton, interpreted" if _interpreted else name
    if name != "cpu":
        return name
    info = _extension.build_info()
    with_what = f"cpu: C++ {info['cpu_capability']}"
    if op == "nearest_code":
        return f"{with_what}, integer unit {info['integer_unit']}"
    if op in _PRODUCTS:
        unit = info["bfloat16_unit"]
        how = "as float32" if unit == "none" else f"with {unit}"
        return f"{with_what}, multiplies bfloat16 {how}"
    return with_what
