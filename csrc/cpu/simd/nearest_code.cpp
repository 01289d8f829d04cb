// Quantisation, and the bounds that filters of nearest_code start from or compute in float32.
#include "nearest_code.h"

#include <cmath>
#include <cstring>

#include "lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

// Calls take(d, integers) with 16 quantised elements at a time. Returns the norm of the rest.
template <typename Take>
TILEWISE_INLINE double quantize(const float* v, double norm, int64_t depth, double scale, int limit,
                                const Take& take) {
  const Floats unit = Floats::all(static_cast<float>(scale));
  const Floats inverse = Floats::all(static_cast<float>(1.0 / scale));
  const Floats high = Floats::all(static_cast<float>(limit)), low = Floats::all(0.0f) - high;
  const Floats magic = Floats::all(0x1.8p23f);
  Floats squares = Floats::all(0.0f);
  for (int64_t d = 0; d < depth; d += 16) {
    const Floats value = Floats::load(v + d);
    const Floats shifted = higher(lower(value * inverse, high), low) + magic;
    const Floats rest = value - (shifted - magic) * unit;
    squares = squares + rest * rest;
    take(d, shifted.as<Ints>() - magic.as<Ints>());  // an integer stands in the low bits
  }
  // Up, by the rounding of these lines, and of v to float.
  const double residual = std::sqrt(fold(squares, Add())) * (1.0 + (depth + 32) * 0x1p-23);
  return residual + (norm + residual) * 0x1p-21 + 0x1p-120;
}

// The low bytes of 16 integers.
TILEWISE_INLINE void store_bytes(const Ints& integers, void* out) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)integers.v[0]);
  std::memcpy(out, &bytes, sizeof bytes);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i mask = _mm256_set1_epi32(255);
  const __m256i words =
      _mm256_packus_epi32((__m256i)integers.v[0] & mask, (__m256i)integers.v[1] & mask);
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  std::memcpy(out, &bytes, sizeof bytes);
#else
  int32_t words[16];
  integers.store(words);
  for (int i = 0; i < 16; ++i) static_cast<uint8_t*>(out)[i] = static_cast<uint8_t>(words[i]);
#endif
}

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

// A lower bound of the scores of 16 codes from their products, whose error is below margin *
// length[j].
TILEWISE_INLINE Floats float_bound(const Packed& packed, int64_t slot, const Floats& dots,
                                   const Floats& margin) {
  const Floats tiny = Floats::all((packed.depth + 8) * 0x1p-126f);  // products that underflow
  const Floats bias = Floats::load(packed.bias + slot) * Floats::all(1.0f - 0x1p-21f);
  return bias - dots - (Floats::load(packed.length + slot) * margin + tiny);
}

}  // namespace

double quantize_row(const float* v, double norm, int64_t depth, double scale, int limit,
                    uint8_t* q) {
  const Ints offset = Ints::all(limit + 1);
  return quantize(v, norm, depth, scale, limit,
                  [&](int64_t d, const Ints& integers) { store_bytes(integers + offset, q + d); });
}

double quantize_code(const float* v, double norm, int64_t depth, double scale, int limit,
                     int8_t* quads, int32_t& sum) {
  Ints sums = Ints::all(0);
  const double residual =
      quantize(v, norm, depth, scale, limit, [&](int64_t d, const Ints& integers) {
        int8_t bytes[16];
        store_bytes(Ints::all(0) - integers, bytes);
        for (int64_t i = 0; i < 16 && d + i < depth; i += 4) {
          std::memcpy(quads + (d + i) * kPanel, bytes + i, 4);
        }
        sums = sums + integers;
      });
  sum = fold(sums, Add());
  return residual;
}

bool integer_bias(const Packed& packed, int64_t first_panel, int64_t panels, double row_scale,
                  const Parts& parts, int limit, int32_t* bias) {
  const Floats length = Floats::all(static_cast<float>(parts.length * (1.0 + 0x1p-20)));
  const Floats residual = Floats::all(static_cast<float>(parts.residual * (1.0 + 0x1p-20)));
  const Floats highest = Floats::all(0x1p30f), lowest = Floats::all(-0x1p30f);
  const Floats rounding = Floats::all(0x1p-21f), two = Floats::all(2.0f);
  const Ints offset = Ints::all(limit + 1), none = Ints::all(0), one = Ints::all(1);
  Ints valid = one;
  for (int64_t p = 0; p < panels; ++p) {
    const Floats inverse =
        Floats::all(static_cast<float>(1.0 / (row_scale * packed.scales[first_panel + p])));
    for (int64_t j = p * kPanel; j < (p + 1) * kPanel; j += 16) {
      const int64_t at = first_panel * kPanel + j;
      const Floats square = Floats::load(packed.bias + at);
      const Floats margin =
          Floats::load(packed.residual + at) * length + Floats::load(packed.length + at) * residual;
      // Rounded down: less the rounding of this line and of the conversion.
      Floats bound = (square - margin - (square + margin) * rounding) * inverse - two;
      valid = valid & if_less(lowest, bound, one, none);                // NaN is not
      bound = higher(if_less(bound, highest, bound, highest), lowest);  // also where it is infinite
      (convert<int32_t>(bound) + Ints::load(packed.sums + at) * offset).store(bias + j);
    }
  }
  return fold(valid, Smallest()) == 1;
}

void pack_floats(const Search& search, const Packed& packed, int64_t panel, float* row,
                 float* out) {
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t slot = panel * kPanel + i;
    if (slot < packed.codes) {
      const int64_t j = packed.order[slot];
      const double norm = search.norms ? search.norms[j] : 1.0;
      const Transform how = code_transform(search, norm, packed.centre, packed.size);
      transform(search.codebook, j, search.dim, how, row);
    }
    for (int64_t d = 0; d < search.dim; ++d) {
      out[d * kPanel + i] = slot < packed.codes ? row[d] : 0.0f;
    }
  }
}

void filter_float(const Packed& packed, const float* codes, int64_t dim, int64_t first_panel,
                  int64_t panels, const float* rows, int64_t rows_stride, const float* lengths,
                  const RowBlock& block) {
  const float relative =
      (kMultiplyAddRoundings * (dim < kDepth ? dim : kDepth) + dim / kDepth + 16) * 0x1p-24f;
  alignas(64) float dots[kBlockRows * kPanel];
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t slots = (first_panel + p) * kPanel;
    multiply_panel(rows, rows_stride, block.count, codes + slots * dim, dim, dots);
    for (int64_t i = 0; i < block.count; ++i) {
      const Floats margin = Floats::all(lengths[i] * relative);
      Floats low = Floats::all(INFINITY);
      for (int64_t j = 0; j < kPanel; j += 16) {
        const Floats dot = Floats::load(dots + i * kPanel + j);
        low = lower(float_bound(packed, slots + j, dot, margin), low);
      }
      low.store(block.minima + i * block.stride + p * kGroups);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
