"""The random stream of every backend in Triton: Philox4x32-10, and the variates made of its words.

As `tilewise.reference._philox` has it, word for word. Logarithms and rotations are polynomials with
fused products written out: a variate has the same bits in every kernel and for every tile, whatever
the compiler contracts around it, on NVIDIA and AMD alike.
"""

import triton
import triton.language as tl

GUMBEL = tl.constexpr(0)  # the last word of the counter
GAUSSIAN = tl.constexpr(1)
NEGATIVE_TEXTS = tl.constexpr(2)
NEGATIVE_IMAGES = tl.constexpr(3)


@triton.jit
def words(seed, row, call, OP: tl.constexpr):
    """The words of columns 4 * call to 4 * call + 3, four times (ROWS, CALLS).

    row (ROWS,) int64, call (CALLS,). What depends on one of them alone is computed once for it:
    that is the first of ten rounds.
    """
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    op = tl.full((1, 1), OP, tl.uint32)
    return tl.philox(seed, call.to(tl.uint32)[None, :], low[:, None], high[:, None], op)


@triton.jit
def in_columns(a, b, c, d):
    """Four times (ROWS, CALLS), one for each column of a call, as (ROWS, 4 * CALLS)."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def uniform(word):
    """Float32 in [2^-33, 1 - 2^-24]."""
    u = tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    return tl.minimum(u, 0.9999999403953552)


@triton.jit
def log_near(v, excess):
    """log(v) of normal v > 0, float32; relative error 1.2e-7.

    `excess` is v - 1, which may know more digits than v does; used where v < 4 / 3, v > 2 / 3.
    """
    bits = v.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # times 2^23; what is left of v is in [2/3, 4/3)
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(exponent == 0, excess, f)
    p = tl.fma(f, 0.140263631939888, -0.15388545393943787)
    p = tl.fma(f, p, 0.13995805382728577)
    p = tl.fma(f, p, -0.1641595959663391)
    p = tl.fma(f, p, 0.20011168718338013)
    p = tl.fma(f, p, -0.2500782012939453)
    p = tl.fma(f, p, 0.33333197236061096)
    p = tl.fma(f, p, -0.49999937415122986)
    near_one = tl.fma(f * f, p, f)
    return tl.fma(exponent.to(tl.float32), 8.262958317573066e-08, near_one)  # 2^-23 * log(2)


@triton.jit
def log(v):
    """log(v) of normal v > 0, float32; relative error 1.2e-7."""
    return log_near(v, v - 1.0)


@triton.jit
def gumbel(word):
    """Standard Gumbel variates, float32."""
    u = uniform(word)
    exponential = -log_near(1.0 - u, -u)  # as many digits where u is small as u has
    return -log(exponential)


@triton.jit
def gumbel_tile(seed, row, first, COLS: tl.constexpr, OP: tl.constexpr = GUMBEL):
    """Variates of columns first to first + COLS - 1, `first` a multiple of 4: (ROWS, COLS)."""
    call = first // 4 + tl.arange(0, COLS // 4)
    a, b, c, d = words(seed, row, call, OP)
    return gumbel(in_columns(a, b, c, d))


@triton.jit
def gumbel_pieces(seed, row, piece, COLS: tl.constexpr):
    """Variates of columns piece * COLS to piece * COLS + COLS - 1 of each row: (ROWS, COLS)."""
    call = piece[:, None] * (COLS // 4) + tl.arange(0, COLS // 4)[None, :]
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    op = tl.full((1, 1), GUMBEL, tl.uint32)
    a, b, c, d = tl.philox(seed, call.to(tl.uint32), low[:, None], high[:, None], op)
    return gumbel(in_columns(a, b, c, d))


@triton.jit
def normal_pair(word, turn_word):
    """Two standard normal variates by Box and Muller, float32."""
    u = uniform(word)
    radius = tl.sqrt_rn(-2.0 * log(u))  # tl.sqrt may be an approximation
    turns = 4.0 * uniform(turn_word)  # quarter turns
    quarter = tl.floor(turns + 0.5)
    t = turns - quarter  # in [-1/2, 1/2], exactly
    square = t * t
    s = tl.fma(square, -0.004602177068591118, 0.07968022674322128)
    s = tl.fma(square, s, -0.6459634900093079)
    s = t * tl.fma(square, s, 1.5707963705062866)  # sine of a quarter turn times t
    c = tl.fma(square, 0.0009040216682478786, -0.02086028829216957)
    c = tl.fma(square, c, 0.25366923213005066)
    c = tl.fma(square, c, -1.2337005138397217)
    c = tl.fma(square, c, 1.0)  # its cosine
    n = quarter.to(tl.int32)
    cos = tl.where(n & 1 == 0, c, s)
    sin = tl.where(n & 1 == 0, s, c)
    cos = tl.where((n + 1) & 2 == 0, cos, -cos)
    sin = tl.where(n & 2 == 0, sin, -sin)
    return radius * cos, radius * sin


@triton.jit
def normal_tile(seed, row, first, COLS: tl.constexpr):
    """Variates of columns first to first + COLS - 1, `first` a multiple of 4: (ROWS, COLS)."""
    call = first // 4 + tl.arange(0, COLS // 4)
    a, b, c, d = words(seed, row, call, GAUSSIAN)
    a, b = normal_pair(a, b)
    c, d = normal_pair(c, d)
    return in_columns(a, b, c, d)
