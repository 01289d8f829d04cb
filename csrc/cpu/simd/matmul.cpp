// Matrix products: packing of right factors, and blocks of products.
#include "matmul.h"

#include <cstring>
#include <utility>

#include "matmul_registers.h"
#include "matmul_tiles.h"
#include "transpose_any.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

// A panel is one of kPanel columns, or several narrower ones behind each other.
static_assert(kPanel % kWidth == 0);

TILEWISE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Element (k, j); the missing half of a pair is 0.
TILEWISE_INLINE uint32_t element(const PanelSource& from, int64_t k, int64_t j) {
  const int64_t across = from.transposed ? from.stride : 1,
                along = from.transposed ? 1 : from.stride;
  if (!from.bfloat16) return static_cast<const uint32_t*>(from.data)[k * along + j * across];
  const uint16_t* pair = static_cast<const uint16_t*>(from.data) + 2 * k * along + j * across;
  return pair[0] | (2 * k + 1 < from.depth ? static_cast<uint32_t>(pair[along]) << 16 : 0);
}

// `depth` rows of kWidth floats.
void copy_rows(const float* in, int64_t stride, int64_t depth, float* out) {
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t j = 0; j < kWidth; ++j) out[k * kWidth + j] = in[k * stride + j];
  }
}

// `depth` rows of kWidth pairs, from two rows of numbers each.
void copy_row_pairs(const uint16_t* in, int64_t stride, int64_t depth, uint32_t* out) {
  for (int64_t k = 0; k < depth; ++k) {
    const uint16_t *even = in + 2 * k * stride, *odd = even + stride;
    for (int64_t j = 0; j < kWidth; ++j) {
      out[k * kWidth + j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
    }
  }
}

// The first rows of a narrow panel of n columns, from column j on: all that vectors can pack.
int64_t pack_vectors(const PanelSource& from, int64_t j, int64_t n, float* out) {
  const int64_t numbers = from.bfloat16 ? 2 : 1, depth = from.depth / numbers;
  const auto* floats = static_cast<const float*>(from.data);
  const auto* halves = static_cast<const uint16_t*>(from.data);
  if (from.transposed) {
    const int64_t stride = from.stride / numbers;
    if (from.stride % numbers) return 0;
    transpose_any(floats + j * stride, stride, n, depth, out, kWidth);
  } else if (n < kWidth) {
    return 0;
  } else if (from.bfloat16) {
    copy_row_pairs(halves + j, from.stride, depth, reinterpret_cast<uint32_t*>(out));
  } else {
    copy_rows(floats + j, from.stride, depth, out);
  }
  return depth;
}

TILEWISE_INLINE const float* left_at(const LeftFactor& left, int64_t i, int64_t k) {
  const auto* data = static_cast<const float*>(left.data);
  return left.transposed ? data + k * left.stride + i
                         : data + k / kChunk * left.strip + i * left.stride;
}

// Part of a chunk, which begins at k: rows from i on. Zeros behind the numbers that there are.
void copy_left(const MatrixProduct& p, int64_t i, int64_t rows, int64_t k, int64_t copy_rows,
               float* out) {
  const int64_t numbers = smaller(2 * kChunk, p.depth - 2 * k);
  std::memset(out, 0, copy_rows * kChunk * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(out + r * kChunk, left_at(p.left, i + r, k), numbers * sizeof(uint16_t));
  }
}

void copy_block(const float* in, int64_t in_stride, int64_t rows, int64_t cols, float* out,
                int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) out[i * stride + j] = in[i * in_stride + j];
  }
}

using Kernel = void (*)(const Registers&);

template <typename Multiply, bool kTransposed, int... zero_to>
TILEWISE_INLINE Kernel kernel_for(int64_t rows, std::integer_sequence<int, zero_to...>) {
  static constexpr Kernel kernels[] = {&multiply_rows<Multiply, zero_to + 1, kTransposed>...};
  return kernels[rows - 1];
}

