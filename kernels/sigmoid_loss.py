"""The sigmoid loss of SigLIP in Triton: a tile of logits becomes the tile of their gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tilewise.kernels import _common, _contrast_chunks
from tilewise.kernels._contrast import (
    SIZES,
    Launch,
    matches,
    sum_per_thread,
    tile_of_dots,
    tiles,
)
from tilewise.kernels._contrast_chunks import Chunk
from tilewise.kernels._contrast_tiles import TILES
from tilewise.kernels._finish import Gradients, scale_one, total
from tilewise.kernels._ids import renumber

CHUNK_BYTES = 128 << 20  # workspace, at most: d(loss)/d(logit) of one chunk of the logits
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
    dots, sums, row, col, pairs, operands,
    AT: tl.constexpr, EVEN: tl.constexpr, SCALE: tl.constexpr,
):
    """Stores dz = SCALE * d(loss)/d(logit) and adds to the sums of loss, dz * dot and dz."""
    WIDTH: tl.constexpr = dots.shape[1]
    i = row + tl.arange(0, dots.shape[0])
    j = col + AT + tl.arange(0, WIDTH)
    grad_ptr, scale, bias = operands
    z = dots * scale
    if EVEN:
        z += bias
    else:  # what is outside gets a logit of -inf and no match, which adds exactly 0
        row_bias = tl.where(i < pairs[0], bias, float("-inf"))
        col_bias = tl.where(j < pairs[1], 0.0, float("-inf"))
        z += row_bias[:, None] + col_bias[None, :]
    positive = matches(i, j, pairs, EVEN)
    z = tl.where(positive, -z, z)  # now loss = softplus(z) for either kind of pair
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    loss, dz_dot, dz_sum = sums
    THREADS: tl.constexpr = loss.shape[0]
    loss += sum_per_thread(tl.maximum(z, 0.0) + log1p_of_unit(e), THREADS)
    if grad_ptr is not None:
        reciprocal = tl.fdiv(SCALE, 1.0 + e)
        dz = tl.where(z >= 0, reciprocal, e * reciprocal)  # SCALE * sigmoid(z)
        dz = tl.where(positive, -dz, dz)
        grad_ptr += AT + tl.arange(0, WIDTH)[None, :]
        tl.store(grad_ptr, dz.to(grad_ptr.dtype.element_ty))
        dz_dot += sum_per_thread(dz * dots, THREADS)
        dz_sum += sum_per_thread(dz, THREADS)
    return loss, dz_dot, dz_sum


@triton.jit(do_not_specialize=SIZES)
def sigmoid_tile(
    image_ptr, text_ptr, rows, cols, depth, image_stride, text_stride,  # see `tile_of_dots`
    offset, image_ids_ptr, text_ids_ptr,  # see `matches`
    grad_ptr,  # (rows, cols) rounded up to whole tiles, unit stride in a row; None: loss only
    grad_stride,
    sums_ptr,  # (programs, 3 or, without grad_ptr, 1) float32: sums of loss, dz * dot, dz
    scale_ptr, bias_ptr,  # one float32 each
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr,
    THREADS: tl.constexpr, SCALE: tl.constexpr,
):
    """One tile of logits: its loss and, into `grad_ptr`, SCALE * d(loss)/d(logit)."""
    row, col, dots = tile_of_dots(
        image_ptr, text_ptr, rows, cols, depth, image_stride, text_stride,
        TILE_M, TILE_N, TILE_K, PRECISION, EVEN, TMA,
    )
    if grad_ptr is not None:
        i = row + tl.arange(0, TILE_M)
        grad_ptr += i[:, None].to(tl.int64) * grad_stride + col
    zero = tl.zeros((THREADS,), tl.float32)
    sums = tiles(
        differentiate, dots, (zero, zero, zero), row, col,
        (rows, cols, offset, image_ids_ptr, text_ids_ptr),
        (grad_ptr, tl.load(scale_ptr), tl.load(bias_ptr)), 0, EVEN, SCALE, PIECES,
    )
    if grad_ptr is None:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(sums[0]))
    else:
        sums_ptr += 3 * tl.program_id(0)
        tl.store(sums_ptr, tl.sum(sums[0]))
        tl.store(sums_ptr + 1, tl.sum(sums[1]) / SCALE)
        tl.store(sums_ptr + 2, tl.sum(sums[2]) / SCALE)


@triton.jit(do_not_specialize=["programs", "count", "image_rows", "text_rows"])
def finish_sigmoid(
    sums_ptr,  # (programs, SUMS) float32, as sigmoid_tile leaves them
    programs, count,  # count: what the loss is divided by
    scale_ptr,
    loss_ptr, d_scale_ptr, d_bias_ptr,  # out: one float32 each; None: not needed
    # Both gradients by features, without a factor; and out, with it. See `Gradients`.
    image_ptr, image_out_ptr, image_rows, text_ptr, text_out_ptr, text_rows, stride, depth,
    SCALE: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Adds up what tiles left, and scales gradients by logit_scale / (SCALE * count)."""
    program = tl.program_id(0)
    if program == 0:
        size = count.to(tl.float64)
        tl.store(loss_ptr, (total(sums_ptr, programs, SUMS) / size).to(tl.float32))
        if d_scale_ptr is not None:
            tl.store(d_scale_ptr, (total(sums_ptr + 1, programs, SUMS) / size).to(tl.float32))
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr, (total(sums_ptr + 2, programs, SUMS) / size).to(tl.float32))
    else:
        factor = tl.div_rn(tl.load(scale_ptr), count.to(tl.float32) * SCALE)
        gradients = (
            image_ptr, image_out_ptr, image_rows, text_ptr, text_out_ptr, text_rows, stride,
        )
        scale_one(program - 1, gradients, depth, factor, ROWS, COLS)


