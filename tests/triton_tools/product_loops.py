"""What Triton's float32 products without matrix units cost, counted in the loops of their binaries.

`python -m tests.triton_tools.product_loops` prints, for the kernels of losses and some tiles, what
part of the peak of fused multiply-adds a loop can reach by the instructions that it issues, and by
the clocks of shared memory. Compiled is what these kernels were before the library multiplied.
"""

import collections
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

from tests.triton_tools.figures import figures, nvidia_tool
from tilewise.kernels import _contrast, _contrast_tiles
from tilewise.kernels._common import Tile

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
LANES = {"sm_80": 64}  # multiply-adds that an SM does per clock; else 128
ISSUED = 4  # instructions that an SM issues per clock
BANKS = 32  # words of shared memory that it reads per clock
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-6]\s+)?([A-Z][A-Z0-9_.]*)", re.M)
CASES = {
    "clip_loss": "float32 ieee aligned gradients",
    "hard_negatives": "float32 ieee aligned offset", "itc_loss": "float32 ieee taught aligned",
}
TILES = [  # of sigmoid_loss, and of the same product if features were transposed first
    Tile(64, 64, 32, pieces=1, warps=4, stages=2), Tile(128, 64, 16, pieces=2, warps=4, stages=3),
    Tile(128, 128, 16, pieces=4, warps=8, stages=3),
]


def loop_of(code: str) -> str:
    """The loop with the most multiply-adds in what nvdisasm prints."""
    loops = [""]
    for branch in re.finditer(r"BRA\S* .*`\((\.L_x_\d+)\)", code):
        label = code.find(f"\n{branch[1]}:")
        if 0 <= label < branch.start():
            loops.append(code[label : branch.end()])
    return max(loops, key=lambda loop: loop.count("FFMA"))


class Shared(NamedTuple):
    """How a warp reads one operand of a product from shared memory."""

    lanes: int  # threads of a warp at different rows (or columns) of the result
    per_lane: int  # of these in a row a thread has
    stride: int  # words from one to the next

    def clocks(self, words: int) -> int:
        """Of one load of so many words a thread: threads that read the same share it."""
        banks = collections.defaultdict(set)
        for lane in range(self.lanes):
            first = lane * self.per_lane * self.stride
            for word in range(first, first + words):
                banks[word % BANKS].add(word)
        return max(map(len, banks.values()))


