// Interface of the matrix products: blocks of them, each computed by one thread.
#pragma once

#include <cstdint>

#include "../../common/integer.h"
#include "capability.h"

namespace tilewise {

// What multiplies bfloat16 numbers here: nothing faster than float32, AVX-512 BF16, or AMX.
// TILEWISE_BFLOAT16_UNIT=none, avx512_bf16 or amx can lower it.
enum class Bfloat16Unit { NONE, AVX512_BF16, AMX };
Bfloat16Unit bfloat16_unit();
const char* name_of(Bfloat16Unit unit);  // as that variable spells it

// Factors are read in elements of 4 bytes along the depth: a float, or a pair of bfloat16 numbers.
constexpr int64_t kPanel = 32;   // columns of a right factor that are packed together
constexpr int64_t kChunk = 256;  // elements of depth that are summed up before they are added

// Elements in the depth of a product of K numbers; the right factor is filled up with zeros.
TILEWISE_INLINE int64_t depth_of(int64_t numbers, bool bfloat16) {
  return bfloat16 ? ceil_div(numbers, 2) : numbers;
}
TILEWISE_INLINE int64_t padded_depth(int64_t depth) { return round_up(depth, 16); }

// (M, K), in strips of kChunk columns: element (i, k) is data[k / kChunk * strip + i * stride + k %
// kChunk]. One of floats may be `transposed`: then these are its columns, and `multiply` is given
// rows of one strip only.
struct LeftFactor {
  const void* data = nullptr;
  int64_t stride = 0, strip = kChunk;  // in elements
  bool transposed = false;
};

// At most kPanel columns of (K, N): number (k, j) is data[k * stride + j]; transposed: [j * stride
// + k].
struct PanelSource {
  const void* data;
  int64_t stride, depth, cols;  // in numbers
  bool transposed, bfloat16;
};

// out (rows, cols) = left @ right, or += with `accumulate`. right: packed panels, of padded_depth()
// x kPanel elements each. Each element of `out` is summed in an order that depends on K alone.
struct MatrixProduct {
  LeftFactor left;
  const void* right;
  int64_t rows, cols, depth;  // depth in numbers
  float* out;
  int64_t stride;
  bool accumulate;
};

// pack_panel: writes padded_depth() x kPanel elements. Their order is the kernel's own.
// multiply: by floats where the unit is NONE.
#define TILEWISE_DECLARE(CAPABILITY)                 \
  namespace CAPABILITY {                             \
  void pack_panel(const PanelSource&, void* panel);  \
  void multiply(const MatrixProduct&, Bfloat16Unit); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
