"""The sigmoid loss of SigLIP in Triton: a tile of logits becomes the tile of their gradients."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _contrast
from tilewise.kernels._common import Tile  # noqa: F401  (the type of TILES)
from tilewise.kernels._contrast import (
    DEFAULT_TILES,
    TILES,
    number,
    sum_per_thread,
    tile_corner,
    tile_of_dots,
)

CHUNK_BYTES = 128 << 20  # workspace: d(loss)/d(logit) of one chunk of the logits
CHUNK_COLS = 8192
FLOAT16_SCALE = 2.0**14  # float16 keeps dz times this: |dz| <= 1, and float16 ends at 2^-24


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for e in [0, 1]; relative error 1.7e-7, for tiny e too."""
    p = 0.005253457929939032
    p = p * e - 0.02958850748836994
    p = p * e + 0.07836166769266129
    p = p * e - 0.13674770295619965
    p = p * e + 0.19111430644989014
    p = p * e - 0.24844369292259216
    p = p * e + 0.33319270610809326
    p = p * e - 0.49999502301216125
    p = p * e + 1.0
    return p * e


@triton.jit
def differentiate(
    dots,  # (TILE_M, WIDTH) float32
    grad_ptr,  # (TILE_M, 1): where the first column of dz goes
    sums,  # (THREADS,) each: loss, dz * dot, dz
    row, col,  # of the first element of `dots`
    rows, cols, scale, bias, diagonal, image_ids_ptr, text_ids_ptr, IDS: tl.constexpr,
    SCALE: tl.constexpr, NEED_GRAD: tl.constexpr, EVEN: tl.constexpr, PIECES: tl.constexpr,
):
    """Stores dz = SCALE * d(loss)/d(logit) and adds to the sums, a piece of columns at a time."""
    TILE_M: tl.constexpr = dots.shape[0]
    WIDTH: tl.constexpr = dots.shape[1]
    if PIECES > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(dots.reshape(TILE_M, 2, HALF).permute(0, 2, 1))
        sums = differentiate(
            left, grad_ptr, sums, row, col,
            rows, cols, scale, bias, diagonal, image_ids_ptr, text_ids_ptr, IDS,
            SCALE, NEED_GRAD, EVEN, PIECES // 2,
        )
        sums = differentiate(
            right, grad_ptr + HALF, sums, row, col + HALF,
            rows, cols, scale, bias, diagonal, image_ids_ptr, text_ids_ptr, IDS,
            SCALE, NEED_GRAD, EVEN, PIECES // 2,
        )
    elif col < cols:  # a branch also keeps the compiler from mixing pieces, and so from spilling
        i = row + tl.arange(0, TILE_M)
        j = col + tl.arange(0, WIDTH)
        if IDS:
            match = tl.load(image_ids_ptr + i, mask=i < rows, other=-1)
            label = tl.load(text_ids_ptr + j, mask=j < cols, other=-2)
        else:
            match = i + diagonal
            label = j
        z = dots * scale
        if EVEN:
            z += bias
        else:  # what is outside gets a logit of -inf and no match, which adds exactly 0
            row_bias = tl.where(i < rows, bias, float("-inf"))
            col_bias = tl.where(j < cols, 0.0, float("-inf"))
            z += row_bias[:, None] + col_bias[None, :]
            match = tl.where(i < rows, match, -1)
            label = tl.where(j < cols, label, -(2**31))
        positive = match[:, None] == label[None, :]
        z = tl.where(positive, -z, z)  # now loss = softplus(z) for either kind of pair
        e = tl.exp2(tl.abs(z) * -1.4426950408889634)
        loss, dz_dot, dz_sum = sums
        THREADS: tl.constexpr = loss.shape[0]
        loss += sum_per_thread(tl.maximum(z, 0.0) + log1p_of_unit(e), THREADS)
        if NEED_GRAD:
            reciprocal = tl.fdiv(SCALE, 1.0 + e)
            dz = tl.where(z >= 0, reciprocal, e * reciprocal)  # SCALE * sigmoid(z)
            dz = tl.where(positive, -dz, dz)
            tl.store(grad_ptr + tl.arange(0, WIDTH)[None, :], dz.to(grad_ptr.dtype.element_ty))
            dz_dot += sum_per_thread(dz * dots, THREADS)
            dz_sum += sum_per_thread(dz, THREADS)
        sums = (loss, dz_dot, dz_sum)
    return sums


