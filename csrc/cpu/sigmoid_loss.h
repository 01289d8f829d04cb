// Interface of the vector kernel: plain data only, so that it compiles once per instruction set.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

// Rows of a tile of the logits matrix, holding raw dot products <image i, text j>.
struct SigmoidTile {
  void* dots;        // first element; overwritten by d(loss)/d(dot) if `need_grad`
  int64_t rows, cols, stride;
  int64_t diagonal;  // row i matches column i + diagonal; kNoPositives if no pair matches
};
constexpr int64_t kNoPositives = INT64_MIN;

struct SigmoidParams {
  double scale, bias;
  double grad_factor;  // d(dot) = dz * grad_factor, where z = scale * dot + bias
  bool need_grad;
};

// Sums over the rows of the tile: loss, dz * dot and dz. Not yet divided by the number of images.
struct SigmoidSums {
  double loss = 0, dz_dot = 0, dz = 0;
};

enum class TileType { Float, Double, BFloat16 };

#define TILEWISE_DECLARE(CAPABILITY)                                                   \
  namespace CAPABILITY {                                                               \
  SigmoidSums sigmoid_tile(TileType type, const SigmoidTile&, const SigmoidParams&);   \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