// Rows are dealt out evenly, to at most kMaxRows at a time.
template <typename Multiply, bool kTransposed>
void multiply_registers(const MatrixProduct& p, bool pairs) {
  const int64_t depth = depth_of(p.depth, pairs), panel_depth = padded_depth(depth);
  const int64_t parts = ceil_div(p.rows, kMaxRows);
  const auto* panels = static_cast<const float*>(p.right);
  alignas(64) float copied[kMaxRows * kChunk], edge[kMaxRows * kWidth];
  for (int64_t k = 0; k < depth; k += kChunk) {
    const int64_t n = smaller(kChunk, depth - k);
    const bool accumulate = p.accumulate || k > 0, half = pairs && 2 * (k + n) > p.depth;
    for (int64_t j = 0; j < p.cols; j += kWidth) {
      const float* right = panels + j * panel_depth + k * kWidth;
      const float* next =
          j + kWidth < p.cols ? right + kWidth * panel_depth : panels + (k + kChunk) * kWidth;
      const int64_t cols = smaller(kWidth, p.cols - j);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t i = p.rows * part / parts, rows = p.rows * (part + 1) / parts - i;
        float* out = p.out + i * p.stride + j;
        Registers at{left_at(p.left, i, k),
                     p.left.stride,
                     right,
                     n,
                     next + n * kWidth * part / parts,
                     out,
                     p.stride,
                     accumulate};
        if (half) {
          copy_left(p, i, rows, k, rows, copied);
          at.left = copied;
          at.stride = kChunk;
        }
        if (cols < kWidth) {
          if (accumulate) copy_block(out, p.stride, rows, cols, edge, kWidth);
          at.out = edge;
          at.out_stride = kWidth;
        }
        kernel_for<Multiply, kTransposed>(rows, std::make_integer_sequence<int, kMaxRows>())(at);
        if (cols < kWidth) copy_block(edge, kWidth, rows, cols, out, p.stride);
      }
    }
  }
}

#if defined(CPU_CAPABILITY_AVX512)
void multiply_with_tiles(const MatrixProduct& p) {
  static_assert(kPanel == 2 * kTileSize && kWidth == kPanel && kChunk % kTileSize == 0);
  const TileShapes shapes;
  const int64_t depth = depth_of(p.depth, true), panel_depth = padded_depth(depth);
  const auto* panels = static_cast<const float*>(p.right);
  alignas(64) float copied[kTileRows * kChunk], edge[kTileRows * kPanel] = {};
  for (int64_t k = 0; k < depth; k += kChunk) {
    const int64_t n = smaller(kChunk, panel_depth - k);
    const bool accumulate = p.accumulate || k > 0, partial = 2 * (k + n) > p.depth;
    for (int64_t j = 0; j < p.cols; j += kPanel) {
      const float* right = panels + j * panel_depth + k * kPanel;
      const float* next =
          j + kPanel < p.cols ? right + kPanel * panel_depth : panels + (k + kChunk) * kPanel;
      const int64_t cols = smaller(kPanel, p.cols - j);
      for (int64_t i = 0; i < p.rows; i += kTileRows) {
        const int64_t rows = smaller(kTileRows, p.rows - i);
        const float* left = left_at(p.left, i, k);
        float* out = p.out + i * p.stride + j;
        const bool copy = partial || rows < kTileRows, whole = rows == kTileRows && cols == kPanel;
        if (copy) copy_left(p, i, rows, k, kTileRows, copied);
        if (!whole && accumulate) copy_block(out, p.stride, rows, cols, edge, kPanel);
        multiply_tiles(copy ? copied : left, copy ? kChunk : p.left.stride, right, n,
                       next + n * kLinesAhead * (i / kTileRows), whole ? out : edge,
                       whole ? p.stride : kPanel, accumulate);
        if (!whole) copy_block(edge, kPanel, rows, cols, out, p.stride);
      }
    }
  }
}
#endif

}  // namespace

void pack_panel(const PanelSource& from, void* panel) {
  const int64_t depth = depth_of(from.depth, from.bfloat16), panel_depth = padded_depth(depth);
  if (depth == 0) return;  // the panel may be nowhere
  if (depth < panel_depth || from.cols < kPanel) {
    std::memset(panel, 0, panel_depth * kPanel * sizeof(float));
  }
  for (int64_t j = 0; j < from.cols; j += kWidth) {  // one narrow panel behind the other
    const int64_t n = smaller(kWidth, from.cols - j);
    auto* out = static_cast<uint32_t*>(panel) + j * panel_depth;
    for (int64_t k = pack_vectors(from, j, n, reinterpret_cast<float*>(out)); k < depth; ++k) {
      for (int64_t c = 0; c < n; ++c) out[k * kWidth + c] = element(from, k, j + c);
    }
  }
}

void multiply(const MatrixProduct& p, Bfloat16Unit unit) {
  if (p.depth == 0 && !p.accumulate) {
    for (int64_t i = 0; i < p.rows; ++i)
      std::memset(p.out + i * p.stride, 0, p.cols * sizeof(float));
  }
#if defined(CPU_CAPABILITY_AVX512)
  if (unit == Bfloat16Unit::AMX) return multiply_with_tiles(p);
  if (unit == Bfloat16Unit::AVX512_BF16) return multiply_registers<MultiplyPairs, false>(p, true);
#endif
  p.left.transposed ? multiply_registers<MultiplyFloats, true>(p, false)
                    : multiply_registers<MultiplyFloats, false>(p, false);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
