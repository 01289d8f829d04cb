"""Triton's interpreter without what takes two thirds of its time and changes no result.

The language is patched for a launch, and was again by each device function that it calls; what
these patched was never restored. Types and shapes are made once.
"""

import dataclasses
import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_patch_language = interpreter._patch_lang
_launch: "_Scope | None" = None  # the patches that are in force


class _Scope(interpreter._LangPatchScope):
    def __init__(self):
        super().__init__()
        self.modules: set[str] = set()

    def restore(self):
        global _launch
        super().restore()
        _launch = None


@functools.cache
def _language_modules(function) -> frozenset[str]:
    """Those that a function may name."""
    values = function.__globals__.values()
    return frozenset(value.__name__ for value in values if value is tl or value is tl.core)


def _patch_language_once(function):
    global _launch
    _launch = _launch or _Scope()
    modules = _language_modules(function)
    if not modules <= _launch.modules:
        _launch._changes += _patch_language(function)._changes
        _launch.modules |= modules
    return _launch


_find_numpy_dtype = interpreter._get_np_dtype
_numpy_dtypes: dict[str, np.dtype] = {}


def _numpy_dtype(type_):
    """From a table that is not made anew in each call."""
    name = type_.scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _find_numpy_dtype(type_)
    return _numpy_dtypes[name]


@functools.cache
def _block(shape: tuple[int, ...]) -> tuple:
    """What every tensor of a shape has."""
    shown = tl.tuple([tl.constexpr(size) for size in shape])
    return shown, tl.constexpr(int(np.prod(shape, dtype=np.int64)))


def _make_tensor(self, handle, type_):
    self.handle, self.type, self.dtype = handle, type_, type_.scalar
    self.shape, self.numel = _block(tuple(type_.shape) if type_.is_block() else ())


_make_block_type = tl.block_type.__init__
_block_types: dict[tuple, dict] = {}


def _make_known_block_type(self, element_ty, shape):
    sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
    known = _block_types.get((element_ty.name, sizes))
    if known is None:
        _make_block_type(self, element_ty, shape)
        known = _block_types[element_ty.name, sizes] = dict(vars(self))
    vars(self).update(known)


tl.tensor.__init__ = _make_tensor
tl.block_type.__init__ = _make_known_block_type
interpreter._patch_lang = _patch_language_once
interpreter._get_np_dtype = _numpy_dtype
# Sums are computed once more, in int64, for an assertion that is not looked at.
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
