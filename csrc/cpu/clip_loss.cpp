// tilewise::clip_loss on CPU: a pass over the logits for the sums of their exponentials, another
// for the gradients. The vector kernels are in cpu/clip_loss.cpp.
#include "simd/clip_loss.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "contrast.h"

namespace tilewise {
namespace {

using at::Tensor;

// The images among the texts, or the texts among the images.
struct Direction {
  std::vector<LogSum> sums;
  std::vector<double> weight, target;
  double smoothing;

  // matches: of each row (column); others: how many columns (rows) there are.
  Direction(const std::vector<int64_t>& matches, int64_t others, double label_smoothing)
      : sums(matches.size()),
        weight(matches.size()),
        target(matches.size()),
        smoothing(others ? label_smoothing / others : 0) {
    int64_t count = 0;
    for (const int64_t n : matches) count += n > 0;
    for (size_t i = 0; i < matches.size(); ++i) {
      if (matches[i] == 0) continue;
      weight[i] = 0.5 / count;
      target[i] = (1 - label_smoothing) * weight[i] / matches[i];
    }
  }

  ClipDirection from(int64_t first) const {
    return {sums.data() + first, weight.data() + first, target.data() + first, smoothing};
  }

  double log_sums() const {  // weighted
    double total = 0;
    for (size_t i = 0; i < sums.size(); ++i) {
      if (weight[i] != 0) total += weight[i] * (sums[i].largest + std::log(sums[i].sum));
    }
    return total;
  }
};

// What one block gives.
struct Part {
  Block block;
  std::vector<LogSum> rows, cols;
  double total;
};

class ClipLoss {
 public:
  ClipLoss(const Features& features, const Positives& positives, double scale, double smoothing)
      : features_(features),
        positives_(positives),
        scale_(scale),
        images_(positives.per_image(), features.text.size(0), smoothing),
        texts_(positives.per_text(), features.image.size(0), smoothing),
        parts_(most_blocks(features)) {}

  double loss() {
    double targets = 0;
    for_tiles(
        features_, nullptr,
        [&](const Block& block, const Tensor& dots, const Tensor&) {
          Part& part = parts_[block.index];
          part.block = block;
          part.rows.resize(block.rows);
          part.cols.resize(block.cols);
          with_block(block, dots, [&](const ClipBlock& b) {
            part.total = TILEWISE_DISPATCH(clip_log_sums)(b, part.rows.data(), part.cols.data());
          });
        },
        [&](const Block& tile) {  // in a fixed order: the same bits for every thread count
          for (int64_t k = 0; k < tile.index; ++k) {
            const Part& part = parts_[k];
            for (int64_t i = 0; i < part.block.rows; ++i) {
              merge(images_.sums[part.block.row + i], part.rows[i]);
            }
            for (int64_t j = 0; j < part.block.cols; ++j) {
              merge(texts_.sums[part.block.col + j], part.cols[j]);
            }
            targets += part.total;
          }
        });
    return images_.log_sums() + texts_.log_sums() - targets;
  }

  // Fills the gradients, after loss(); returns that of the scale.
  double differentiate(const FeatureGradients& gradients) {
    double total = 0;
    for_tiles(
        features_, &gradients,
        [&](const Block& block, const Tensor& dots, const Tensor& grads) {
          const Tensor& out = grads.defined() ? grads : dots;
          with_block(block, dots, [&](const ClipBlock& b) {
            parts_[block.index].total = TILEWISE_DISPATCH(clip_gradient)(
                b, out.mutable_data_ptr(), out.stride(0), out.scalar_type() == at::kBFloat16);
          });
        },
        [&](const Block& tile) {
          for (int64_t k = 0; k < tile.index; ++k) total += parts_[k].total;
        });
    return total;
  }

 private:
  template <typename F>
  void with_block(const Block& block, const Tensor& dots, const F& f) const {
    const Positives::InBlock matches = positives_.in_block(block);
    f(ClipBlock{dots.scalar_type() == at::kDouble, dots.const_data_ptr(), block.rows, block.cols,
                dots.stride(0), matches.begin.data(), matches.cols.data(), scale_,
                images_.from(block.row), texts_.from(block.col)});
  }

  const Features& features_;
  const Positives& positives_;
  double scale_;
  Direction images_, texts_;
  std::vector<Part> parts_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> clip_loss(
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale,
    std::optional<int64_t> positives, const std::optional<Tensor>& image_ids,
    const std::optional<Tensor>& text_ids, double label_smoothing, bool need_image, bool need_text,
    bool need_scale) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Features features(image_features, text_features);
  const Positives matches = positives_of(features, positives, image_ids, text_ids);
  ClipLoss clip(features, matches, one_element("logit_scale", logit_scale), label_smoothing);
  const double loss = clip.loss();
  const FeatureGradients gradients(features, need_image, need_text);
  double d_scale = 0;
  if (need_image || need_text || need_scale) d_scale = clip.differentiate(gradients);
  const auto options = features.options();
  return {at::scalar_tensor(loss, options), gradients.image(), gradients.text(),
          need_scale ? at::scalar_tensor(d_scale, options) : at::empty({0}, options)};
}

}  // namespace tilewise
