// Integer filter of nearest_code: products of 8-bit numbers, 16 to 64 codes at a time.
#include "lanes.h"
#include "nearest_code.h"

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

// The bounds of a row's 16 groups: the least of four scores each.
TILEWISE_INLINE void store_minima(const __m512i (&score)[4], float unit, float* minima) {
  const __m512i low =
      _mm512_min_epi32(_mm512_min_epi32(score[0], score[1]), _mm512_min_epi32(score[2], score[3]));
  _mm512_storeu_ps(minima, _mm512_mul_ps(_mm512_cvtepi32_ps(low), _mm512_set1_ps(unit)));
}

template <int rows>
TILEWISE_INLINE void store_minima(const __m512i (&scores)[rows][4], float unit, float* minima,
                                  int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) store_minima(scores[r], unit, minima + r * stride);
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

// Registers of tile instructions are named, not allocated: tiles 0 to 3 hold the sums of 16 rows
// with 16 codes each, 4 and 5 a step of 64 elements of rows and codes, 6 and 7 the last, shorter
// step.
#define TILEWISE_LOAD_TILE(n, base, stride) \
  __asm__ volatile("tileloadd (%0, %1, 1), %%tmm" #n::"r"(base), "r"(stride) : "memory")
#define TILEWISE_STORE_TILE(n, base) \
  __asm__ volatile("tilestored %%tmm" #n ", (%0, %1, 1)" ::"r"(base), "r"(64L) : "memory")
#define TILEWISE_MULTIPLY_TILES(sum, rows, codes) \
  __asm__ volatile("tdpbusd %%tmm" #codes ", %%tmm" #rows ", %%tmm" #sum::)

// Adds the products of a step: its rows with the four times 16 codes of a panel.
#define TILEWISE_STEP(rows, codes, row_base, code_base) \
  do {                                                  \
    TILEWISE_LOAD_TILE(rows, row_base, depth);          \
    TILEWISE_LOAD_TILE(codes, code_base, 256L);         \
    TILEWISE_MULTIPLY_TILES(0, rows, codes);            \
    TILEWISE_LOAD_TILE(codes, (code_base) + 64, 256L);  \
    TILEWISE_MULTIPLY_TILES(1, rows, codes);            \
    TILEWISE_LOAD_TILE(codes, (code_base) + 128, 256L); \
    TILEWISE_MULTIPLY_TILES(2, rows, codes);            \
    TILEWISE_LOAD_TILE(codes, (code_base) + 192, 256L); \
    TILEWISE_MULTIPLY_TILES(3, rows, codes);            \
  } while (false)

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
    for (; k + 64 <= depth; k += 64) TILEWISE_STEP(4, 5, q + k, quads + 64 * k);
    if (k < depth) TILEWISE_STEP(6, 7, q + k, quads + 64 * k);
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
      store_minima(score, unit, minima + r * stride);
    }
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
}  // namespace CPU_CAPABILITY
}  // namespace tilewise
