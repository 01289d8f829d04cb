"""nearest_code: bounds for all distances, from one product of float16 factors on matrix units.

A row i and a code k get a score, which orders the codes of a row like the distance does:

    score = beta_i h_k - <z_i, w_k>

             z          w                 h            score
    l2       s (x - m)  t (c - m)         |w|^2 / 2    s t (distance - |x - m|^2) / 2
    dot      s x        t (c - m)         0            s t (distance + <x, m>)
    cosine   s x        t (c / |c| - m)   0            s t (|x| (distance - 1) + <x, m>)

m is a centre of the codebook: a common offset takes no part in any rounding. s (of the row) and t
(of the head) are powers of two that bring the largest elements near 2^15, where float16 has all of
its range; beta = s / t. The filter computes S = beta h - <z^, w^> with z^ and w^, which are z and w
rounded to float16. Then

    |S - score| <= A_i P_k + B_i Q_k + beta_i T_k + C_i

which holds, for D < 2^20 and n = any bound of |z| and |z^|, because of the following parts:

rounding of z, w    |<z, w> - <z^, w^>| <= |z - z^| |w| + |z^| |w - w^| by Cauchy-Schwarz. The
                    residuals are measured, not estimated. A has |z - z^|, P has |w| and |w^|, B is
                    n, Q has |w - w^|.
the product         Matrix units align the terms of a step and cut them, at 2^-23 of the largest or
                    finer, instead of rounding: 2^-22 |z^| |w^| for each of `depth` terms is enough.
                    A has (depth + 64) 2^-22 n, where the 64 are for a handful of roundings of
                    2^-24 in S, in A and in the bounds made of them.
h                   is rounded to float32, multiplied and subtracted from: T is 2^-20 h.
the contract        orders float64 distances, which are wrong by up to (D / 8 + 16) 2^-53 of their
                    terms. Those of l2 are s t |x - c|^2 / 2 <= n^2 / beta + 2 beta h here: C and
                    T. Those of dot are |x| |c| <= |x| (|c - m| + |m|), those of cosine two of 1:
                    P has 2^-28 t (|m| + 1), which A multiplies by at least (D + 64) 2^-22 n.
underflow           C has 1, where the largest products are near 2^28.

Sums of squares for these bounds are made in float32 for rows (a factor 1 + (D + 8) 2^-23 makes up
for that) and in float64 for codes. A bound that overflows proves nothing, but is not wrong.

Codes come in groups of SIZE. The filter stores the least S of a group; P, Q and T are maxima over
the group, so that a code out of line spoils the bounds of no other group. Codes with a NaN never
win, codes with an infinity win in "dot" only, where P is infinite and their groups always remain.
Both have h = inf and w = 0.

A row with a NaN is as far as NaN from every code, and so is one with an infinity by "cosine": C is
-inf there, and nothing is searched.
"""

import triton
import triton.language as tl

from tilewise.kernels._nearest_code_exact import lane_sum

BOUNDS = tl.constexpr(4)  # for each row: beta, A, B, C
LIMITS = tl.constexpr(3)  # for each group: P, Q, T
MEASURING = tl.constexpr(1024)  # programs that measure codes, at most


