// Interface of the vector kernel: plain data only, so that it compiles once per instruction set.
#pragma once

#include <cstdint>

#include "capability.h"

namespace tilewise {

// Rows of a tile of the logits matrix.
struct SigmoidTile {
  const void* dots;  // raw dot products <image i, text j>
  void* grads;       // d(loss)/d(dot); may be where `dots` are
  int64_t rows, cols;
  int64_t dots_stride, grads_stride;  // elements between rows
  const int64_t* begin;               // of row i, the columns
  const int64_t* positives;           // positives[begin[i]..begin[i + 1]) match, ascending
};

struct SigmoidParams {
  double scale, bias;
  double grad_factor;  // d(dot) = dz * grad_factor, where z = scale * dot + bias
  bool need_grad;      // else `grads` is not written and only the loss is summed
};

// Sums over the rows of the tile: loss, dz * dot and dz. Not yet divided by the number of images.
struct SigmoidSums {
  double loss = 0, dz_dot = 0, dz = 0;
};

// What dots and gradients are stored in.
enum class TileType { Float, Double, FloatToBFloat16 };

#define TILEWISE_DECLARE(CAPABILITY)                                                 \
  namespace CAPABILITY {                                                             \
  SigmoidSums sigmoid_tile(TileType type, const SigmoidTile&, const SigmoidParams&); \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