def stored_scale(dtype: torch.dtype) -> float:
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


def _sigmoid_loss(image_features, text_features, scale, bias, positives, ids, needs):
    launch = Launch.of(image_features, len(image_features), len(text_features), TILES)
    image, text = launch.operand(image_features), launch.operand(text_features)
    need_image, need_text, need_scale, need_bias = needs
    most = _contrast_chunks.in_cache(image, text, CHUNK_COLS, CHUNK_BYTES)
    size = _contrast_chunks.chunk_size(image, text, launch.tile, *most)
    chunks = list(_contrast_chunks.chunks(image, text, positives, ids, size))
    programs = launch.programs(chunks)
    count = 3 if any(needs) else 1
    sums = image.new_empty(sum(programs), count, dtype=torch.float32)
    parts = iter(sums.split(programs))

    def dz(chunk: Chunk, grad: Tensor | None) -> None:
        launch.run(
            sigmoid_tile, chunk, *chunk.matches, grad, 0 if grad is None else grad.stride(0),
            next(parts), scale, bias, SCALE=stored_scale(image.dtype),
            limited=launch.kind == "tf32",  # rounding to tf32 takes registers
        )

    products = None, None
    if any(needs):
        products = launch.products(image, text, chunks, size, (need_image, need_text), dz)
    else:
        room = launch.room(image, size)
        for chunk in chunks:
            dz(launch.multiplied(chunk, room), None)
    gradients = Gradients.of(products, image_features.shape[1], image)
    loss = sums.new_empty(())
    d_scale, d_bias = (
        sums.new_empty(() if needed else 0) for needed in (need_scale, need_bias)
    )
    finish_sigmoid[(gradients.programs,)](
        sums, len(sums), max(len(image), 1), scale,
        loss, d_scale if need_scale else None, d_bias if need_bias else None,
        *gradients.arguments,
        SCALE=stored_scale(image.dtype), SUMS=count, **gradients.constants,
    )
    return loss, *gradients.results, d_scale, d_bias


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
    if logit_bias is None:
        logit_bias = torch.zeros_like(logit_scale)
    needs = (need_image, need_text, need_scale, need_bias)
    with _common.launching(image_features=image_features):
        ids = None if image_ids is None else renumber(image_ids, text_ids)
        return _sigmoid_loss(
            image_features, text_features, logit_scale, logit_bias, positives, ids, needs
        )
