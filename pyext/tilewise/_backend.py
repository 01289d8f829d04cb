"""Which backend serves a call: the reference (plain PyTorch) or a kernel.

The choice is a module global that Python branches on: torch.compile guards on it, which a context
variable would not allow. It holds for the whole process, not for one thread.
"""

import contextlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tilewise import _extension

NAMES = ("auto", "reference", "cpu", "triton")

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
    if device.type != "cuda" and not _interpreted:
        return f"it serves CUDA tensors, these are on {device} (TRITON_INTERPRET=1 interprets it)"
    return None


def choose(device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend that serves a call: the forced one, else the fastest there is."""
    if _forced not in NAMES:
        raise ValueError(f"TILEWISE_BACKEND={_forced!r}: expected one of {', '.join(NAMES)}")
    name = _forced
    if name == "auto":
        name = "cpu" if device.type == "cpu" else "triton"
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
    library = torch.ops.tilewise_triton if chosen == "triton" else torch.ops.tilewise
    return getattr(library, name)


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
    """Prints which backend serves which op on this machine, and why the others do not."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    info = _extension.build_info()
    built = f"built for torch {info['torch']}, using {info['cpu_capability']}" if info else "absent"
    print(f"backend: {_forced}   C++ extension: {built}")
    for op in ops():
        for device in devices:
            for name in NAMES[1:]:
                print(f"  {op:16s} {device.type:5s} {name:10s} {why_not(name, device) or 'ready'}")
