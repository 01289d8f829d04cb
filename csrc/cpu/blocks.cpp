// tilewise::clip_block_sums, clip_block_gradients and clip_block_added on CPU: the two passes of
// clip_loss over a block of the logits, for processes that each hold a part of the features.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/registration.h"
#include "arguments.h"
#include "cross_entropy.h"
#include "simd/clip_loss.h"

namespace tilewise {
namespace {

using at::Tensor;
using Side = CrossEntropy::Side;

CrossEntropy clip_block(const Features& features, const Positives& positives,
                        const Tensor& logit_scale, Side images, Side texts) {
  return CrossEntropy(features, positives, one_element("logit_scale", logit_scale),
                      std::move(images), std::move(texts),
                      {TILEWISE_DISPATCH(clip_log_sums), TILEWISE_DISPATCH(clip_gradient)});
}

// (2, n) float64: the largest logit, and the sum of exponentials relative to it.
Tensor to_tensor(const std::vector<LogSum>& sums, const at::TensorOptions& options) {
  const int64_t n = sums.size();
  const Tensor out = at::empty({2, n}, options.dtype(at::kDouble));
  auto* values = out.mutable_data_ptr<double>();
  for (int64_t i = 0; i < n; ++i) {
    values[i] = sums[i].largest;
    values[n + i] = sums[i].sum;
  }
  return out;
}

Side side_of(const char* name, const Tensor& sums, const Tensor& weight, int64_t n) {
  TORCH_CHECK_VALUE(sums.dim() == 2 && sums.size(0) == 2 && sums.size(1) == n, name,
                    ": expected (2, ", n, "), got ", sums.sizes());
  TORCH_CHECK_VALUE(weight.numel() == n, name, ": expected ", n, " weights, got ", weight.sizes());
  const Tensor s = sums.to(at::kDouble).contiguous(), w = weight.to(at::kDouble).contiguous();
  const auto *values = s.const_data_ptr<double>(), *weights = w.const_data_ptr<double>();
  std::vector<LogSum> of(n);
  for (int64_t i = 0; i < n; ++i) {
    // What has no weight may have been compared with nothing: no exponential of it overflows.
    of[i] = weights[i] == 0 ? LogSum{std::numeric_limits<float>::max(), 1}
                            : LogSum{values[i], values[n + i]};
  }
  return Side(std::vector<double>(weights, weights + n), std::move(of));
}

// See pyext/tilewise/ops/_blocks.py.
std::tuple<Tensor, Tensor, Tensor> clip_block_sums(const Tensor& image, const Tensor& text,
                                                   const Tensor& logit_scale,
                                                   std::optional<int64_t> positives) {
  const BelowAutograd below;
  const Features features(image, text);
  const Positives matches = Positives::of(features, positives, std::nullopt, std::nullopt);
  const auto halves = [](const Tensor& x) {  // a match has the target 1/2 of its row and column
    return Side(std::vector<double>(x.size(0), 0.5), {});
  };
  CrossEntropy block = clip_block(features, matches, logit_scale, halves(image), halves(text));
  const double matched = block.add_sums();
  const auto options = features.options();
  return {to_tensor(block.rows().sums, options), to_tensor(block.cols().sums, options),
          scalar_result(matched, options.dtype(at::kDouble))};
}

// Fills `gradients`; returns that of the scale.
Tensor differentiate(const Features& features, const FeatureGradients& gradients,
                     const Tensor& logit_scale, std::optional<int64_t> positives, Side images,
                     Side texts, bool need_scale) {
  const Positives matches = Positives::of(features, positives, std::nullopt, std::nullopt);
  CrossEntropy block =
      clip_block(features, matches, logit_scale, std::move(images), std::move(texts));
  double d_scale = 0;
  if (gradients.rows.numel() || gradients.cols.numel() || need_scale) {
    d_scale = block.differentiate(gradients);
  }
  return scalar_if(need_scale, d_scale, features.options());
}

std::tuple<Tensor, Tensor, Tensor> clip_block_gradients(
    const Tensor& image, const Tensor& text, const Tensor& logit_scale,
    std::optional<int64_t> positives, const Tensor& image_sums, const Tensor& text_sums,
    const Tensor& image_weight, const Tensor& text_weight, bool need_image, bool need_text,
    bool need_scale) {
  const BelowAutograd below;
  const Features features(image, text);
  const FeatureGradients gradients(features, need_image, need_text);
  const Tensor d_scale =
      differentiate(features, gradients, logit_scale, positives,
                    side_of("image_sums", image_sums, image_weight, image.size(0)),
                    side_of("text_sums", text_sums, text_weight, text.size(0)), need_scale);
  return {gradients.rows, gradients.cols, d_scale};
}

std::tuple<Tensor, Tensor> clip_block_added(const Tensor& image, const Tensor& text,
                                            const Tensor& logit_scale,
                                            std::optional<int64_t> positives,
                                            const Tensor& image_sums, const Tensor& text_sums,
                                            const Tensor& image_weight, const Tensor& text_weight,
                                            const Tensor& total, bool need_text, bool need_scale) {
  const BelowAutograd below;
  const Features features(image, text);
  const FeatureGradients gradients(features, total, need_text);
  const Tensor d_scale =
      differentiate(features, gradients, logit_scale, positives,
                    side_of("image_sums", image_sums, image_weight, image.size(0)),
                    side_of("text_sums", text_sums, text_weight, text.size(0)), need_scale);
  return {gradients.cols, d_scale};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) {
  library.impl("clip_block_sums", &clip_block_sums);
  library.impl("clip_block_gradients", &clip_block_gradients);
  library.impl("clip_block_added", &clip_block_added);
}

}  // namespace tilewise
