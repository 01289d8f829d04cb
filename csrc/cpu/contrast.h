// The driver of losses over all pairs of two batches of features: a block of logits at a time
// becomes a block of their gradients, and two products carry these back to the features.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "features.h"
#include "matmul.h"
#include "positives.h"
#include "simd/logit_block.h"

namespace tilewise {

// Gradients of the features; the products of `for_tiles` add up in them.
class FeatureGradients {
 public:
  FeatureGradients(const Features& features, bool need_rows, bool need_cols);
  at::Tensor rows() const;  // (B, D), or empty if not needed
  at::Tensor cols() const;  // (N, D), the same

  // (B, D), (D, N): what products are added to; undefined if not needed.
  at::Tensor d_rows, d_cols_t;

 private:
  bool transpose_;  // whether d_cols_t is stored as it is
  at::TensorOptions options_;
};

// Turns a block of dot products into d(loss)/d(dot): on the thread that computed it. `place`: its
// rows and columns of all, and its number in the tile. dots (rows, cols) may be overwritten; grads
// is undefined unless gradients of features are needed, and may be of the product type.
using Epilogue =
    std::function<void(const Block& place, const at::Tensor& dots, const at::Tensor& grads)>;

// Called after the blocks of a tile, with their number.
using TileEnd = std::function<void(int64_t blocks)>;

// Runs over all tiles of the logits. Workspace is fixed, whatever B and N.
void for_tiles(const Features& features, const FeatureGradients* gradients,
               const Epilogue& epilogue, const TileEnd& end);

// The most blocks that a tile has.
int64_t max_blocks(const Features& features);

// As vector kernels read it; `matches` must live as long.
MatchedBlock matched_block(const at::Tensor& dots, const Positives::InBlock& matches, double scale);

}  // namespace tilewise
