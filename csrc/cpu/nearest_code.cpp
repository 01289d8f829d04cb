// Filters of nearest_code: lower bounds of scores, from products of small integers or in float32.
#include "nearest_code.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

#if defined(CPU_CAPABILITY_AVX512)

// acc += the products of four unsigned bytes of a with four signed ones of b, in each lane. As an
// intrinsic gcc 12 moves the accumulators through memory.
TILEWISE_INLINE void multiply_quads(__m512i& acc, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

TILEWISE_INLINE __m512i broadcast_quad(const uint8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return _mm512_set1_epi32(quad);
}

template <int rows>
TILEWISE_INLINE void store_minima(const __m512i (&acc)[rows][4], float unit, float* minima,
                                  int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    const __m512i low = _mm512_min_epi32(_mm512_min_epi32(acc[r][0], acc[r][1]),
                                         _mm512_min_epi32(acc[r][2], acc[r][3]));
    const __m512 bound = _mm512_mul_ps(_mm512_cvtepi32_ps(low), _mm512_set1_ps(unit));
    _mm512_storeu_ps(minima + r * stride, bound);
  }
}

template <int rows>
TILEWISE_INLINE void load_bias(const int32_t* bias, __m512i (&acc)[rows][4]) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    const __m512i start = _mm512_loadu_si512(bias + 16 * v);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) acc[r][v] = start;
  }
}

// One tile: 6 rows with the 64 codes of a panel.
struct Vnni {
  static constexpr int kRows = 6;
  static void tile(const uint8_t* q, int64_t depth, const int8_t* quads, const int32_t* bias,
                   float unit, float* minima, int64_t stride) {
    __m512i acc[kRows][4];
    load_bias(bias, acc);
    for (int64_t k = 0; k < depth; k += 4) {
      __m512i b[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) b[v] = _mm512_loadu_si512(quads + 64 * (k + v));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i a = broadcast_quad(q + r * depth + k);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) multiply_quads(acc[r][v], a, b[v]);
      }
    }
    store_minima(acc, unit, minima, stride);
  }
};

// Without VNNI: products of bytes in 16 bits, which hold two quads of 7-bit numbers.
struct Pairs {
  static constexpr int kRows = 4;
  static void tile(const uint8_t* q, int64_t depth, const int8_t* quads, const int32_t* bias,
                   float unit, float* minima, int64_t stride) {
    const __m512i ones = _mm512_set1_epi16(1);
    __m512i acc[kRows][4];
    load_bias(bias, acc);
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m512i b0 = _mm512_loadu_si512(quads + 64 * (k + v));
        const __m512i b1 = _mm512_loadu_si512(quads + 64 * (k + 4 + v));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m512i sum =
              _mm512_add_epi16(_mm512_maddubs_epi16(broadcast_quad(q + r * depth + k), b0),
                               _mm512_maddubs_epi16(broadcast_quad(q + r * depth + k + 4), b1));
          acc[r][v] = _mm512_add_epi32(acc[r][v], _mm512_madd_epi16(sum, ones));
        }
      }
    }
    if (k < depth) {
      for (int v = 0; v < 4; ++v) {
        const __m512i b = _mm512_loadu_si512(quads + 64 * (k + v));
        for (int r = 0; r < kRows; ++r) {
          const __m512i sum = _mm512_maddubs_epi16(broadcast_quad(q + r * depth + k), b);
          acc[r][v] = _mm512_add_epi32(acc[r][v], _mm512_madd_epi16(sum, ones));
        }
      }
    }
    store_minima(acc, unit, minima, stride);
  }
};

#elif defined(CPU_CAPABILITY_AVX2)

TILEWISE_INLINE __m256i load_quads(const int8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

TILEWISE_INLINE __m256i broadcast_quad(const uint8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return _mm256_set1_epi32(quad);
}

// Products of bytes in 16 bits, which hold two quads of 7-bit numbers. 3 rows with 16 codes at a
// time, four times, so that everything stays in registers.
struct Pairs {
  static constexpr int kRows = 3;
  static void tile(const uint8_t* q, int64_t depth, const int8_t* quads, const int32_t* bias,
                   float unit, float* minima, int64_t stride) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i low[kRows][2];
    for (int v = 0; v < 4; ++v) {
      __m256i acc[kRows][2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256i start =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bias + 16 * v + 8 * h));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) acc[r][h] = start;
      }
      int64_t k = 0;
      for (; k + 8 <= depth; k += 8) {
        const int8_t* b = quads + 64 * (k + v);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m256i a0 = broadcast_quad(q + r * depth + k);
          const __m256i a1 = broadcast_quad(q + r * depth + k + 4);
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            const __m256i sum =
                _mm256_add_epi16(_mm256_maddubs_epi16(a0, load_quads(b + 32 * h)),
                                 _mm256_maddubs_epi16(a1, load_quads(b + 256 + 32 * h)));
            acc[r][h] = _mm256_add_epi32(acc[r][h], _mm256_madd_epi16(sum, ones));
          }
        }
      }
      if (k < depth) {
        const int8_t* b = quads + 64 * (k + v);
        for (int r = 0; r < kRows; ++r) {
          for (int h = 0; h < 2; ++h) {
            const __m256i sum =
                _mm256_maddubs_epi16(broadcast_quad(q + r * depth + k), load_quads(b + 32 * h));
            acc[r][h] = _mm256_add_epi32(acc[r][h], _mm256_madd_epi16(sum, ones));
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          low[r][h] = v == 0 ? acc[r][h] : _mm256_min_epi32(low[r][h], acc[r][h]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int h = 0; h < 2; ++h) {
        const __m256 bound = _mm256_mul_ps(_mm256_cvtepi32_ps(low[r][h]), _mm256_set1_ps(unit));
        _mm256_storeu_ps(minima + r * stride + 8 * h, bound);
      }
    }
  }
};

