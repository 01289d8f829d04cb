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

// See pyext/tilewise/ops/sigmoid_loss.py. Gradients that are not needed come back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_loss(
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale,
    const std::optional<Tensor>& logit_bias, std::optional<int64_t> positives,
    const std::optional<Tensor>& image_ids, const std::optional<Tensor>& text_ids, bool need_image,
    bool need_text, bool need_scale, bool need_bias) {
  const BelowAutograd below;
  const Features features(image_features, text_features);
  const double scale = one_element("logit_scale", logit_scale);
  const double bias = logit_bias ? one_element("logit_bias", *logit_bias) : 0.0;
  const double inverse_count = 1.0 / std::max<int64_t>(image_features.size(0), 1);
  const bool need_grad = need_image || need_text || need_scale || need_bias;
  const FeatureGradients gradients(features, need_image, need_text);
  const SigmoidSums sums = run(features, Positives::of(features, positives, image_ids, text_ids),
                               scale, {bias, scale * inverse_count, need_grad}, gradients);
  const auto options = features.options();
  return {scalar_result(sums.loss * inverse_count, options), gradients.rows, gradients.cols,
          scalar_if(need_scale, sums.dz_dot * inverse_count, options),
          scalar_if(need_bias, sums.dz * inverse_count, options)};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("sigmoid_loss", &sigmoid_loss); }

}  // namespace tilewise
