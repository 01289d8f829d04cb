"""Which room serves a call: the reference (plain PyTorch) or a kernel.

The choice is a module global that Python branches on: torch.compile guards on it, which a context
variable would not allow. It holds for the whole process, not for one thread.
"""

import contextlib
import os
import warnings

import torch

from tilewise import _extension

NAMES = ("auto", "reference", "cpu")
OPS = ("sigmoid_loss",)

_forced = os.environ.get("TILEWISE_BACKEND", "auto")
_warned: set[str] = set()


def why_not(room: str, device: torch.device) -> str | None:
    """What keeps `room` from serving tensors on `device`; None if nothing does."""
    if room == "reference":
        return None
    if device.type != "cpu":
        return f"it serves CPU tensors, these are on {device}"
    return _extension.why_missing


def choose(device: torch.device) -> str:
    """The room that serves a call on `device`: the forced one, else the fastest there is."""
    if _forced not in NAMES:
        raise ValueError(f"TILEWISE_BACKEND={_forced!r}: expected one of {', '.join(NAMES)}")
    reason = why_not("cpu" if _forced == "auto" else _forced, device)
    if _forced != "auto":
        if reason:
            raise RuntimeError(f"backend {_forced!r} was asked for but can't serve: {reason}")
        return _forced
    if reason:
        _warn_once(f"no kernel serves this call ({reason}); the PyTorch reference does, which is "
                   "slow and stores the whole matrix")
        return "reference"
    return "cpu"


def _warn_once(message: str) -> None:
    if message not in _warned and not torch.compiler.is_compiling():
        _warned.add(message)
        warnings.warn(f"tilewise: {message}", stacklevel=4)


@contextlib.contextmanager
def backend(name: str):
    """Forces one room for every call inside the block, in all threads.

    Args:
        name: `"reference"` (plain PyTorch, stores the whole matrix, can be differentiated twice),
            `"cpu"` (C++), or `"auto"` (the fastest one that serves the call's device).

    Raises:
        ValueError: there is no room of that name.

    A forced room that is missing on this machine raises RuntimeError when an op is called.
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


def backends() -> None:
    """Prints which room serves which op on this machine, and why the others do not."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    info = _extension.build_info()
    built = f"built for torch {info['torch']}, using {info['cpu_capability']}" if info else "absent"
    print(f"backend: {_forced}   C++ extension: {built}")
    for op in OPS:
        for device in devices:
            for room in NAMES[1:]:
                print(f"  {op:16s} {device.type:5s} {room:10s} {why_not(room, device) or 'ready'}")