@triton.jit
def exponent(x):
    """floor(log2(x)) for finite float32 x > 0; -127 for zero and subnormal x."""
    return (x.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def power_of_two(e):
    """2^e in float32 for e from -126 to 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def code_scale(half):
    """The exponent of t, from half of the largest |w| / t; anything if all codes are equal."""
    return tl.where(half > 0, tl.minimum(tl.maximum(13 - exponent(half), -126), 126), 0)


@triton.jit
def first_code(group, TILE_N: tl.constexpr, SIZE: tl.constexpr):
    """The lowest code of a group; the others follow in steps of TILE_N / SIZE.

    So a thread that holds a piece of a row of the tile holds whole groups, or nearly.
    """
    STEP: tl.constexpr = TILE_N // SIZE
    return group // STEP * TILE_N + group % STEP


@triton.jit
def ordered(bits):
    """int32 that order like the finite float32 of these bits do; and from these the bits again."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def of_rank(x, keep, rank):
    """(len(x),) the element of each row of finite x (n, m) that `rank` kept ones come before."""
    keys = tl.where(keep, ordered(x.to(tl.int32, bitcast=True)), 0x7FFFFFFF)
    negative = tl.sum((keys < 0).to(tl.int32), 1)
    found = tl.where(negative <= rank, 0, -(2**31))
    for i in range(31):  # bit by bit: the largest number that no more than `rank` are less than
        more = found | (1 << (30 - i))
        less = tl.sum((keys < more[:, None]).to(tl.int32), 1)
        found = tl.where(less <= rank, more, found)
    return ordered(found).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["codes", "step"])
