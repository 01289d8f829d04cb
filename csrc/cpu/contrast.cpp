#include "contrast.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "rows.h"

namespace tilewise {
namespace {

using at::Tensor;

// Both axes are tiled, so the workspace is fixed: the gradients of 4 Mi logits, 16 MiB (bfloat16
// with their packed copy: the same), and a block of logits for each thread, 1 MiB.
constexpr int64_t kTileRows = 4096;
constexpr int64_t kTileCols = 1024;

}  // namespace

FeatureGradients::FeatureGradients(const Features& features, bool need_rows, bool need_cols)
    // bfloat16 products write rows only, so there the transpose is summed, and transposed at the
    // end.
    : transpose_(features.product_type == at::kBFloat16), options_(features.options()) {
  const int64_t rows = features.rows.size(0), cols = features.cols.size(0);
  const int64_t dim = features.rows.size(1);
  // The first tile writes every element, if there is one.
  const auto gradient = [&](int64_t m, int64_t n) {
    return rows && cols ? at::empty({m, n}, options_) : at::zeros({m, n}, options_);
  };
  if (need_rows) d_rows = gradient(rows, dim);
  if (need_cols) d_cols_t = transpose_ ? gradient(dim, cols) : gradient(cols, dim).t();
}

Tensor FeatureGradients::rows() const {
  return d_rows.defined() ? d_rows : at::empty({0}, options_);
}

Tensor FeatureGradients::cols() const {
  if (!d_cols_t.defined()) return at::empty({0}, options_);
  return transpose_ ? transposed(d_cols_t) : d_cols_t.t();
}

void for_tiles(const Features& features, const FeatureGradients* gradients,
               const Epilogue& epilogue, const TileEnd& end) {
  const int64_t rows = features.rows.size(0), cols = features.cols.size(0);
  const Tensor d_rows = gradients ? gradients->d_rows : Tensor();
  const Tensor d_cols_t = gradients ? gradients->d_cols_t : Tensor();
  const bool store = d_rows.defined() || d_cols_t.defined();
  const at::ScalarType type = features.product_type;
  const Tensor space =
      at::empty({store ? std::min(kTileRows, rows) * std::min(kTileCols, cols) : 0},
                features.rows.options().dtype(type));
  Workspace workspace;
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const Tensor left = rows_of(features.rows, r, kTileRows, type);  // (m, D)
    const Tensor left_t = d_cols_t.defined() ? as_left_factor(left.t()) : Tensor();
    const int64_t m = left.size(0);
    for (int64_t c = 0; c < cols; c += kTileCols) {
      const Tensor right = rows_of(features.cols, c, kTileCols, type);  // (n, D)
      const int64_t n = right.size(0);
      const Tensor grads = store ? space.narrow(0, 0, m * n).view({m, n}) : Tensor();
      matmul_blocks(left, right.t(), workspace, [&](const Block& block, const Tensor& dots) {
        Block place = block;
        place.row += r;
        place.col += c;
        epilogue(place, dots,
                 store ? grads.narrow(0, block.row, block.rows).narrow(1, block.col, block.cols)
                       : Tensor());
      });
      end(count_blocks(m, n));
      if (d_rows.defined()) matmul(d_rows.narrow(0, r, m), grads, right, c > 0, workspace);
      if (d_cols_t.defined()) matmul(d_cols_t.narrow(1, c, n), left_t, grads, r > 0, workspace);
    }
  }
}

int64_t max_blocks(const Features& features) {
  const int64_t rows = std::min(kTileRows, features.rows.size(0));
  const int64_t cols = std::min(kTileCols, features.cols.size(0));
  const int64_t row_rest = features.rows.size(0) % kTileRows;
  const int64_t col_rest = features.cols.size(0) % kTileCols;
  return std::max({count_blocks(rows, cols), count_blocks(row_rest, cols),
                   count_blocks(rows, col_rest), count_blocks(row_rest, col_rest)});
}

MatchedBlock matched_block(const Tensor& dots, const Positives::InBlock& matches, double scale) {
  return {{dots.scalar_type() == at::kDouble, dots.const_data_ptr(), dots.size(0), dots.size(1),
           dots.stride(0), scale},
          matches.begin.data(),
          matches.cols.data()};
}

}  // namespace tilewise