def operands(ttgir: str) -> list[tuple[Shared, int]]:
    """How a warp reads each operand of the product, and how many words each thread reads."""
    def numbers(text: str) -> list[int]:
        return list(map(int, text.split(",")))

    layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", ttgir, re.M))
    found = []
    for axis in (0, 1):
        shape, shared, parent = re.search(
            rf"local_load [^\n]*memdesc<([0-9x]+)xf32, (#\w+)[^\n]*opIdx = {axis}, parent = (#\w+)",
            ttgir,
        ).groups()
        assert "maxPhase = 1," in layouts[shared], "swizzled: its words stand elsewhere"
        order = numbers(re.search(r"order = \[(.*?)\]", layouts[shared])[1])
        size, lanes, warps = (
            numbers(re.search(rf"{name} = \[(.*?)\]", layouts[parent])[1])[axis]
            for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")
        )
        sides = list(map(int, shape.split("x")))[-2:]
        strides = [1 if dim == order[0] else sides[order[0]] for dim in (0, 1)]
        held = max(sides[axis] // (lanes * warps), size)
        found.append((Shared(lanes, size, strides[axis]), held * sides[1 - axis]))
    return found


class Loop(NamedTuple):
    """One step of a warp's product."""

    multiply_adds: int
    instructions: int
    loads: int
    clocks: int  # of shared memory
    lanes: int

    @classmethod
    def of(cls, binary: CompiledKernel, arch: str) -> "Loop":
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            code = subprocess.check_output(
                [nvidia_tool("nvdisasm"), "-c", file.name], text=True, stderr=subprocess.DEVNULL
            )
        opcodes = collections.Counter(INSTRUCTION.findall(loop_of(code)))
        read = operands(binary.asm["ttgir"])
        expected = sum(words for _, words in read) // 4
        assert abs(opcodes["LDS.128"] / expected - 1) < 0.1, "not as modelled"
        clocks = sum(shared.clocks(4) * words // 4 for shared, words in read)
        multiply_adds = opcodes["FFMA"] + 2 * opcodes["FFMA2"]
        return cls(multiply_adds, opcodes.total(), opcodes["LDS.128"], clocks,
                   LANES.get(arch, 128))

    @property
    def by_issue(self) -> float:
        """What part of the peak it leaves."""
        return min(self.multiply_adds * 32 / self.lanes / (self.instructions / ISSUED), 1)

    @property
    def by_shared(self) -> float:
        return min(self.multiply_adds * 32 / self.lanes / self.clocks, 1)


@triton.jit
def transposed_product(
    image_ptr, text_ptr, out_ptr, rows, cols, depth, image_stride, text_stride, out_stride,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):
    """<image_i, text_j> of (depth, rows) and (depth, cols)."""
    row, col = _contrast.tile_corner(rows, cols, TILE_M, TILE_N)
    i, j, k = row + tl.arange(0, TILE_M), col + tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    image_ptr += k[:, None].to(tl.int64) * image_stride + i[None, :]
    text_ptr += k[:, None].to(tl.int64) * text_stride + j[None, :]
    dots = tl.zeros((TILE_M, TILE_N), tl.float32)
    for _ in range(0, depth, TILE_K):
        dots = tl.dot(tl.load(image_ptr).T, tl.load(text_ptr), dots, input_precision="ieee")
        image_ptr += TILE_K * image_stride
        text_ptr += TILE_K * text_stride
    tl.store(out_ptr + i[:, None].to(tl.int64) * out_stride + j[None, :], dots)


def launches(arch: str, compiling: bool = True) -> Iterator[tuple]:
    """What a product is, and its `offline.Launched`."""
    from tests.triton_tools import cases, offline

    unused = mock.patch.object(_contrast.Launch, "by_library", False)
    with unused, offline.launching_for(arch, None if compiling else ()) as launched:
        def sigmoid_with(tile: Tile):
            launched.clear()
            with mock.patch.dict(_contrast_tiles.DEFAULT_TILES, ieee=tile):
                dict(cases.sigmoid_loss(arch))["float32 ieee aligned gradients"][0]()
            return launched[0]

        for op, case in CASES.items():
            launched.clear()
            dict(getattr(cases, op)(arch))[case][0]()
            yield from {launch.name: launch for launch in launched if launch.products}.items()
        for tile in TILES:
            name = f"{tile.rows} x {tile.cols} x {tile.depth}, {tile.warps} warps"
            yield f"sigmoid_tile {name}", sigmoid_with(tile)
            launched.clear()
            x = torch.zeros(256, 256)
            transposed_product[(1,)](
                x, x, x, *[256] * 6, TILE_M=tile.rows, TILE_N=tile.cols, TILE_K=tile.depth,
                num_warps=tile.warps, num_stages=tile.stages,
            )
            yield f"transposed {name}", launched[0]


def main() -> None:
    print(f"{'':44} FFMA  all  LDS.128  clocks  by issue  by shared memory  stack  programs")
    for arch in ARCHITECTURES:
        for name, launch in launches(arch):
            loop, found = Loop.of(launch.binary, arch), figures(launch.binary, arch)
            print(
                f"{arch:7}{name:36}{loop.multiply_adds:6}{loop.instructions:6}{loop.loads:6}"
                f"{loop.clocks:8}{math.floor(100 * loop.by_issue):9} %"
                f"{math.floor(100 * loop.by_shared):9} %{found['stack']:12}{found['programs']:8}",
                flush=True,
            )


if __name__ == "__main__":
    main()