#endif

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)

#if defined(CPU_CAPABILITY_AVX512)

// Registers of tile instructions are named, not allocated: tiles 0 to 3 hold the sums of 16 rows
// with 16 codes each, 4 and 5 a step of 64 elements of rows and codes, 6 and 7 the last, shorter
// step.
#define TILEWISE_LOAD_TILE(n, base, stride) \
  __asm__ volatile("tileloadd (%0, %1, 1), %%tmm" #n ::"r"(base), "r"(stride) : "memory")
#define TILEWISE_STORE_TILE(n, base) \
  __asm__ volatile("tilestored %%tmm" #n ", (%0, %1, 1)" ::"r"(base), "r"(64L) : "memory")
#define TILEWISE_MULTIPLY_TILES(sum, rows, codes) \
  __asm__ volatile("tdpbusd %%tmm" #codes ", %%tmm" #rows ", %%tmm" #sum ::)

// While it lives, this thread's tile registers have the shapes for rows of `depth` bytes.
class TileShapes {
 public:
  explicit TileShapes(int64_t depth) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    const auto shape = [&](int tile, int64_t rows, int64_t row_bytes) {
      shapes.rows[tile] = static_cast<uint8_t>(rows);
      shapes.row_bytes[tile] = static_cast<uint16_t>(row_bytes);
    };
    for (int sum = 0; sum < 4; ++sum) shape(sum, 16, 64);
    shape(4, 16, 64);
    shape(5, 16, 64);
    const int64_t rest = depth % 64 ? depth % 64 : 64;
    shape(6, 16, rest);
    shape(7, rest / 4, 64);
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileShapes() { __asm__ volatile("tilerelease" ::); }
};

struct Amx {
  static constexpr int kRows = 16;
  static void tile(const uint8_t* q, int64_t depth, const int8_t* quads, const int32_t* bias,
                   float unit, float* minima, int64_t stride) {
    __asm__ volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::);
    int64_t k = 0;
    for (; k + 64 <= depth; k += 64) {
      const int8_t* b = quads + 64 * k;
      TILEWISE_LOAD_TILE(4, q + k, depth);
      TILEWISE_LOAD_TILE(5, b, 256L);
      TILEWISE_MULTIPLY_TILES(0, 4, 5);
      TILEWISE_LOAD_TILE(5, b + 64, 256L);
      TILEWISE_MULTIPLY_TILES(1, 4, 5);
      TILEWISE_LOAD_TILE(5, b + 128, 256L);
      TILEWISE_MULTIPLY_TILES(2, 4, 5);
      TILEWISE_LOAD_TILE(5, b + 192, 256L);
      TILEWISE_MULTIPLY_TILES(3, 4, 5);
    }
    if (k < depth) {
      const int8_t* b = quads + 64 * k;
      TILEWISE_LOAD_TILE(6, q + k, depth);
      TILEWISE_LOAD_TILE(7, b, 256L);
      TILEWISE_MULTIPLY_TILES(0, 6, 7);
      TILEWISE_LOAD_TILE(7, b + 64, 256L);
      TILEWISE_MULTIPLY_TILES(1, 6, 7);
      TILEWISE_LOAD_TILE(7, b + 128, 256L);
      TILEWISE_MULTIPLY_TILES(2, 6, 7);
      TILEWISE_LOAD_TILE(7, b + 192, 256L);
      TILEWISE_MULTIPLY_TILES(3, 6, 7);
    }
    alignas(64) int32_t sums[4][kRows][16];
    TILEWISE_STORE_TILE(0, sums[0]);
    TILEWISE_STORE_TILE(1, sums[1]);
    TILEWISE_STORE_TILE(2, sums[2]);
    TILEWISE_STORE_TILE(3, sums[3]);
    __m512i start[4];
    for (int v = 0; v < 4; ++v) start[v] = _mm512_loadu_si512(bias + 16 * v);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      __m512i score[4];
      for (int v = 0; v < 4; ++v) {
        score[v] = _mm512_add_epi32(_mm512_load_si512(sums[v][r]), start[v]);
      }
      const __m512i low = _mm512_min_epi32(_mm512_min_epi32(score[0], score[1]),
                                           _mm512_min_epi32(score[2], score[3]));
      const __m512 bound = _mm512_mul_ps(_mm512_cvtepi32_ps(low), _mm512_set1_ps(unit));
      _mm512_storeu_ps(minima + r * stride, bound);
    }
  }
};

#endif

template <typename Kernel>
void filter_with(const Packed& packed, int64_t first_panel, int64_t panels, const uint8_t* rows,
                 double row_scale, const int32_t* bias, const RowBlock& block) {
  for (int64_t p = 0; p < panels; ++p) {
    const int8_t* quads = packed.quads + (first_panel + p) * kPanel * packed.depth;
    const float unit = static_cast<float>(row_scale * packed.scales[first_panel + p]);
    for (int64_t i = 0; i < block.count; i += Kernel::kRows) {
      Kernel::tile(rows + i * packed.depth, packed.depth, quads, bias + p * kPanel, unit,
                   block.minima + i * block.stride + p * kGroups, block.stride);
    }
  }
}

#endif

// Calls take(d, integers) with 16 quantised elements at a time. Returns the norm of the rest.
template <typename Take>
TILEWISE_INLINE double quantize(const float* v, double norm, int64_t depth, double scale,
                                int limit, const Take& take) {
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
  const __m256i words = _mm256_packus_epi32((__m256i)integers.v[0] & mask,
                                            (__m256i)integers.v[1] & mask);
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(ordered),
                                         _mm256_extracti128_si256(ordered, 1));
  std::memcpy(out, &bytes, sizeof bytes);
#else
  int32_t words[16];
  integers.store(words);
  for (int i = 0; i < 16; ++i) static_cast<uint8_t*>(out)[i] = static_cast<uint8_t>(words[i]);
#endif
}

}  // namespace

