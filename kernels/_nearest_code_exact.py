"""nearest_code: distances as the contract wants them, lists of the nearest codes, brute force.

Kernels that use these must be launched with `enable_fp_fusion=False`: a fused multiply-add rounds
once where the contract rounds twice.
"""

import triton
import triton.language as tl

# Distances are compared as integers, which order like the float64 that they are made of.
EMPTY = tl.constexpr(2**63 - 1)  # after every distance, NaN too
UNUSED = tl.constexpr(-(2**63))  # a slot that nothing may replace
NO_CODE = tl.constexpr(2**31 - 1)


@triton.jit
def lane_sum(a_ptr, a_keep, b_ptr, b_keep, dim, METRIC: tl.constexpr):
    """Sums over `dim` elements of a * b, or of (a - b)^2 for l2, in the order of the contract.

    Pointers and masks are (..., 1) and broadcast; the result, one sum for each, is flat.
    """
    lane = tl.arange(0, 8)
    both, _ = tl.broadcast(a_ptr + lane, b_ptr + lane)
    sums = tl.zeros(both.shape, tl.float64)
    for d in range(0, dim, 8):
        inside = d + lane < dim
        a = tl.load(a_ptr + (d + lane), mask=a_keep & inside, other=0.0).to(tl.float64)
        b = tl.load(b_ptr + (d + lane), mask=b_keep & inside, other=0.0).to(tl.float64)
        if METRIC == "l2":
            sums += (a - b) * (a - b)
        else:
            sums += a * b
    # A sum of two has one order: nothing is left to the compiler.
    COUNT: tl.constexpr = sums.numel // 8
    four = tl.sum(tl.reshape(sums, (COUNT, 2, 4)), 1)
    two = tl.sum(tl.reshape(four, (COUNT, 2, 2)), 1)
    return tl.sum(two, 1)


@triton.jit
def distance(sums, x_norm, code_norm, METRIC: tl.constexpr):
    """The distances that sums stand for; norms are used by "cosine" only."""
    if METRIC == "l2":
        return sums
    if METRIC == "dot":
        return -sums
    zero = ((x_norm == 0.0) | (code_norm == 0.0)) & (sums == sums)
    product = tl.where(zero, 1.0, x_norm * code_norm)
    return tl.where(zero, 1.0, 1.0 - sums / product)


