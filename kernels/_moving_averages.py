"""Moving averages of a codebook in Triton, and the codes that are made of them: two launches.

The first moves the sizes of clusters and leaves parts of their sum; the second moves the sums of
rows and divides them. Every sum has an order that depends on sizes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from tilewise.kernels import _common
from tilewise.kernels._finish import total

BLOCK = 1024  # codes whose sizes one program moves
ELEMENTS, WIDEST = 1024, 1024  # of a block of codes, and its columns: more would spill
INTERPRETER_ELEMENTS = 16384


@triton.jit
def moved(old, new, weight):
    """old + weight * (new - old), exactly `new` for a weight of 1; as torch.lerp."""
    step = new - old
    return tl.where(weight < 0.5, old + weight * step, new - (1.0 - weight) * step)


@triton.jit
def weight_where(enabled_ptr, weight):
    if enabled_ptr is not None:
        weight = tl.where(tl.load(enabled_ptr) != 0, weight, 0.0)
    return weight


@triton.jit(do_not_specialize=["codes"])
def average_sizes(
    size_ptr,  # in and out: (H, codes) float32
    count_ptr,  # (H, codes), integers or float32; None: sizes stay
    enabled_ptr,  # one uint8, or None for 1
    totals_ptr,  # out: (H, programs of a head) float64
    codes, count_head_stride, count_stride, weight,
    BLOCK: tl.constexpr,
):
    """Moves the sizes of BLOCK clusters of a head, and adds them up."""
    blocks = tl.cdiv(codes, BLOCK)
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    code = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = code < codes
    size_ptr += head * codes + code
    size = tl.load(size_ptr, mask=inside, other=0.0)
    if count_ptr is not None:
        count_ptr += head * count_head_stride + code.to(tl.int64) * count_stride
        count = tl.load(count_ptr, mask=inside, other=0).to(tl.float32)
        size = moved(size, count, weight_where(enabled_ptr, weight))
        tl.store(size_ptr, size, mask=inside)
    tl.store(totals_ptr + program, tl.sum(size.to(tl.float64)))


@triton.jit
def moved_means(mean_ptr, sum_ptr, at, sum_at, keep, weight):
    """(ROWS, COLS): the moving averages of sums, moved by the batch's."""
    mean = tl.load(mean_ptr + at, mask=keep, other=0.0)
    if sum_ptr is not None:
        mean = moved(mean, tl.load(sum_ptr + sum_at, mask=keep, other=0.0), weight)
    return mean


@triton.jit(do_not_specialize=["codes", "parts"])
def average_codes(
    mean_ptr,  # in and out: (H, codes, dim) float32, moving averages of sums
    code_ptr,  # out, if REFRESH: (H, codes, dim) float32
    sum_ptr,  # (H, codes, dim) float32, unit stride in a row; None: averages stay
    size_ptr,  # (H, codes) float32, as `average_sizes` leaves it
    totals_ptr,  # (H, parts) float64, the same
    enabled_ptr,  # one uint8: 0 changes nothing; or None
    codes, parts, dim, sum_head_stride, sum_stride, weight, eps, smallest,
    REFRESH: tl.constexpr, COSINE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):
    """Moves the averages of ROWS codes of a head; with REFRESH, these become them over their sizes.

    With COSINE of length 1, where they are not shorter than `smallest`.
    """
    blocks = tl.cdiv(codes, ROWS)
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    code = program % blocks * ROWS + tl.arange(0, ROWS)
    inside = code < codes
    row = head * codes + code
    sum_row = head * sum_head_stride + code.to(tl.int64) * sum_stride
    weight = weight_where(enabled_ptr, weight)
    divisor = tl.full((ROWS,), 1.0, tl.float32)
    write = inside
    if REFRESH:
        size = tl.load(size_ptr + row, mask=inside, other=1.0).to(tl.float64)
        all_rows = total(totals_ptr + head * parts, parts, 1)
        least = tl.full((), 1.0, tl.float64) * eps
        divisor = ((size + least) / (all_rows + codes * least) * all_rows).to(tl.float32)
        if enabled_ptr is not None:
            write = inside & (tl.load(enabled_ptr) != 0)
        if COSINE:  # before anything is stored: what is read here was another thread's to write
            squares = tl.zeros((ROWS,), tl.float32)
            for first in range(0, dim, COLS):
                col = first + tl.arange(0, COLS)
                keep = inside[:, None] & (col < dim)[None, :]
                at, sum_at = row[:, None] * dim + col[None, :], sum_row[:, None] + col[None, :]
                c = moved_means(mean_ptr, sum_ptr, at, sum_at, keep, weight) / divisor[:, None]
                squares += tl.sum(c * c, 1)
            length = tl.sqrt(squares)
            divisor *= tl.where(length < smallest, smallest, length)
    for first in range(0, dim, COLS):
        col = first + tl.arange(0, COLS)
        columns = (col < dim)[None, :]
        keep = inside[:, None] & columns
        at, sum_at = row[:, None] * dim + col[None, :], sum_row[:, None] + col[None, :]
        mean = moved_means(mean_ptr, sum_ptr, at, sum_at, keep, weight)
        if sum_ptr is not None:
            tl.store(mean_ptr + at, mean, mask=keep)
        if REFRESH:
            tl.store(code_ptr + at, mean / divisor[:, None], mask=write[:, None] & columns)


def strides(x: Tensor | None) -> tuple[int, int]:
    """Of heads and codes; one head has 0, whatever its size, so that sizes share binaries."""
    if x is None:
        return 0, 0
    return x.stride(0) if len(x) > 1 else 0, x.stride(1)


def moving_averages(
    cluster_size: Tensor, embed_avg: Tensor, embed: Tensor, counts: Tensor | None,
    sums: Tensor | None, enabled: Tensor | None, weight: float, eps: float, refresh: bool,
    cosine: bool, smallest: float,
) -> None:
    """What `Codebook.update` and `Codebook.refresh` do, in two launches and in place.

    Args:
        cluster_size: (H, K) float32, contiguous.
        embed_avg, embed: (H, K, D), the same.
        counts, sums: (H, K) int64 or float32 and (H, K, D) float32 of a batch; or None.
        enabled: () bool; False changes nothing. None: True.
        weight: of the batch.
        refresh: whether codes become averages.
        cosine: of length 1.
        smallest: shorter ones are divided by it.
    """
    with _common.launching(embed=embed) as arch:
        heads, codes, dim = embed.shape
        if not codes or not heads:
            return
        flag = None if enabled is None else enabled.view(torch.uint8)
        blocks = triton.cdiv(codes, BLOCK)
        totals = embed.new_empty(heads, blocks, dtype=torch.float64)
        average_sizes[(heads * blocks,)](
            cluster_size, counts, flag, totals, codes,
            *strides(counts), weight, BLOCK=BLOCK,
        )
        if sums is not None and sums.stride(2) != 1:
            sums = sums.contiguous()
        cols = min(triton.next_power_of_2(max(dim, 16)), WIDEST)
        rows = (INTERPRETER_ELEMENTS if arch == "interpreter" else ELEMENTS) // cols
        average_codes[(heads * triton.cdiv(codes, rows),)](
            embed_avg, embed, sums, cluster_size, totals, flag, codes, blocks, dim,
            *strides(sums), weight, eps, smallest,
            REFRESH=refresh, COSINE=cosine, ROWS=rows, COLS=cols,
            # All there are: left alone, ptxas spills a register of some to save others.
            **({"maxnreg": 255} if arch.startswith("sm_") else {}),
        )
        increment_version([cluster_size, embed_avg, embed])