def centre_codes(
    code_ptr,  # (H, codes, dim), unit stride in a row
    centre_ptr,  # out: (H, dim) float32
    codes, step, dim, head_stride, code_stride,
    METRIC: tl.constexpr, SAMPLE: tl.constexpr, COLS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Medians of every step-th code, at most SAMPLE of them: single codes cannot move them far.

    Any finite centre is right.
    """
    head = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, SAMPLE)
    keep = i * step < codes
    code_ptr += head * head_stride + (i * step).to(tl.int64) * code_stride
    size = tl.full((SAMPLE,), 1.0, tl.float32)
    if METRIC == "cosine":
        squares = tl.zeros((SAMPLE,), tl.float32)
        for d in range(0, dim, WIDTH):
            col = d + tl.arange(0, WIDTH)[None, :]
            c = tl.load(code_ptr[:, None] + col, mask=keep[:, None] & (col < dim), other=0.0)
            c = c.to(tl.float32)
            squares += tl.sum(c * c, 1)
        size = tl.maximum(tl.sqrt(squares), 1e-12)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = (col < dim)[:, None] & keep[None, :]
    c = tl.load(code_ptr[None, :] + col[:, None], mask=inside, other=0.0).to(tl.float32)
    c = c / size[None, :]
    c = tl.where(tl.abs(c) < float("inf"), c, 0.0)  # (COLS, SAMPLE)
    middle = of_rank(c, keep[None, :], tl.sum(keep.to(tl.int32)) // 2)
    tl.store(centre_ptr + head * dim + col, middle, mask=col < dim)


@triton.jit(do_not_specialize=["codes"])
def measure_codes(
    code_ptr,  # (H, codes, dim), unit stride in a row
    centre_ptr,  # (H, dim) float32
    norm_ptr,  # out: (H, codes) float64: |c|, not finite where c is not
    half_ptr,  # out: (H, programs) float32: half of the largest |c - m|, or |c / |c| - m|, element
    codes, dim, head_stride, code_stride,
    METRIC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """What the scales of the codebook depend on."""
    head = tl.program_id(1).to(tl.int64)
    code_ptr += head * head_stride
    largest = tl.zeros((ROWS,), tl.float64)
    for block in range(tl.program_id(0), tl.cdiv(codes, ROWS), tl.num_programs(0)):
        code = block * ROWS + tl.arange(0, ROWS)
        keep = code < codes
        row_ptr = code_ptr + code[:, None].to(tl.int64) * code_stride
        square = lane_sum(row_ptr, keep[:, None], row_ptr, keep[:, None], dim, "dot")
        norm = tl.sqrt(square)
        finite = norm < float("inf")
        divisor = tl.where(finite & (norm > 0), norm, 1.0)
        half = tl.zeros((ROWS,), tl.float64)
        for d in range(0, dim, WIDTH):
            col = d + tl.arange(0, WIDTH)
            inside = col < dim
            c = tl.load(row_ptr + col[None, :], mask=keep[:, None] & inside[None, :], other=0.0)
            c = tl.where(finite[:, None], c.to(tl.float64), 0.0)
            if METRIC == "cosine":
                c = c / divisor[:, None]
            m = tl.load(centre_ptr + head * dim + col, mask=inside, other=0.0).to(tl.float64)
            half = tl.maximum(half, tl.max(tl.abs(c - m[None, :]), 1) * 0.5)
        largest = tl.maximum(largest, tl.where(finite & keep, half, 0.0))
        tl.store(norm_ptr + head * codes + code, norm, mask=keep)
    half_ptr += head * tl.num_programs(0) + tl.program_id(0)
    tl.store(half_ptr, tl.max(largest).to(tl.float32))


@triton.jit
def largest_half(half_ptr, head, parts):
    """The largest of what `parts` programs measured, MEASURING at most."""
    i = tl.arange(0, MEASURING)
    return tl.max(tl.load(half_ptr + head * parts + i, mask=i < parts, other=0.0))


@triton.jit(do_not_specialize=["codes", "padded", "parts"])
def pack_codes(
    code_ptr,  # (H, codes, dim), unit stride in a row
    centre_ptr,  # (H, dim) float32
    norm_ptr,  # (H, codes) float64
    half_ptr,  # (H, parts) float32, see `largest_half`
    w_ptr,  # out: (H, padded, depth) float16, 0 outside
    bias_ptr,  # out: (H, padded) float32: h, infinite outside
    limits_ptr,  # out: (H, LIMITS, groups) float32
    codes, padded, parts, dim, depth, head_stride, code_stride,
    METRIC: tl.constexpr, TILE_N: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rounds GROUPS groups of codes and measures what that costs."""
    head = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    member = TILE_N // SIZE * tl.arange(0, SIZE)
    ROWS: tl.constexpr = GROUPS * SIZE
    code = tl.reshape(first_code(group, TILE_N, SIZE)[:, None] + member[None, :], (ROWS,))
    keep = code < codes
    norm = tl.load(norm_ptr + head * codes + code, mask=keep, other=float("inf"))
    finite = norm < float("inf")
    divisor = tl.where(finite & (norm > 0), norm, 1.0)
    t = power_of_two(code_scale(largest_half(half_ptr, head, parts))).to(tl.float64)
    code_ptr += head * head_stride + code[:, None].to(tl.int64) * code_stride
    w_ptr += (head * padded + code[:, None]) * depth
    squares = tl.zeros((ROWS,), tl.float64)  # |w|^2
    residuals = tl.zeros((ROWS,), tl.float64)  # |w - w^|^2
    shift = tl.zeros((WIDTH,), tl.float64)  # |m|^2
    for d in range(0, depth, WIDTH):
        col = d + tl.arange(0, WIDTH)
        inside = col < dim
        m = tl.load(centre_ptr + head * dim + col, mask=inside, other=0.0).to(tl.float64)
        c = tl.load(code_ptr + col[None, :], mask=finite[:, None] & inside[None, :], other=0.0)
        c = c.to(tl.float64)
        if METRIC == "cosine":
            c = c / divisor[:, None]
        w = tl.where(finite[:, None], (c - m[None, :]) * t, 0.0)
        # Some matrix units take subnormal numbers for 0: make them 0 here.
        rounded = tl.where(tl.abs(w) < 2.0**-14, 0.0, w).to(tl.float32).to(tl.float16)
        residual = w - rounded.to(tl.float64)
        squares += tl.sum(w * w, 1)
        residuals += tl.sum(residual * residual, 1)
        shift += m * m
        tl.store(w_ptr + col[None, :], rounded)
    unit = t * tl.sqrt(tl.sum(shift))
    if METRIC == "cosine":
        unit += t
    size = tl.sqrt(squares)
    off = tl.sqrt(residuals)
    p = (size + off) * (1 + 2.0**-20) + unit * 2.0**-28
    q = off * (1 + 2.0**-20) + (size + unit) * 2.0**-32  # c / |c| is rounded to float64
    h = tl.zeros((ROWS,), tl.float64)
    if METRIC == "l2":
        h = squares * 0.5
    if METRIC == "dot":
        p = tl.where(keep & (norm == float("inf")), float("inf"), p)
    tl.store(bias_ptr + head * padded + code, tl.where(finite, h, float("inf")).to(tl.float32))
    groups = padded // SIZE
    limits_ptr += head * LIMITS * groups + group
    tl.store(limits_ptr, tl.max(tl.reshape(p, (GROUPS, SIZE)), 1).to(tl.float32))
    tl.store(limits_ptr + groups, tl.max(tl.reshape(q, (GROUPS, SIZE)), 1).to(tl.float32))
    h = tl.max(tl.reshape(h, (GROUPS, SIZE)), 1) * 2.0**-20
    tl.store(limits_ptr + 2 * groups, h.to(tl.float32))


@triton.jit(do_not_specialize=["rows", "padded", "parts"])
def pack_rows(
    x_ptr,  # (H, rows, dim), unit stride in a row
    centre_ptr,  # (H, dim) float32
    half_ptr,  # (H, parts) float32, see `largest_half`: what t is made of
    norm_ptr,  # out, unless l2: (H, padded) float64: |x|
    z_ptr,  # out: (H, padded, depth) float16, 0 outside and where x is not finite
    bounds_ptr,  # out: (H, BOUNDS, padded) float32
    rows, padded, parts, dim, depth, head_stride, row_stride,
    sum_error, product_error,  # (D + 8) 2^-23, (depth + 64) 2^-22
    contract_error,  # (D / 8 + 16) 2^-51
    METRIC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):
    """Rounds rows and measures what that costs. In float32, so that it is fast everywhere."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    x_ptr += head * head_stride + row[:, None].to(tl.int64) * row_stride
    centre_ptr += head * dim
    half = tl.zeros((ROWS,), tl.float32)  # of the largest |x - m|, which itself may overflow
    largest = tl.zeros((ROWS,), tl.float32)
    broken = tl.zeros((ROWS,), tl.int32)
    unknown = tl.zeros((ROWS,), tl.int32)  # whether all distances are NaN
    for d in range(0, dim, WIDTH):
        col = d + tl.arange(0, WIDTH)
        inside = col < dim
        x = tl.load(x_ptr + col[None, :], mask=keep[:, None] & inside[None, :], other=0.0)
        x = x.to(tl.float32)
        finite = tl.abs(x) < float("inf")
        broken |= tl.max((~finite).to(tl.int32), 1)
        unknown |= tl.max((x != x).to(tl.int32), 1)
        x = tl.where(finite, x, 0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        if METRIC == "l2":
            m = tl.load(centre_ptr + col, mask=inside, other=0.0)
            half = tl.maximum(half, tl.max(tl.abs(x * 0.5 - m[None, :] * 0.5), 1))
    if METRIC != "l2":
        half = largest * 0.5
        square = lane_sum(x_ptr, keep[:, None], x_ptr, keep[:, None], dim, METRIC)
        tl.store(norm_ptr + head * padded + row, tl.sqrt(square))
    # Below t 2^40, so that beta cannot overflow; and x s must not, when x is large and x - m not.
    t = code_scale(largest_half(half_ptr, head, parts))
    e = tl.minimum(tl.minimum(13 - exponent(half), 100 - exponent(largest)), t + 40)
    s = power_of_two(tl.minimum(tl.maximum(e, -126), 126))
    beta = s / power_of_two(t)

    squares = tl.zeros((ROWS,), tl.float32)  # |z|^2
    residuals = tl.zeros((ROWS,), tl.float32)  # |z - z^|^2
    z_ptr += (head * padded + row[:, None]) * depth
    for d in range(0, depth, WIDTH):
        col = d + tl.arange(0, WIDTH)
        inside = col < dim
        x = tl.load(x_ptr + col[None, :], mask=keep[:, None] & inside[None, :], other=0.0)
        z = x.to(tl.float32) * s[:, None]
        if METRIC == "l2":
            m = tl.load(centre_ptr + col, mask=inside, other=0.0)
            z -= m[None, :] * s[:, None]
        z = tl.where((keep & (broken == 0))[:, None], z, 0.0)
        rounded = tl.where(tl.abs(z) < 2.0**-14, 0.0, z).to(tl.float16)
        residual = z - rounded.to(tl.float32)
        squares += tl.sum(z * z, 1)
        residuals += tl.sum(residual * residual, 1)
        tl.store(z_ptr + col[None, :], rounded)
    size = tl.sqrt_rn(squares) * (1 + sum_error)
    off = tl.sqrt_rn(residuals) * (1 + sum_error) + size * 2.0**-22  # and of the rounding of x - m
    size += off
    c = tl.full((ROWS,), 1.0, tl.float32)
    if METRIC == "l2":
        c += size * size / beta * contract_error
    if METRIC == "cosine":
        unknown = broken
    c = tl.where(broken != 0, float("inf"), c)
    bounds_ptr += head * BOUNDS * padded + row
    tl.store(bounds_ptr, beta)
    tl.store(bounds_ptr + padded, off + product_error * size)
    tl.store(bounds_ptr + 2 * padded, size)
    tl.store(bounds_ptr + 3 * padded, tl.where(unknown != 0, float("-inf"), c))


# Sizes are not specialised on: every batch runs the same binary.
@triton.jit(do_not_specialize=["rows", "codes"])
def filter_tile(
    z_ptr,  # (H, rows, depth) float16; if TMA, a descriptor of (H * rows, depth)
    w_ptr,  # (H, codes, depth) float16, the same
    bias_ptr,  # (H, codes) float32: h
    bounds_ptr,  # (H, BOUNDS, rows) float32, of which beta comes first
    minima_ptr,  # out: (H, rows, codes / SIZE) float32: the least S of each group
    rows, codes, depth,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, SIZE: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr,
):
    """One tile of scores. Rows, codes and depth are multiples of the tile's: nothing is masked."""
    # GROUP rows of tiles are walked column by column: what runs together shares factors in L2.
    program = tl.program_id(0)
    head = tl.program_id(1)
    in_group = GROUP * (codes // TILE_N)
    first = program // in_group * GROUP
    group = min(rows // TILE_M - first, GROUP)
    row = (first + program % in_group % group) * TILE_M
    col = program % in_group // group * TILE_N

    i = row + tl.arange(0, TILE_M)
    j = col + tl.arange(0, TILE_N)
    dots = tl.zeros((TILE_M, TILE_N), tl.float32)
    if TMA:
        for k in range(0, depth, TILE_K):
            z = z_ptr.load([head * rows + row, k])
            w = w_ptr.load([head * codes + col, k])
            dots = tl.dot(z, w.T, dots)
    else:
        k = tl.arange(0, TILE_K)
        z_ptr += (head.to(tl.int64) * rows + i[:, None]) * depth + k[None, :]
        w_ptr += (head.to(tl.int64) * codes + j[:, None]) * depth + k[None, :]
        for _ in range(0, depth, TILE_K):
            dots = tl.dot(tl.load(z_ptr), tl.load(w_ptr).T, dots)
            z_ptr += TILE_K
            w_ptr += TILE_K

    beta = tl.load(bounds_ptr + head.to(tl.int64) * BOUNDS * rows + i)
    bias = tl.load(bias_ptr + head.to(tl.int64) * codes + j)
    scores = beta[:, None] * bias[None, :] - dots
    STEP: tl.constexpr = TILE_N // SIZE
    least = tl.min(tl.reshape(scores, (TILE_M, SIZE, STEP)), 1)
    groups = tl.multiple_of(codes // SIZE, STEP)  # so that stores can be wide
    minima_ptr += (head.to(tl.int64) * rows + i[:, None]) * groups
    tl.store(minima_ptr + (col // SIZE + tl.arange(0, STEP))[None, :], least)