@triton.jit
def to_key(distance):
    """An int64 for each float64, in the same order: -0 like 0, NaN after infinity."""
    bits = tl.where(distance == 0.0, 0.0, distance).to(tl.int64, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    return tl.where(distance == distance, key, 0x7FF8000000000000)


@triton.jit
def from_key(key):
    """The float64 again; NaN for EMPTY."""
    return tl.where(key < 0, key ^ 0x7FFFFFFFFFFFFFFF, key).to(tl.float64, bitcast=True)


@triton.jit
def empty_lists(ROWS: tl.constexpr, SLOTS: tl.constexpr, TOPK: tl.constexpr):
    """Keys and codes of the TOPK nearest codes of each row so far, (ROWS, SLOTS), unordered."""
    slot = tl.zeros((ROWS, SLOTS), tl.int32) + tl.arange(0, SLOTS)[None, :]
    keys = tl.where(slot < TOPK, tl.full((ROWS, SLOTS), EMPTY, tl.int64), UNUSED)
    return keys, tl.full((ROWS, SLOTS), NO_CODE, tl.int32) - slot


@triton.jit
def insert(keys, codes, key, code, new):
    """Puts (key, code), one for each row where `new`, in the place of the last, if that is later.

    Of equal keys the lower code comes first, so the order of insertion does not matter.
    """
    last_key = tl.max(keys, 1)
    last_code = tl.max(tl.where(keys == last_key[:, None], codes, -1), 1)
    better = new & ((key < last_key) | ((key == last_key) & (code < last_code)))
    here = better[:, None] & (keys == last_key[:, None]) & (codes == last_code[:, None])
    return tl.where(here, key[:, None], keys), tl.where(here, code[:, None], codes)


@triton.jit
def insert_all(keys, codes, key, code, new, TOPK: tl.constexpr):
    """The same for (ROWS, N) pairs, of which no more than TOPK can matter."""
    for _ in range(TOPK):
        best = tl.min(tl.where(new, key, EMPTY), 1)
        pick = tl.min(tl.where(new & (key == best[:, None]), code, NO_CODE), 1)
        keys, codes = insert(keys, codes, best, pick, pick < NO_CODE)
        new = new & (code != pick[:, None])
    return keys, codes


@triton.jit
def store_lists(keys, codes, index_ptr, distance_ptr, found, keep, TOPK: tl.constexpr):
    """Stores the lists, in order, to rows of pointers (ROWS, 1); -1 and 0 where not `found`."""
    SLOTS: tl.constexpr = keys.shape[1]
    slot = tl.arange(0, SLOTS)
    place = slot[None, :]
    if TOPK > 1:
        earlier = (keys[:, None, :] < keys[:, :, None]) | (
            (keys[:, None, :] == keys[:, :, None]) & (codes[:, None, :] < codes[:, :, None])
        )
        earlier = earlier & (slot < TOPK)[None, None, :]
        place = tl.sum(earlier.to(tl.int32), 2)
    keep = keep[:, None] & (slot < TOPK)[None, :]
    index = tl.where(found[:, None], codes.to(tl.int64), -1)
    value = tl.where(found[:, None], from_key(keys), 0.0).to(tl.float32)
    tl.store(index_ptr + place, index, mask=keep)
    tl.store(distance_ptr + place, value, mask=keep)


@triton.jit
def nearest_of(
    x_ptr, row, found, code_ptr, begin, end, dim, x_stride, code_stride,
    METRIC: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, CODES: tl.constexpr,
):
    """Lists of the nearest codes from `begin` to `end` for the rows that are `found`."""
    ROWS: tl.constexpr = row.shape[0]
    a_ptr = x_ptr + row[:, None, None].to(tl.int64) * x_stride
    a_keep = found[:, None, None]
    x_norm = tl.zeros((ROWS,), tl.float64)
    if METRIC == "cosine":
        x_norm = tl.sqrt(lane_sum(a_ptr, a_keep, a_ptr, a_keep, dim, METRIC))
    keys, nearest = empty_lists(ROWS, SLOTS, TOPK)
    for first in range(begin, end, CODES):
        code = first + tl.arange(0, CODES)
        b_ptr = code_ptr + code[None, :, None].to(tl.int64) * code_stride
        b_keep = (code < end)[None, :, None]
        code_norm = tl.zeros((CODES,), tl.float64)
        if METRIC == "cosine":
            code_norm = tl.sqrt(lane_sum(b_ptr, b_keep, b_ptr, b_keep, dim, METRIC))
        sums = tl.reshape(lane_sum(a_ptr, a_keep, b_ptr, b_keep, dim, METRIC), (ROWS, CODES))
        key = to_key(distance(sums, x_norm[:, None], code_norm[None, :], METRIC))
        new = found[:, None] & (code < end)[None, :]
        keys, nearest = insert_all(keys, nearest, key, code[None, :], new, TOPK)
    return keys, nearest


# Sizes are not specialised on: every batch runs the same binary.
@triton.jit(do_not_specialize=["rows", "codes", "mask_stride", "out_stride"])
def brute(
    x_ptr,  # (H, rows, dim), unit stride in a row
    code_ptr,  # (H, codes, dim), the same
    mask_ptr,  # (H, rows) uint8, if HAS_MASK
    left_ptr,  # (H, rows) uint8, if HAS_LEFT: other rows are not touched
    index_ptr, distance_ptr,  # out: (H, rows, TOPK) int64 and float32
    rows, codes, dim,
    x_head_stride, x_stride, code_head_stride, code_stride, mask_stride, out_stride,
    METRIC: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_LEFT: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):
    """The nearest codes of ROWS rows, by all distances in float64."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    found = keep
    if HAS_LEFT:
        keep = tl.load(left_ptr + head * rows + row, mask=keep, other=0) != 0
        found = keep
    elif HAS_MASK:
        found = tl.load(mask_ptr + head * mask_stride + row, mask=keep, other=0) != 0
    if tl.max(keep.to(tl.int32)) > 0:
        keys, nearest = nearest_of(
            x_ptr + head * x_head_stride, row, found, code_ptr + head * code_head_stride, 0, codes,
            dim, x_stride, code_stride, METRIC, TOPK, SLOTS, CODES,
        )
        out = head * out_stride + row[:, None].to(tl.int64) * TOPK
        store_lists(keys, nearest, index_ptr + out, distance_ptr + out, found, keep, TOPK)


@triton.jit
def store_share(keys, nearest, key_ptr, nearest_ptr, head, row, inside, rows, TOPK: tl.constexpr):
    """Stores the lists of one share of the codes, as `merge_lists` takes them."""
    slot = tl.arange(0, keys.shape[1])[None, :]
    share = (head * rows + row[:, None]) * tl.num_programs(2) + tl.program_id(2)
    keep = inside[:, None] & (slot < TOPK)
    tl.store(key_ptr + share * TOPK + slot, keys, mask=keep)
    tl.store(nearest_ptr + share * TOPK + slot, nearest, mask=keep)


@triton.jit(do_not_specialize=["rows", "codes", "share", "mask_stride"])
def brute_shares(
    x_ptr, code_ptr, mask_ptr,  # as in `brute`
    key_ptr, nearest_ptr,  # out, see `merge_lists`
    rows, codes, share, dim,
    x_head_stride, x_stride, code_head_stride, code_stride, mask_stride,
    METRIC: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr,
):
    """What `brute` does, for a share of the codes, `share` of them."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    found = inside
    if HAS_MASK:
        found = tl.load(mask_ptr + head * mask_stride + row, mask=inside, other=0) != 0
    begin = tl.program_id(2) * share
    keys, nearest = nearest_of(
        x_ptr + head * x_head_stride, row, found, code_ptr + head * code_head_stride,
        begin, min(begin + share, codes), dim, x_stride, code_stride, METRIC, TOPK, SLOTS, CODES,
    )
    store_share(keys, nearest, key_ptr, nearest_ptr, head, row, inside, rows, TOPK)


@triton.jit(do_not_specialize=["rows", "shares", "mask_stride", "out_stride"])
def merge_lists(
    key_ptr, nearest_ptr,  # (H, rows, shares, TOPK) int64 and int32, EMPTY where there is no code
    mask_ptr,  # (H, rows) uint8, if HAS_MASK
    left_ptr,  # (H, rows, shares) uint8; or None
    all_left_ptr,  # out: (H, rows) uint8, the least of these
    index_ptr, distance_ptr,  # out: (H, rows, TOPK) int64 and float32
    rows, shares, mask_stride, out_stride,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr, SHARES: tl.constexpr,
):
    """The nearest codes of ROWS rows from those of each share of the codes, SHARES at a time."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    found = inside
    if HAS_MASK:
        found = tl.load(mask_ptr + head * mask_stride + row, mask=inside, other=0) != 0
    keys, nearest = empty_lists(ROWS, SLOTS, TOPK)
    left = tl.full((ROWS,), 1, tl.int32)
    slot = tl.arange(0, SHARES * SLOTS)[None, :]
    for first in range(0, shares, SHARES):
        share = first + slot // SLOTS
        keep = found[:, None] & (share < shares) & (slot % SLOTS < TOPK)
        at = ((head * rows + row[:, None]) * shares + share) * TOPK + slot % SLOTS
        key = tl.load(key_ptr + at, mask=keep, other=EMPTY)
        code = tl.load(nearest_ptr + at, mask=keep, other=NO_CODE)
        keys, nearest = insert_all(keys, nearest, key, code, key < EMPTY, TOPK)
        if left_ptr is not None:
            at = (head * rows + row[:, None]) * shares + share
            some = tl.load(left_ptr + at, mask=inside[:, None] & (share < shares), other=1)
            left = tl.minimum(left, tl.min(some.to(tl.int32), 1))
    if left_ptr is not None:
        tl.store(all_left_ptr + head * rows + row, left.to(tl.uint8), mask=inside)
    out = head * out_stride + row[:, None].to(tl.int64) * TOPK
    store_lists(keys, nearest, index_ptr + out, distance_ptr + out, found, inside, TOPK)
