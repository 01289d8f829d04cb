// tilewise::sigmoid_loss on CPU. The vector kernel is cpu/sigmoid_loss.cpp.
#include "simd/sigmoid_loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "contrast.h"

namespace tilewise {
namespace {

using at::Tensor;

SigmoidSums run(const Features& features, const Positives& positives, const SigmoidParams& params,
                const FeatureGradients& gradients) {
  const auto kernel = TILEWISE_DISPATCH(sigmoid_tile);
  const TileType type = features.product_type == at::kDouble     ? TileType::Double
                        : features.product_type == at::kBFloat16 ? TileType::FloatToBFloat16
                                                                 : TileType::Float;
  std::vector<SigmoidSums> partial(most_blocks(features));
  SigmoidSums total;
  for_tiles(
      features, &gradients,
      [&](const Block& block, const Tensor& dots, const Tensor& grads) {
        const Tensor& out = grads.defined() ? grads : dots;
        const Positives::InBlock matches = positives.in_block(block);
        const SigmoidTile tile{dots.const_data_ptr(),
                               out.mutable_data_ptr(),
                               block.rows,
                               block.cols,
                               dots.stride(0),
                               out.stride(0),
                               matches.begin.data(),
                               matches.cols.data()};
        partial[block.index] = kernel(type, tile, params);
      },
      [&](const Block& tile) {  // in a fixed order: the same bits for every thread count
        for (int64_t i = 0; i < tile.index; ++i) {
          total.loss += partial[i].loss;
          total.dz_dot += partial[i].dz_dot;
          total.dz += partial[i].dz;
        }
      });
  return total;
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
  const Features features(image_features, text_features);
  const double scale = one_element("logit_scale", logit_scale);
  const double bias = logit_bias ? one_element("logit_bias", *logit_bias) : 0.0;
  const double inverse_count = 1.0 / std::max<int64_t>(image_features.size(0), 1);
  const bool need_grad = need_image || need_text || need_scale || need_bias;
  const FeatureGradients gradients(features, need_image, need_text);
  const SigmoidSums sums = run(features, positives_of(features, positives, image_ids, text_ids),
                               {scale, bias, scale * inverse_count, need_grad}, gradients);

  const auto scalar = [&](bool needed, double value) {
    return needed ? at::scalar_tensor(value * inverse_count, features.options())
                  : at::empty({0}, features.options());
  };
  return {scalar(true, sums.loss), gradients.image(), gradients.text(),
          scalar(need_scale, sums.dz_dot), scalar(need_bias, sums.dz)};
}

}  // namespace tilewise
