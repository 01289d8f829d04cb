"""What the launchers of all Triton kernels share: tiles, precision, operands, products."""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# torch.get_float32_matmul_precision() in tl.dot's words. "high" lets a factor be a sum of two
# shorter numbers: that is tf32x3.
_PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
# Whether torch.addmm(out_dtype=float32) takes half precision beside a float32 `self`.
ADDS_TO_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
# Descriptors whose copies round float32 to tf32: from Triton 3.7 on.
DESCRIPTORS_ROUND = "round_f32_to_tf32" in inspect.signature(TensorDescriptor).parameters


# Architectures that take another one's tiles.
_ALIKE = {
    "sm_87": "sm_86", "sm_103": "sm_100", "sm_110": "sm_100", "sm_121": "sm_120",
    "gfx950": "gfx942",
}


class Tile(NamedTuple):
    """The block of results that one program computes, and how."""

    rows: int
    cols: int
    depth: int  # elements of D per step
    pieces: int  # the epilogue takes cols / pieces columns at a time, which saves registers
    warps: int
    stages: int
    tma: bool = False  # features come by tensor descriptors: fewer registers and instructions


class Tiles(NamedTuple):
    """What a kernel can take for one architecture and kind of product: three sizes of a tile."""

    large: Tile
    small: Tile
    few: Tile

    def choose(self, rows: int, cols: int, processors: int) -> Tile:
        """The one for results (rows, cols), from their number alone: the rule of all kernels.

        `few` where one tile of it has all rows: a larger tile would compute and store mostly what
        is thrown away, and columns are then what there is to share out. `large` where there is one
        for every processor: it reads each feature the fewest times. Else `small`, of which there
        are two to four times as many. D plays no part: it makes programs longer, not more.
        """
        if rows <= self.few.rows:
            return self.few
        large = -(-rows // self.large.rows) * -(-cols // self.large.cols)
        return self.large if large >= processors else self.small


@functools.cache
def architecture(device: torch.device) -> str:
    """"sm_90", "gfx942" and so on; "interpreter" for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# Multiprocessors, where an architecture is pretended: those of its largest GPU. The interpreter's
# are so few that tests of some tiles reach every size of them.
_PROCESSORS = {
    "sm_80": 108, "sm_86": 84, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 188,
    "gfx90a": 110, "gfx942": 304, "interpreter": 2,
}


@functools.cache
def processors(device: torch.device, arch: str) -> int:
    """How many programs can run beside each other, at one on each."""
    if device.type != "cuda":
        return _PROCESSORS.get(_ALIKE.get(arch, arch), 108)
    return torch.cuda.get_device_properties(device).multi_processor_count


# Kinds of launches, of which what a smaller batch launches instead was compiled as well.
prepared: set[tuple] = set()


def is_new(*kind) -> bool:
    """Whether `prepared` lacks this kind; it has it now."""
    before = len(prepared)
    prepared.add(kind)
    return len(prepared) > before


@contextlib.contextmanager
def launching(**tensors: Tensor) -> Iterator[str]:
    """Below autograd and autocast, on the device of `tensors`, whose architecture it yields."""
    for name, x in tensors.items():
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"{name}: expected float16, bfloat16 or float32, got {x.dtype}")
    on_device = torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), on_device:
        yield architecture(x.device)


def product_kind(dtype: torch.dtype, arch: str) -> str:
    """How tl.dot multiplies: "half", or for float32 what torch's precision setting asks for."""
    if dtype != torch.float32:
        return "half"
    if arch.startswith("gfx"):
        return "ieee"  # AMD's matrix units take float32 as it is
    try:
        return _PRECISIONS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # what fp32_precision of some backend was set to has no such word
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def choose_tile(
    tiles: Mapping[tuple[str, str], Tile], defaults: Mapping[str, Tile], arch: str, kind: str
) -> Tile:
    """The tile for this architecture, else the default, which every architecture can run."""
    if kind == "tf32" and not DESCRIPTORS_ROUND:
        return defaults[kind]  # kernels round what no descriptor does
    return tiles.get((_ALIKE.get(arch, arch), kind), defaults[kind])


def warp_size(arch: str) -> int:
    return 64 if arch.startswith("gfx9") else 32


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def operand(x: Tensor, depth: int) -> Tensor:
    """`x` (rows, D) as kernels read it: rows apart, aligned, D a multiple of `depth`, at least one.

    A copy padded with 0 where `x` is not like that.
    """
    rows, d = x.shape
    apart = x.stride(1) == 1 and x.stride(0) >= d and x.stride(0) % 16 == 0
    if apart and x.data_ptr() % 16 == 0 and d % depth == 0 and d > 0:
        return x
    padded = x.new_zeros(rows, round_up(max(d, 1), depth))
    padded[:, :d] = x
    return padded


def source(x: Tensor, rows: int, tile: Tile, kind: str) -> Tensor | TensorDescriptor:
    """What the kernel gets to read (rows, tile.depth) blocks of the operand `x` from."""
    if not tile.tma:
        return x
    # Matrix units cut float32 to tf32; the copy engine can round it.
    rounds = {"round_f32_to_tf32": True} if kind == "tf32" else {}
    return TensorDescriptor.from_tensor(x, [rows, tile.depth], **rounds)


def add_product(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b; `out` is float32, whatever `a` and `b` are."""
    widens = a.is_cuda and a.dtype != torch.float32
    options = {"out_dtype": torch.float32} if widens else {}
    if not widens:
        a, b = a.float(), b.float()
    if not accumulate:
        torch.mm(a, b, out=out, **options)
    elif widens and not ADDS_TO_FLOAT32:
        out += torch.mm(a, b, **options)
    else:
        torch.addmm(out, a, b, out=out, **options)
