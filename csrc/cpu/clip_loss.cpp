// tilewise::clip_loss on CPU: a pass over the logits for the sums of their exponentials, another
// for the gradients. The vector kernels are in simd/clip_loss.cpp.
#include "simd/clip_loss.h"

#include <cmath>
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

// One side's softmax: of the images among the texts, or of the texts among the images.
struct Side {
  std::vector<LogSum> sums;
  std::vector<double> weight, target;
  double smoothing;

  // matches: of each row (column); others: how many columns (rows) there are.
  Side(const std::vector<int64_t>& matches, int64_t others, double label_smoothing)
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

  ClipSide from(int64_t first) const {
    return {sums.data() + first, weight.data() + first, target.data() + first, smoothing};
  }

  void add_log_sums(Sum& total) const {  // weighted
    for (size_t i = 0; i < sums.size(); ++i) {
      if (weight[i] != 0) total.add(weight[i] * (sums[i].largest + std::log(sums[i].sum)));
    }
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
        images_(positives.per_image(), features.cols.size(0), smoothing),
        texts_(positives.per_text(), features.rows.size(0), smoothing),
        parts_(max_blocks(features)) {}

  double loss() {
    Sum total;
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
        [&](int64_t blocks) {  // in a fixed order: the same bits for every thread count
          for (int64_t k = 0; k < blocks; ++k) {
            const Part& part = parts_[k];
            for (int64_t i = 0; i < part.block.rows; ++i) {
              merge(images_.sums[part.block.row + i], part.rows[i]);
            }
            for (int64_t j = 0; j < part.block.cols; ++j) {
              merge(texts_.sums[part.block.col + j], part.cols[j]);
            }
            total.add(-part.total);
          }
        });
    images_.add_log_sums(total);
    texts_.add_log_sums(total);
    return total.value();
  }

  // Fills the gradients, after loss(); returns that of the scale.
  double differentiate(const FeatureGradients& gradients) {
    Sum total;
    for_tiles(
        features_, &gradients,
        [&](const Block& block, const Tensor& dots, const Tensor& grads) {
          const Tensor& out = grads.defined() ? grads : dots;
          with_block(block, dots, [&](const ClipBlock& b) {
            parts_[block.index].total = TILEWISE_DISPATCH(clip_gradient)(
                b, out.mutable_data_ptr(), out.stride(0), out.scalar_type() == at::kBFloat16);
          });
        },
        [&](int64_t blocks) {
          for (int64_t k = 0; k < blocks; ++k) total.add(parts_[k].total);
        });
    return total.value();
  }

 private:
  template <typename F>
  void with_block(const Block& block, const Tensor& dots, const F& f) const {
    const Positives::InBlock matches = positives_.in_block(block);
    f(ClipBlock{matched_block(dots, matches, scale_), images_.from(block.row),
                texts_.from(block.col)});
  }

  const Features& features_;
  const Positives& positives_;
  double scale_;
  Side images_, texts_;
  std::vector<Part> parts_;
};

// See pyext/tilewise/ops/clip_loss.py. Gradients that are not needed come back empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> clip_loss(
    const Tensor& image_features, const Tensor& text_features, const Tensor& logit_scale,
    std::optional<int64_t> positives, const std::optional<Tensor>& image_ids,
    const std::optional<Tensor>& text_ids, double label_smoothing, bool need_image, bool need_text,
    bool need_scale) {
  const BelowAutograd below;
  const Features features(image_features, text_features);
  const Positives matches = Positives::of(features, positives, image_ids, text_ids);
  ClipLoss clip(features, matches, one_element("logit_scale", logit_scale), label_smoothing);
  const double loss = clip.loss();
  const FeatureGradients gradients(features, need_image, need_text);
  double d_scale = 0;
  if (need_image || need_text || need_scale) d_scale = clip.differentiate(gradients);
  const auto options = features.options();
  return {scalar_result(loss, options), gradients.rows(), gradients.cols(),
          scalar_if(need_scale, d_scale, options)};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("clip_loss", &clip_loss); }

}  // namespace tilewise
