// The float32 rung of nearest_code: a panel's codes relative to the one in its middle, so that
// bounds are as fine as the codes are close to one another.
#include <cmath>
#include <cstring>

#include "lanes.h"
#include "nearest_code.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

// Elements that are summed at once: few, so that the bound is tight, and the codes of a panel stay
// in the nearest cache while all rows of a block meet them.
constexpr int64_t kDepth = 64;

// Rows and vectors of codes whose sums fit into the registers.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(CPU_CAPABILITY_AVX2) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 1;
#else
constexpr int kTileRows = 2, kTileVectors = 1;
#endif

// dots (rows, 64) += the products of some rows with some columns of codes (depth, 64).
TILEWISE_INLINE void multiply_tile(const float* const (&rows)[kTileRows], const float* codes,
                                   int64_t depth, float* const (&dots)[kTileRows]) {
  Floats sums[kTileRows][kTileVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sums[r][v] = Floats::all(0.0f);
  }
  for (int64_t d = 0; d < depth; ++d) {
    Floats b[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) b[v] = Floats::load(codes + d * kPanel + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Floats a = Floats::all(rows[r][d]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = multiply_add(a, b[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      (Floats::load(dots[r] + 16 * v) + sums[r][v]).store(dots[r] + 16 * v);
    }
  }
}

// dots (count, 64) = rows (count, dim) times the codes of a panel (dim, 64).
void multiply_panel(const float* rows, int64_t rows_stride, int64_t count, const float* codes,
                    int64_t dim, float* dots) {
  std::memset(dots, 0, count * kPanel * sizeof(float));
  for (int64_t begin = 0; begin < dim; begin += kDepth) {
    const int64_t depth = dim - begin < kDepth ? dim - begin : kDepth;
    for (int64_t i = 0; i < count; i += kTileRows) {
      for (int64_t j = 0; j < kPanel; j += 16 * kTileVectors) {
        const float* a[kTileRows];
        float* out[kTileRows];
        float unused[kPanel];
        for (int r = 0; r < kTileRows; ++r) {  // beyond the last row, that row once more
          const bool inside = i + r < count;
          a[r] = rows + (inside ? i + r : count - 1) * rows_stride + begin;
          out[r] = inside ? dots + (i + r) * kPanel + j : unused;
        }
        multiply_tile(a, codes + begin * kPanel + j, depth, out);
      }
    }
  }
}

// out (dim) = (x - code) * size, rounded to float in T or after it.
template <typename T, typename X, typename C>
void shift_row(const X* x, const C* code, double size, int64_t dim, float* out) {
  const auto factor = static_cast<T>(size);  // a power of two
  for (int64_t d = 0; d < dim; ++d) {
    out[d] = static_cast<float>((static_cast<T>(x[d]) - static_cast<T>(code[d])) * factor);
  }
}

void shift_row(const Search& search, int64_t row, int64_t code, double size, float* out) {
  const auto of_code = [&](const auto* x) {
    const int64_t at = code * search.codebook.stride;
    if (search.codebook.is_double) {
      const auto* c = static_cast<const double*>(search.codebook.data) + at;
      return shift_row<double>(x, c, size, search.dim, out);
    }
    const auto* c = static_cast<const float*>(search.codebook.data) + at;
    // Of float32 numbers far from its limits the difference is rounded once in float32 as well.
    const bool narrow = sizeof(*x) == 4 && size >= 0x1p-60 && size <= 0x1p60;
    narrow ? shift_row<float>(x, c, size, search.dim, out)
           : shift_row<double>(x, c, size, search.dim, out);
  };
  const int64_t at = row * search.x.stride;
  search.x.is_double ? of_code(static_cast<const double*>(search.x.data) + at)
                     : of_code(static_cast<const float*>(search.x.data) + at);
}

// What scores, relative to that of the panel's middle, are at most for one of the k nearest,
// rounded up.
float relative_threshold(const Search& search, const Packed& packed, double middle, Row& row) {
  if (row.found < search.k) return INFINITY;
  const double best = row.best_distance[search.k - 1] * packed.distance_factor;
  const double base = middle * packed.distance_factor;
  // Far beyond float's range nothing is certain: the row goes to the exact comparison.
  row.hard |= !(std::abs(best) < 1e35 && std::abs(base) < 1e35);
  const double slack = search.metric == Metric::L2 ? 0.0 : 2.0 * row.slack;
  const double score = best - base + packed.rounding * (std::abs(best) + std::abs(base)) + slack;
  return static_cast<float>(score + std::abs(score) * 0x1p-21 + 0x1p-120);
}

// Lower bounds of the scores of a panel's groups, relative to its middle.
TILEWISE_INLINE Floats group_bounds(const FloatPanels& panels, int64_t slots, const float* dots,
                                    float margin, float tiny) {
  Floats low = Floats::all(INFINITY);
  for (int64_t j = 0; j < kPanel; j += 16) {
    const Floats half =
        Floats::load(panels.half_squares + slots + j) * Floats::all(1.0f - 0x1p-21f);
    const Floats room = multiply_add(Floats::load(panels.lengths + slots + j), Floats::all(margin),
                                     Floats::all(tiny));
    low = lower(half - Floats::load(dots + j) - room, low);
  }
  return low;
}

// Compares exactly what the bounds leave, the smallest first.
void compare_groups(const Search& search, const Packed& packed, const FloatPanels& panels,
                    int64_t p, float (&bounds)[kGroups], double middle, Row& row) {
  const int64_t* order = panels.order + p * kPanel;
  const int64_t codes = packed.codes - p * kPanel;
  while (!row.hard) {
    int least = 0;
    for (int g = 1; g < kGroups; ++g) least = bounds[g] < bounds[least] ? g : least;
    if (bounds[least] == INFINITY ||
        !(bounds[least] <= relative_threshold(search, packed, middle, row)) || least >= codes)
      return;
    compare_codes(search, order + least, (codes - least + kGroups - 1) / kGroups, packed.next, row);
    bounds[least] = INFINITY;
    if (row.groups > panels.max_groups) row.hard = true;
  }
}

}  // namespace

void pack_float_panel(const Search& search, const Packed& packed, const int64_t* order,
                      int64_t count, double* centre, float* row, const FloatPanel& out) {
  const int64_t dim = search.dim, middle = order[count / 2];
  const auto transform_of = [&](int64_t j) {
    return code_transform(search, search.norms ? search.norms[j] : 1.0, centre, packed.size);
  };
  std::memset(centre, 0, (dim + 7) / 8 * 8 * sizeof(double));
  add_row(search.codebook, middle, dim, transform_of(middle).pre, centre);
  for (int64_t i = 0; i < kPanel; ++i) {
    const bool inside = i < count;
    out.half_squares[i] = 0x1p100f;  // never a candidate
    out.lengths[i] = 0.0f;
    if (inside) {
      const double square =
          transform(search.codebook, order[i], dim, transform_of(order[i]), row).square;
      out.half_squares[i] = search.metric == Metric::L2
                                ? static_cast<float>(0.5 * square * (1.0 - packed.rounding))
                                : 0.0f;
      out.lengths[i] = static_cast<float>(std::sqrt(square) * (1.0 + 0x1p-20)) + 0x1p-126f;
    }
    for (int64_t d = 0; d < dim; ++d) out.codes[d * kPanel + i] = inside ? row[d] : 0.0f;
  }
}

void compare_middles(const Search& search, const FloatPanels& panels, Row& row, double* distances) {
  for (int64_t p = 0; p < panels.count; p += 4) {
    double four[4];
    exact_four(search, row, panels.middles + p, 1, four);
    for (int i = 0; i < 4; ++i) distances[p + i] = four[i];
    if (search.k > 1) continue;  // they would count twice
    for (int i = 0; i < 4; ++i) {
      row.found = 1;
      keep_nearer(four[i], panels.middles[p + i], row);
    }
  }
}

void search_float_panel(const Search& search, const Packed& packed, const FloatPanels& panels,
                        int64_t p, const FloatBlock& block) {
  const bool l2 = search.metric == Metric::L2;
  const int64_t dim = search.dim, stride = (panels.count + 3) / 4 * 4;
  const float relative =
      (kMultiplyAddRoundings * (dim < kDepth ? dim : kDepth) + dim / kDepth + 16) * 0x1p-24f;
  const float tiny = (packed.depth + 8) * 0x1p-124f;  // products that underflow
  float lengths[kBlockRows];
  alignas(64) float dots[kBlockRows * kPanel];
  for (int64_t i = 0; i < block.count; ++i) {
    const Row& row = block.rows[i];
    double length = row.hard ? 0.0 : row.length;
    if (l2 && !row.hard) {
      shift_row(search, row.index, panels.middles[p], packed.size,
                block.shifted + i * block.stride);
      length = std::sqrt(block.middles[i * stride + p]) * packed.size;
    }
    lengths[i] = static_cast<float>(length * (1.0 + 0x1p-20)) * relative;
  }
  multiply_panel(l2 ? block.shifted : block.a, block.stride, block.count,
                 panels.codes + p * kPanel * dim, dim, dots);
  for (int64_t i = 0; i < block.count; ++i) {
    Row& row = block.rows[i];
    if (row.hard) continue;
    const double middle = block.middles[i * stride + p];
    const Floats low = group_bounds(panels, p * kPanel, dots + i * kPanel, lengths[i], tiny);
    const float threshold = relative_threshold(search, packed, middle, row);
    if (row.hard || fold(low, Smallest()) > threshold) continue;
    float bounds[kGroups];
    low.store(bounds);
    compare_groups(search, packed, panels, p, bounds, middle, row);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