int filter_limit() {
  switch (integer_unit()) {
    case IntegerUnit::NONE:
      return kNoFilter;
    case IntegerUnit::PAIRS:
      return 63;
    default:
      return 127;
  }
}

void filter_integer(const Packed& packed, int64_t first_panel, int64_t panels, const uint8_t* rows,
                    double row_scale, const int32_t* bias, const RowBlock& block) {
#if defined(CPU_CAPABILITY_AVX512)
  // Short rows do not pay for the way through the tiles.
  if (integer_unit() == IntegerUnit::AMX && packed.depth >= 48) {
    const TileShapes shapes(packed.depth);
    return filter_with<Amx>(packed, first_panel, panels, rows, row_scale, bias, block);
  }
  if (integer_unit() >= IntegerUnit::VNNI) {
    return filter_with<Vnni>(packed, first_panel, panels, rows, row_scale, bias, block);
  }
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  filter_with<Pairs>(packed, first_panel, panels, rows, row_scale, bias, block);
#endif
}

double quantize_row(const float* v, double norm, int64_t depth, double scale, int limit,
                    uint8_t* q) {
  const Ints offset = Ints::all(limit + 1);
  return quantize(v, norm, depth, scale, limit, [&](int64_t d, const Ints& integers) {
    store_bytes(integers + offset, q + d);
  });
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
      const Floats margin = Floats::load(packed.residual + at) * length +
                            Floats::load(packed.length + at) * residual;
      // Rounded down: less the rounding of this line and of the conversion.
      Floats bound = (square - margin - (square + margin) * rounding) * inverse - two;
      valid = valid & if_less(lowest, bound, one, none);  // NaN is not
      bound = if_less(bound, highest, bound, highest);    // also where it is infinite
      (convert<int32_t>(bound) + Ints::load(packed.sums + at) * offset).store(bias + j);
    }
  }
  return fold(valid, Smallest()) == 1;
}

void filter_float(const Packed& packed, int64_t first_panel, int64_t panels, const float* dots,
                  int64_t dots_stride, const float* lengths, float relative, const RowBlock& block,
                  int64_t first_group) {
  const Floats tiny = Floats::all((packed.depth + 8) * 0x1p-126f);  // products that underflow
  const Floats down = Floats::all(1.0f - 0x1p-21f);
  for (int64_t i = 0; i < block.count; ++i) {
    const Floats factor = Floats::all(lengths[i] * relative);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t at = (first_panel + p) * kPanel;
      Floats low = Floats::all(std::numeric_limits<float>::infinity());
      for (int64_t j = 0; j < kPanel; j += 16) {
        const Floats margin = Floats::load(packed.length + at + j) * factor + tiny;
        const Floats dot = Floats::load(dots + i * dots_stride + p * kPanel + j);
        low = lower(Floats::load(packed.bias + at + j) * down - dot - margin, low);
      }
      low.store(block.minima + i * block.stride + first_group + p * kGroups);
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