# Sizes are not specialised on: every batch runs the same binary.
@triton.jit(do_not_specialize=["rows", "cols", "diagonal"])
def sigmoid_tile(
    image_ptr,  # (rows, depth), unit stride in a row; if TMA, a descriptor of it
    text_ptr,  # (cols, depth), the same
    grad_ptr,  # (rows, cols) rounded up to whole tiles, unit stride in a row
    sums_ptr,  # (3 if NEED_GRAD else 1, programs) float32: sums of loss, dz * dot, dz
    scale_ptr, bias_ptr,  # one float32 each
    rows, cols, depth, image_stride, text_stride, grad_stride,
    diagonal,  # row i matches column i + diagonal
    image_ids_ptr, text_ids_ptr,  # (rows,), (cols,) int32 >= 0: if IDS, equal ones match instead
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    THREADS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    SCALE: tl.constexpr, NEED_GRAD: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    IDS: tl.constexpr,
):
    """One tile of logits; `tile_of_dots` says what it needs."""
    row, col = tile_corner(rows, cols, TILE_M, TILE_N, GROUP)
    i = row + tl.arange(0, TILE_M)
    dots = tile_of_dots(
        image_ptr, text_ptr, row, col, rows, cols, depth, image_stride, text_stride,
        TILE_M, TILE_N, TILE_K, PRECISION, EVEN, TMA,
    )
    grad_ptr += i[:, None].to(tl.int64) * grad_stride + col
    zero = tl.zeros((THREADS,), tl.float32)
    sums = differentiate(
        dots, grad_ptr, (zero, zero, zero), row, col,
        rows, cols, tl.load(scale_ptr), tl.load(bias_ptr), diagonal, image_ids_ptr, text_ids_ptr,
        IDS, SCALE, NEED_GRAD, EVEN, PIECES,
    )
    sums_ptr += tl.program_id(0)
    tl.store(sums_ptr, tl.sum(sums[0]))
    if NEED_GRAD:
        tl.store(sums_ptr + tl.num_programs(0), tl.sum(sums[1]) / SCALE)
        tl.store(sums_ptr + 2 * tl.num_programs(0), tl.sum(sums[2]) / SCALE)


