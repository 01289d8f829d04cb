// The driver of losses over all pairs of two batches of features: a block of logits at a time
// becomes a block of their gradients, and two products carry these back to the features.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>

#include "matmul.h"
#include "positives.h"
#include "simd/log_sum.h"

namespace tilewise {

struct Features {
  at::Tensor image, text;       // (B, D), (N, D), of one floating dtype
  at::ScalarType product_type;  // of the factors of matrix products

  Features(const at::Tensor& image_features, const at::Tensor& text_features);  // checks them
  // What sums and gradients are kept in: float64 for float64, else float32.
  at::TensorOptions options() const;
};

// Gradients of the features; the products of `for_tiles` add up in them.
class FeatureGradients {
 public:
  FeatureGradients(const Features& features, bool need_image, bool need_text);
  bool needed() const { return d_image.defined() || d_text_t.defined(); }
  at::Tensor image() const;  // (B, D), or empty if not needed
  at::Tensor text() const;   // (N, D), the same

  at::Tensor d_image,
      d_text_t;  // (B, D), (D, N): what products are added to; undefined if not needed

 private:
  bool turn_;  // whether d_text_t is stored as it is
  at::TensorOptions options_;
};

// Turns a block of dot products into d(loss)/d(dot): on the thread that computed it. `place`: its
// rows and columns of all, and its number in the tile. dots (rows, cols) may be overwritten; grads
// is undefined unless gradients of features are needed, and may be of the product type.
using Epilogue =
    std::function<void(const Block& place, const at::Tensor& dots, const at::Tensor& grads)>;

// Runs over all tiles of the logits. Workspace is fixed, whatever B and N. After the blocks of a
// tile `finish` is called, with the tile's rows and columns; `index` is the number of its blocks.
void for_tiles(const Features& features, const FeatureGradients* gradients,
               const Epilogue& epilogue, const std::function<void(const Block& tile)>& finish);

// The most blocks that a tile has.
int64_t most_blocks(const Features& features);

// Positives as the ops take them: ids of both, or else an offset.
Positives positives_of(const Features& features, std::optional<int64_t> offset,
                       const std::optional<at::Tensor>& image_ids,
                       const std::optional<at::Tensor>& text_ids);

// Rows begin..begin + size of x, as far as there are, contiguous.
at::Tensor rows_of(const at::Tensor& x, int64_t begin, int64_t size, at::ScalarType type);

// Adds the exponentials of b to those of a.
void merge(LogSum& a, const LogSum& b);

// A logit scale or bias.
double one_element(const char* name, const at::Tensor& x);

}  // namespace tilewise
