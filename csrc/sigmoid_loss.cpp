// tilewise::sigmoid_loss on CPU: checks, tile driver. The vector kernel is cpu/sigmoid_loss.cpp.
#include "cpu/sigmoid_loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "matmul.h"
#include "ops.h"
#include "positives.h"

namespace tilewise {
namespace {

using at::Tensor;

// Both axes are tiled, so the workspace is fixed: the gradients of 4 Mi logits, 16 MiB (bfloat16
// with their packed copy: the same), and a block of logits for each thread, 1 MiB.
constexpr int64_t kTileRows = 4096;
constexpr int64_t kTileCols = 1024;

struct Problem {
  Tensor image, text;  // (B, D), (N, D)
  Positives positives;
  SigmoidParams params;
  at::ScalarType product_type;  // of the factors of matrix products
  Tensor d_image, d_text_t;     // (B, D) and (D, N), undefined if not needed
};

// Gradients of one tile of logits, which are never stored themselves: each block of them becomes a
// block of gradients at once. image (m, D), text (n, D); grads (m, n), undefined if not needed;
// `row`, `col`: where the tile begins.
SigmoidSums tile_loss(const Tensor& image, const Tensor& text, const Tensor& grads, int64_t row,
                      int64_t col, const Problem& problem, Workspace& workspace) {
  const auto kernel = TILEWISE_DISPATCH(sigmoid_tile);
  const TileType type = image.scalar_type() == at::kDouble     ? TileType::Double
                        : image.scalar_type() == at::kBFloat16 ? TileType::FloatToBFloat16
                                                               : TileType::Float;
  std::vector<SigmoidSums> partial(count_blocks(image.size(0), text.size(0)));
  matmul_blocks(image, text.t(), workspace, [&](const Block& block, const Tensor& dots) {
    const bool store = grads.defined();
    const Tensor part =
        store ? grads.narrow(0, block.row, block.rows).narrow(1, block.col, block.cols) : dots;
    Block place = block;
    place.row += row;
    place.col += col;
    const Positives::InBlock positives = problem.positives.in_block(place);
    const SigmoidTile tile{dots.const_data_ptr(),
                           part.mutable_data_ptr(),
                           block.rows,
                           block.cols,
                           dots.stride(0),
                           part.stride(0),
                           positives.begin.data(),
                           positives.cols.data()};
    partial[block.index] = kernel(type, tile, problem.params);
  });
  SigmoidSums sums;  // in a fixed order: the same bits for every thread count
  for (const SigmoidSums& p : partial) {
    sums.loss += p.loss;
    sums.dz_dot += p.dz_dot;
    sums.dz += p.dz;
  }
  return sums;
}

SigmoidSums run(const Problem& p) {
  const int64_t rows = p.image.size(0), cols = p.text.size(0);
  const bool need_features = p.d_image.defined() || p.d_text_t.defined();
  const Tensor space =
      at::empty({need_features ? std::min(kTileRows, rows) * std::min(kTileCols, cols) : 0},
                p.image.options().dtype(p.product_type));
  const auto slice = [&](const Tensor& x, int64_t begin, int64_t size) {
    return x.narrow(0, begin, std::min(size, x.size(0) - begin)).to(p.product_type).contiguous();
  };
  Workspace workspace;
  SigmoidSums total;
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const Tensor image = slice(p.image, r, kTileRows);  // (m, D)
    const Tensor image_t = p.d_text_t.defined() ? as_left_factor(image.t()) : Tensor();
    const int64_t m = image.size(0);
    for (int64_t c = 0; c < cols; c += kTileCols) {
      const Tensor text = slice(p.text, c, kTileCols);  // (n, D)
      const int64_t n = text.size(0);
      const Tensor grads = need_features ? space.narrow(0, 0, m * n).view({m, n}) : Tensor();
      const SigmoidSums sums = tile_loss(image, text, grads, r, c, p, workspace);
      total.loss += sums.loss;
      total.dz_dot += sums.dz_dot;
      total.dz += sums.dz;
      if (p.d_image.defined()) matmul(p.d_image.narrow(0, r, m), grads, text, c > 0, workspace);
      if (p.d_text_t.defined()) {
        matmul(p.d_text_t.narrow(1, c, n), image_t, grads, r > 0, workspace);
      }
    }
  }
  return total;
}

// bfloat16 products only where the CPU has instructions for them. float16, and bfloat16 elsewhere,
// are widened tile by tile: faster there, and more accurate.
at::ScalarType product_type(at::ScalarType type) {
  if (type == at::kHalf || (type == at::kBFloat16 && !has_bfloat16_matmul())) return at::kFloat;
  return type;
}

void check(const Tensor& image, const Tensor& text, const Tensor& scale,
           const std::optional<Tensor>& bias) {
  TORCH_CHECK_VALUE(image.dim() == 2 && text.dim() == 2 && image.size(1) == text.size(1),
                    "image_features (B, D) and text_features (N, D) expected, got ", image.sizes(),
                    " and ", text.sizes());
  TORCH_CHECK_TYPE(image.scalar_type() == text.scalar_type() && image.is_floating_point(),
                   "image_features and text_features must share a floating dtype, got ",
                   image.scalar_type(), " and ", text.scalar_type());
  TORCH_CHECK_VALUE(scale.numel() == 1, "logit_scale: one element expected, got ", scale.sizes());
  TORCH_CHECK_VALUE(!bias || bias->numel() == 1, "logit_bias: one element expected, got ",
                    bias->sizes());
}

Positives positives_of(const Tensor& image, const Tensor& text, std::optional<int64_t> offset,
                       const std::optional<Tensor>& image_ids,
                       const std::optional<Tensor>& text_ids) {
  if (!image_ids || !text_ids) return Positives(image.size(0), text.size(0), offset);
  TORCH_CHECK_VALUE(image_ids->numel() == image.size(0) && text_ids->numel() == text.size(0),
                    "positives: an id for each row expected, got ", image_ids->sizes(), " and ",
                    text_ids->sizes());
  return Positives(*image_ids, *text_ids);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_loss(
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale,
    const std::optional<Tensor>& logit_bias, std::optional<int64_t> positives,
    const std::optional<Tensor>& image_ids, const std::optional<Tensor>& text_ids, bool need_image,
    bool need_text, bool need_scale, bool need_bias) {
  // The products inside run as they are written, also when called below autograd or autocast.
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check(image_features, text_features, logit_scale, logit_bias);

  const int64_t rows = image_features.size(0), cols = text_features.size(0);
  const int64_t dim = image_features.size(1);
  const at::ScalarType type = image_features.scalar_type();
  const at::ScalarType accumulate_type = type == at::kDouble ? type : at::kFloat;
  const auto options = image_features.options().dtype(accumulate_type);
  const double scale = logit_scale.item<double>();
  const double bias = logit_bias ? logit_bias->item<double>() : 0.0;
  const double inverse_count = 1.0 / std::max<int64_t>(rows, 1);
  const bool need_grad = need_image || need_text || need_scale || need_bias;

  // The first tile writes every element, if there is one.
  const auto gradient = [&](bool needed, int64_t m, int64_t n) {
    return !needed        ? Tensor()
           : rows && cols ? at::empty({m, n}, options)
                          : at::zeros({m, n}, options);
  };
  const at::ScalarType products = product_type(type);
  const Tensor d_image = gradient(need_image, rows, dim);
  // bfloat16 products write rows only, so there the transpose is summed, and turned at the end.
  const bool turn = products == at::kBFloat16;
  const Tensor d_text = gradient(need_text, turn ? dim : cols, turn ? cols : dim);
  const SigmoidSums sums =
      run({image_features,
           text_features,
           positives_of(image_features, text_features, positives, image_ids, text_ids),
           {scale, bias, scale * inverse_count, need_grad},
           products,
           d_image,
           need_text && !turn ? d_text.t() : d_text});

  const auto none = [&] { return at::empty({0}, options); };
  const auto scalar = [&](double value) {
    return at::scalar_tensor(value * inverse_count, options);
  };
  return {scalar(sums.loss), need_image ? d_image : none(),
          need_text ? (turn ? transposed(d_text) : d_text) : none(),
          need_scale ? scalar(sums.dz_dot) : none(), need_bias ? scalar(sums.dz) : none()};
}

}  // namespace tilewise
