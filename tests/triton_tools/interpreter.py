"""Triton's interpreter, with `tl.dot`, `tl.fma` and casts that round the way the hardware does.

Needs TRITON_INTERPRET=1 from before triton is imported; conftest.py sets it. As it comes (3.7.1)
the interpreter multiplies the bit patterns of bfloat16, cuts float32 to bfloat16 instead of
rounding, reads subnormal bfloat16 wrongly, ignores `input_precision` and `round_f32_to_tf32`, and
rounds a fused product before it adds. It also spends two thirds of its time on what changes
nothing: see shortcuts.py.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

if not isinstance(tl.cdiv, interpreter.InterpretedFunction):
    raise ImportError("triton was imported without TRITON_INTERPRET=1: nothing is interpreted")

_convert_float = interpreter._convert_float
_implicit_cvt = interpreter._implicit_cvt
_descriptor_load = interpreter.InterpreterBuilder.create_descriptor_load
_create_fma = interpreter.InterpreterBuilder.create_fma


def round_to_tf32(x):
    """10 bits of mantissa; to nearest, ties away from zero, as cvt.rna.tf32 does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def cut_to_tf32(x):
    """What matrix units make of a float32 that was not rounded before."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(
        np.float32
    )


def round_to_bfloat16(x):
    """Bit patterns of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits += 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
    return np.where(np.isnan(x), 0x7FC0, bits >> np.uint64(16)).astype(np.uint16)


def bfloat16_to_float32(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _convert(x, from_type, to_type, rounding_mode):
    if from_type == tl.float32 and to_type == tl.bfloat16:
        return round_to_bfloat16(x).reshape(np.shape(x))
    if from_type == tl.bfloat16 and to_type in (tl.float32, tl.float64):
        values = bfloat16_to_float32(x)
        return values if to_type == tl.float32 else values.astype(np.float64)
    return _convert_float(x, from_type, to_type, rounding_mode)


def _argument(value):
    converted = _implicit_cvt(value)
    if isinstance(value, interpreter.TensorDescriptor):
        rounds = getattr(value, "round_f32_to_tf32", False)  # Triton has it from 3.7 on
        converted.handle.rounds_to_tf32 = rounds
    return converted


def _load(self, descriptor, *arguments):
    loaded = _descriptor_load(self, descriptor, *arguments)
    if descriptor.rounds_to_tf32:
        loaded.data = round_to_tf32(loaded.data)
    return loaded


def _values(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return bfloat16_to_float32(handle.data)
    return handle.data


def _product(a, b, precision):
    if "TF32" not in precision:
        return a @ b
    if "X3" not in precision:
        return cut_to_tf32(a) @ cut_to_tf32(b)
    a_high, b_high = round_to_tf32(a), round_to_tf32(b)
    a_low, b_low = round_to_tf32(a - a_high), round_to_tf32(b - b_high)
    return a_low @ b_high + a_high @ b_low + a_high @ b_high


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    precision = str(input_precision).upper() if a.dtype.scalar == tl.float32 else ""
    x, y = _values(a), _values(b)
    dtype = np.result_type(x.dtype, d.data.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        product = _product(x.astype(dtype), y.astype(dtype), precision)
        return interpreter.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)


def _fma(self, x, y, z):
    if z.dtype.scalar != tl.float32:
        return _create_fma(self, x, y, z)
    with np.errstate(invalid="ignore", over="ignore"):  # float64 holds the product as it is
        total = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(total.astype(np.float32), z.dtype.scalar)


def _make_function(self, function, **options):
    _interpreted(self, function, **options)
    del self.run  # each had its own, which no one could replace for all


def _run(self, *args, grid, warmup=False, **kwargs):
    if not warmup:
        interpreter.GridExecutor(self.rewrite(), self.arg_names, grid)(*args, **kwargs)


if not hasattr(interpreter.InterpretedFunction, "run"):  # before Triton 3.7
    _interpreted = interpreter.InterpretedFunction.__init__
    interpreter.InterpretedFunction.__init__ = _make_function
    interpreter.InterpretedFunction.run = _run
    interpreter.InterpretedFunction.__getitem__ = lambda self, grid: functools.partial(
        self.run, grid=grid, warmup=False
    )
    interpreter.InterpretedFunction.warmup = functools.partialmethod(_run, warmup=True)
interpreter._convert_float = _convert
interpreter._implicit_cvt = _argument
interpreter.InterpreterBuilder.create_descriptor_load = _load
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.create_fma = _fma
if hasattr(interpreter, "_LangPatchScope"):  # the Triton that they were made for
    from tests.triton_tools import shortcuts  # noqa: F401
