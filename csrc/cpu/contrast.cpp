#include "contrast.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace tilewise {
namespace {

using at::Tensor;

// Both axes are tiled, so the workspace is fixed: the gradients of 4 Mi logits, 16 MiB (bfloat16
// with their packed copy: the same), and a block of logits for each thread, 1 MiB.
constexpr int64_t kTileRows = 4096;
constexpr int64_t kTileCols = 1024;

// bfloat16 products only where the CPU has instructions for them. float16, and bfloat16 elsewhere,
// are widened tile by tile: faster there, and more accurate.
at::ScalarType product_type_of(at::ScalarType type) {
  if (type == at::kHalf || (type == at::kBFloat16 && !has_bfloat16_matmul())) return at::kFloat;
  return type;
}

}  // namespace

Features::Features(const Tensor& image_features, const Tensor& text_features)
    : image(image_features), text(text_features) {
  TORCH_CHECK_VALUE(image.dim() == 2 && text.dim() == 2 && image.size(1) == text.size(1),
                    "image_features (B, D) and text_features (N, D) expected, got ", image.sizes(),
                    " and ", text.sizes());
  TORCH_CHECK_TYPE(image.scalar_type() == text.scalar_type() && image.is_floating_point(),
                   "image_features and text_features must share a floating dtype, got ",
                   image.scalar_type(), " and ", text.scalar_type());
  product_type = product_type_of(image.scalar_type());
}

at::TensorOptions Features::options() const {
  return image.options().dtype(image.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

FeatureGradients::FeatureGradients(const Features& features, bool need_image, bool need_text)
    // bfloat16 products write rows only, so there the transpose is summed, and turned at the end.
    : turn_(features.product_type == at::kBFloat16), options_(features.options()) {
  const int64_t rows = features.image.size(0), cols = features.text.size(0);
  const int64_t dim = features.image.size(1);
  // The first tile writes every element, if there is one.
  const auto gradient = [&](int64_t m, int64_t n) {
    return rows && cols ? at::empty({m, n}, options_) : at::zeros({m, n}, options_);
  };
  if (need_image) d_image = gradient(rows, dim);
  if (need_text) d_text_t = turn_ ? gradient(dim, cols) : gradient(cols, dim).t();
}

Tensor FeatureGradients::image() const {
  return d_image.defined() ? d_image : at::empty({0}, options_);
}

Tensor FeatureGradients::text() const {
  if (!d_text_t.defined()) return at::empty({0}, options_);
  return turn_ ? transposed(d_text_t) : d_text_t.t();
}

void for_tiles(const Features& features, const FeatureGradients* gradients,
               const Epilogue& epilogue, const std::function<void(const Block& tile)>& finish) {
  const int64_t rows = features.image.size(0), cols = features.text.size(0);
  const Tensor d_image = gradients ? gradients->d_image : Tensor();
  const Tensor d_text_t = gradients ? gradients->d_text_t : Tensor();
  const bool store = d_image.defined() || d_text_t.defined();
  const at::ScalarType type = features.product_type;
  const Tensor space =
      at::empty({store ? std::min(kTileRows, rows) * std::min(kTileCols, cols) : 0},
                features.image.options().dtype(type));
  Workspace workspace;
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const Tensor image = rows_of(features.image, r, kTileRows, type);  // (m, D)
    const Tensor image_t = d_text_t.defined() ? as_left_factor(image.t()) : Tensor();
    const int64_t m = image.size(0);
    for (int64_t c = 0; c < cols; c += kTileCols) {
      const Tensor text = rows_of(features.text, c, kTileCols, type);  // (n, D)
      const int64_t n = text.size(0);
      const Tensor grads = store ? space.narrow(0, 0, m * n).view({m, n}) : Tensor();
      matmul_blocks(image, text.t(), workspace, [&](const Block& block, const Tensor& dots) {
        Block place = block;
        place.row += r;
        place.col += c;
        epilogue(place, dots,
                 store ? grads.narrow(0, block.row, block.rows).narrow(1, block.col, block.cols)
                       : Tensor());
      });
      finish({count_blocks(m, n), r, m, c, n});
      if (d_image.defined()) matmul(d_image.narrow(0, r, m), grads, text, c > 0, workspace);
      if (d_text_t.defined()) {
        matmul(d_text_t.narrow(1, c, n), image_t, grads, r > 0, workspace);
      }
    }
  }
}

int64_t most_blocks(const Features& features) {
  const int64_t rows = std::min(kTileRows, features.image.size(0));
  const int64_t cols = std::min(kTileCols, features.text.size(0));
  const int64_t row_rest = features.image.size(0) % kTileRows;
  const int64_t col_rest = features.text.size(0) % kTileCols;
  return std::max({count_blocks(rows, cols), count_blocks(row_rest, cols),
                   count_blocks(rows, col_rest), count_blocks(row_rest, col_rest)});
}

Positives positives_of(const Features& features, std::optional<int64_t> offset,
                       const std::optional<Tensor>& image_ids,
                       const std::optional<Tensor>& text_ids) {
  const int64_t rows = features.image.size(0), cols = features.text.size(0);
  if (!image_ids && !text_ids) return Positives(rows, cols, offset);
  TORCH_CHECK_VALUE(image_ids && text_ids, "positives: expected ids of both");
  TORCH_CHECK_VALUE(image_ids->numel() == rows && text_ids->numel() == cols,
                    "positives: an id for each row expected, got ", image_ids->sizes(), " and ",
                    text_ids->sizes());
  return Positives(*image_ids, *text_ids);
}

Tensor rows_of(const Tensor& x, int64_t begin, int64_t size, at::ScalarType type) {
  return x.narrow(0, begin, std::min(size, x.size(0) - begin)).to(type).contiguous();
}

void merge(LogSum& a, const LogSum& b) {
  const double largest = std::max(a.largest, b.largest);
  if (a.sum != 0) a.sum *= std::exp(a.largest - largest);
  a.sum += b.largest == largest ? b.sum : b.sum * std::exp(b.largest - largest);
  a.largest = largest;
}

double one_element(const char* name, const Tensor& x) {
  TORCH_CHECK_VALUE(x.numel() == 1, name, ": one element expected, got ", x.sizes());
  return x.item<double>();
}

}  // namespace tilewise
