// Two batches of features, all pairs of which a loss compares.
#pragma once

#include <ATen/core/Tensor.h>

namespace tilewise {

struct Features {
  at::Tensor rows, cols;        // (B, D), (N, D), of one floating dtype
  at::ScalarType product_type;  // of the factors of matrix products

  // Checks them, by the names that the user knows them by.
  Features(const char* rows_name, const at::Tensor& rows, const char* cols_name,
           const at::Tensor& cols);
  // Of images and texts.
  Features(const at::Tensor& image_features, const at::Tensor& text_features)
      : Features("image_features", image_features, "text_features", text_features) {}
  // What sums and gradients are kept in.
  at::TensorOptions options() const;
};

}  // namespace tilewise