def stored_scale(dtype: torch.dtype) -> float:
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def launch(
    image: Tensor, text: Tensor, grad: Tensor | None, scale: Tensor, bias: Tensor, diagonal: int,
    arch: str, kind: str, ids: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Runs the kernel on one chunk of the logits; returns float64 sums: loss, dz * dot, dz.

    `grad` (rows, cols) is a view of memory with room for whole tiles. Without it: loss only.
    With `ids` of its rows and columns, equal ones match, and `diagonal` does not count.
    """
    rows, cols = len(image), len(text)
    tile = _common.choose_tile(TILES, DEFAULT_TILES, arch, kind)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols)
    sums = image.new_empty(1 if grad is None else 3, programs, dtype=torch.float32)
    sigmoid_tile[(programs,)](
        _common.source(image, tile.rows, tile, kind), _common.source(text, tile.cols, tile, kind),
        sums if grad is None else grad, sums, scale, bias,
        rows, cols, image.shape[1], image.stride(0), text.stride(0),
        0 if grad is None else grad.stride(0), diagonal, *(ids or (sums, sums)),
        TILE_M=tile.rows, TILE_N=tile.cols, TILE_K=tile.depth,
        PIECES=tile.pieces,
        THREADS=tile.warps * _common.warp_size(arch), GROUP=8,
        PRECISION="ieee" if kind == "half" else kind, SCALE=stored_scale(image.dtype),
        NEED_GRAD=grad is not None,
        EVEN=rows % tile.rows == 0 and cols % tile.cols == 0, TMA=tile.tma,
        IDS=ids is not None, num_warps=tile.warps, num_stages=tile.stages,
    )
    return sums.sum(1, dtype=torch.float64)


def _sigmoid_loss(image_features, text_features, scale, bias, positives, ids, needs):
    rows, cols, depth = len(image_features), len(text_features), image_features.shape[1]
    arch = _common.architecture(image_features.device)
    kind = _common.product_kind(image_features.dtype, arch)
    tile = _common.choose_tile(TILES, DEFAULT_TILES, arch, kind)
    image = _common.operand(image_features, tile.depth)  # (B, depth rounded up)
    text = _common.operand(text_features, tile.depth)
    need_image, need_text, need_scale, need_bias = needs

    size = _contrast.chunk_size(image, text, tile, CHUNK_COLS, CHUNK_BYTES)
    workspace = None
    if any(needs):
        workspace = image.new_empty(
            _common.round_up(size[0], tile.rows), _common.round_up(size[1], tile.cols)
        )

    def new_gradient(needed: bool, x: Tensor) -> Tensor:
        new = x.new_empty if rows and cols else x.new_zeros  # the products write all of it
        return new(x.shape if needed else 0, dtype=torch.float32)

    d_image, d_text = new_gradient(need_image, image), new_gradient(need_text, text)
    sums = image.new_zeros(3 if any(needs) else 1, dtype=torch.float64)
    for chunk in _contrast.chunks(image, text, positives, ids, size):
        x, y = chunk.image, chunk.text
        grad = None if workspace is None else workspace[: len(x), : len(y)]
        sums += launch(x, y, grad, scale, bias, chunk.diagonal, arch, kind, chunk.ids)
        if need_image:
            begun = chunk.cols.start > 0
            _common.add_product(d_image[chunk.rows], grad, y, accumulate=begun)
        if need_text:
            begun = chunk.rows.start > 0
            _common.add_product(d_text[chunk.cols], grad.t(), x, accumulate=begun)

    count = max(rows, 1)
    factor = scale.reshape(()) / (count * stored_scale(image.dtype))

    def scalar(needed: bool, i: int) -> Tensor:
        return (sums[i] / count).float() if needed else sums.new_empty(0, dtype=torch.float32)

    return (
        scalar(True, 0),
        d_image.mul_(factor)[..., :depth].contiguous(),
        d_text.mul_(factor)[..., :depth].contiguous(),
        scalar(need_scale, 1),
        scalar(need_bias, 2),
    )


def sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    positives: int | None,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    need_image: bool,
    need_text: bool,
    need_scale: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of SigLIP and its gradients, float32 and on the device, without a host sync.

        loss = sum_ij softplus(-m_ij * (scale * <image_i, text_j> + bias)) / B

    Args:
        image_features: (B, D), float16, bfloat16 or float32, any strides.
        text_features: (N, D), the same.
        logit_scale, logit_bias: one float32 each.
        positives: m_ij is 1 where j = i + positives, else -1. None: -1 everywhere.
        image_ids, text_ids: int64 (B,) and (N,): m_ij is 1 where these are equal instead.

    Returns:
        loss, d_image, d_text, d_scale, d_bias; empty where not needed. Equal bits on every run.

    Cost: 3 matrix products of B*N*D (1 if nothing is needed), memory O((B + N) * D) plus
    CHUNK_BYTES.
    """
    dtype, device = image_features.dtype, image_features.device
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"image_features: expected float16, bfloat16 or float32, got {dtype}")
    if logit_bias is None:
        logit_bias = torch.zeros_like(logit_scale)
    needs = (need_image, need_text, need_scale, need_bias)
    ids = None if image_ids is None else number(image_ids, text_ids)
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), on_device:
        return _sigmoid_loss(
            image_features, text_features, logit_scale, logit_bias, positives, ids, needs
        )
