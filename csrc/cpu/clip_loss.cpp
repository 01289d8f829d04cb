// tilewise::clip_loss on CPU: cross entropies of the images and of the texts. The vector kernels
// are in simd/clip_loss.cpp.
#include "simd/clip_loss.h"

#include <optional>
#include <tuple>

#include "../common/registration.h"
#include "arguments.h"
#include "cross_entropy.h"

namespace tilewise {
namespace {

using at::Tensor;

// See pyext/tilewise/ops/clip_loss.py. Gradients that are not needed come back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> clip_loss(
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale,
    std::optional<int64_t> positives, const std::optional<Tensor>& image_ids,
    const std::optional<Tensor>& text_ids, double label_smoothing, bool need_image, bool need_text,
    bool need_scale) {
  const BelowAutograd below;
  const Features features(image_features, text_features);
  const Positives matches = Positives::of(features, positives, image_ids, text_ids);
  using Side = CrossEntropy::Side;
  CrossEntropy clip(features, matches, one_element("logit_scale", logit_scale),
                    Side(matches.per_image(), features.cols.size(0), label_smoothing, 0.5),
                    Side(matches.per_text(), features.rows.size(0), label_smoothing, 0.5),
                    {TILEWISE_DISPATCH(clip_log_sums), TILEWISE_DISPATCH(clip_gradient)});
  return clip.results(need_image, need_text, need_scale);
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("clip_loss", &clip_loss); }

}  // namespace tilewise
