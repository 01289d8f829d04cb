// tilewise::sigmoid_loss on CPU. The vector kernel is in simd/sigmoid_loss.cpp.
#include "simd/sigmoid_loss.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/registration.h"
#include "../common/sum.h"
#include "arguments.h"
#include "contrast.h"

namespace tilewise {
namespace {

using at::Tensor;

// `coefficients`: what is the same for all blocks.
SigmoidSums run(const Features& features, const Positives& positives, double scale,
                const SigmoidCoefficients& coefficients, const FeatureGradients& gradients) {
  std::vector<SigmoidSums> parts(Tiles(features).largest().blocks().count());
  Sum loss, dz_dot, dz;
  for_tiles(
      features, &gradients,
      [&](const Block& place, const Numbers& dots, const Numbers& out) {
        const Positives::InBlock matches = positives.in_block(place);
        parts[place.index] = TILEWISE_DISPATCH(sigmoid_block)(
            {matched_block(place, dots, matches, scale), coefficients}, out.data, out.stride,
            out.type == at::kBFloat16);
      },
      [&](const Tile& tile) {  // in a fixed order: the same bits for every thread count
        for (int64_t i = 0; i < tile.blocks().count(); ++i) {
          loss.add(parts[i].loss);
          dz_dot.add(parts[i].dz_dot);
          dz.add(parts[i].dz);
        }
      });
  return {loss.value(), dz_dot.value(), dz.value()};
}

// The loss, and gradients by image, text, scale and bias, which are in `gradients` where they are
// features'.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results(const Features& features,
                                                           const Positives& positives,
                                                           const Tensor& logit_scale,
                                                           const std::optional<Tensor>& logit_bias,
                                                           const FeatureGradients& gradients,
                                                           bool need_scale, bool need_bias) {
  const double scale = one_element("logit_scale", logit_scale);
  const double bias = logit_bias ? one_element("logit_bias", *logit_bias) : 0.0;
  const double inverse_count = 1.0 / std::max<int64_t>(features.rows.size(0), 1);
  const bool need_grad =
      gradients.rows.numel() || gradients.cols.numel() || need_scale || need_bias;
  const SigmoidSums sums =
      run(features, positives, scale, {bias, scale * inverse_count, need_grad}, gradients);
  const auto options = features.options();
  return {scalar_result(sums.loss * inverse_count, options), gradients.rows, gradients.cols,
          scalar_if(need_scale, sums.dz_dot * inverse_count, options),
          scalar_if(need_bias, sums.dz * inverse_count, options)};
}

// See pyext/tilewise/ops/sigmoid_loss.py. Gradients that are not needed come back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_loss(
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale,
    const std::optional<Tensor>& logit_bias, std::optional<int64_t> positives,
    const std::optional<Tensor>& image_ids, const std::optional<Tensor>& text_ids, bool need_image,
    bool need_text, bool need_scale, bool need_bias) {
  const BelowAutograd below;
  const Features features(image_features, text_features);
  return results(features, Positives::of(features, positives, image_ids, text_ids), logit_scale,
                 logit_bias, FeatureGradients(features, need_image, need_text), need_scale,
                 need_bias);
}

// See pyext/tilewise/ops/_blocks.py.
std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid_block_added(
    const Tensor& image, const Tensor& text, const Tensor& logit_scale,
    const std::optional<Tensor>& logit_bias, std::optional<int64_t> positives, const Tensor& total,
    bool need_text, bool need_scale, bool need_bias) {
  const BelowAutograd below;
  const Features features(image, text);
  auto [loss, d_image, d_text, d_scale, d_bias] =
      results(features, Positives::of(features, positives, std::nullopt, std::nullopt), logit_scale,
              logit_bias, FeatureGradients(features, total, need_text), need_scale, need_bias);
  return {loss, d_text, d_scale, d_bias};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) {
  library.impl("sigmoid_loss", &sigmoid_loss);
  library.impl("sigmoid_block_added", &sigmoid_block_added);
}

}  // namespace tilewise
