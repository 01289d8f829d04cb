// The inner loop of bfloat16 products with AMX: 32 rows times a panel of 32 columns, in tiles.
#pragma once

#include "lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)

// Registers of tile instructions are named, not allocated: tiles 0 to 3 hold the sums of twice 16
// rows with twice 16 columns, 4 and 5 a step of 16 pairs of those rows, 6 and 7 of those columns.
#define TILEWISE_LOAD_TILE(n, base, bytes) \
  __asm__ volatile("tileloadd (%0, %1, 1), %%tmm" #n::"r"(base), "r"(bytes) : "memory")
#define TILEWISE_STORE_TILE(n, base, bytes) \
  __asm__ volatile("tilestored %%tmm" #n ", (%0, %1, 1)" ::"r"(base), "r"(bytes) : "memory")
#define TILEWISE_MULTIPLY_TILES(sum, rows, cols) \
  __asm__ volatile("tdpbf16ps %%tmm" #cols ", %%tmm" #rows ", %%tmm" #sum::)

constexpr int64_t kTileSize = 16, kTileRows = 2 * kTileSize;

// While it lives, this thread's tile registers have 16 rows of 64 bytes.
class TileShapes {
 public:
  TileShapes() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.rows[tile] = kTileSize;
      shapes.row_bytes[tile] = 64;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileShapes() { __asm__ volatile("tilerelease" ::); }
  TileShapes(const TileShapes&) = delete;
};

// Lines that a step of 16 pairs fetches ahead: half of what it reads of the right factor, which
// twice as many rows read again. Tiles are multiplied sooner than lines come from the third cache.
constexpr int64_t kLinesAhead = 16;

// out (32, 32) = or += left (32, depth) @ right (depth, 32), in pairs; depth: a multiple of 16.
// `next` is read soon, kLinesAhead lines of it for each step.
TILEWISE_INLINE void multiply_tiles(const float* left, int64_t stride, const float* right,
                                    int64_t depth, const float* next, float* out,
                                    int64_t out_stride, bool accumulate) {
  constexpr int64_t right_bytes = 2 * kTileSize * sizeof(float);
  const int64_t left_bytes = stride * sizeof(float), out_bytes = out_stride * sizeof(float);
  float* below = out + kTileSize * out_stride;
  if (accumulate) {
    TILEWISE_LOAD_TILE(0, out, out_bytes);
    TILEWISE_LOAD_TILE(1, out + kTileSize, out_bytes);
    TILEWISE_LOAD_TILE(2, below, out_bytes);
    TILEWISE_LOAD_TILE(3, below + kTileSize, out_bytes);
  } else {
    __asm__ volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" ::);
  }
  for (int64_t k = 0; k < depth; k += kTileSize) {
#pragma GCC unroll 16
    for (int64_t line = 0; line < kLinesAhead; ++line) __builtin_prefetch(next + 16 * line, 0, 2);
    next += 16 * kLinesAhead;
    TILEWISE_LOAD_TILE(4, left + k, left_bytes);
    TILEWISE_LOAD_TILE(6, right + 2 * kTileSize * k, right_bytes);
    TILEWISE_MULTIPLY_TILES(0, 4, 6);
    TILEWISE_LOAD_TILE(7, right + 2 * kTileSize * k + kTileSize, right_bytes);
    TILEWISE_MULTIPLY_TILES(1, 4, 7);
    TILEWISE_LOAD_TILE(5, left + kTileSize * stride + k, left_bytes);
    TILEWISE_MULTIPLY_TILES(2, 5, 6);
    TILEWISE_MULTIPLY_TILES(3, 5, 7);
  }
  TILEWISE_STORE_TILE(0, out, out_bytes);
  TILEWISE_STORE_TILE(1, out + kTileSize, out_bytes);
  TILEWISE_STORE_TILE(2, below, out_bytes);
  TILEWISE_STORE_TILE(3, below + kTileSize, out_bytes);
}

#undef TILEWISE_LOAD_TILE
#undef TILEWISE_STORE_TILE
#undef TILEWISE_MULTIPLY_TILES

#endif

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
