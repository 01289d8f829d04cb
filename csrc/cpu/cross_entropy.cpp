#include "cross_entropy.h"

#include <cmath>
#include <utility>

#include "../common/sum.h"
#include "arguments.h"
#include "simd/log_sums.h"

namespace tilewise {
namespace {

using at::Tensor;

void add_log_sums(const CrossEntropy::Side& side, Sum& total) {  // weighted
  for (size_t i = 0; i < side.sums.size(); ++i) {
    if (side.weight[i] == 0) continue;
    total.add(side.weight[i] * (side.sums[i].largest + std::log(side.sums[i].sum)));
  }
}

}  // namespace

CrossEntropy::Side::Side(const std::vector<int64_t>& matches, int64_t others,
                         double label_smoothing, double share)
    : sums(matches.size()),
      weight(matches.size()),
      target(matches.size()),
      smoothing(others ? label_smoothing / others : 0) {
  int64_t count = 0;
  for (const int64_t n : matches) count += n > 0;
  for (size_t i = 0; i < matches.size(); ++i) {
    if (matches[i] == 0) continue;
    weight[i] = share / count;
    target[i] = (1 - label_smoothing) * weight[i] / matches[i];
  }
}

CrossEntropy::Side::Side(std::vector<double> weights, std::vector<LogSum> log_sums)
    : sums(std::move(log_sums)), weight(std::move(weights)), target(weight), smoothing(0) {
  sums.resize(weight.size());
}

CrossEntropy::CrossEntropy(const Features& features, const Positives& positives, double scale,
                           Side rows, std::optional<Side> cols, const CrossEntropyKernels& kernels)
    : features_(features),
      positives_(positives),
      scale_(scale),
      rows_(std::move(rows)),
      cols_(std::move(cols)),
      kernels_(kernels),
      parts_(features),
      totals_(Tiles(features).largest().blocks().count()) {}

template <typename F>
void CrossEntropy::with_block(const Block& place, const Numbers& dots, const F& f) const {
  const Positives::InBlock matches = positives_.in_block(place);
  f(CrossEntropyBlock{matched_block(place, dots, matches, scale_), rows_.from(place.row),
                      cols_ ? cols_->from(place.col) : CrossEntropySide{}});
}

double CrossEntropy::total_of(const Tile& tile) const {
  Sum total;
  for (int64_t i = 0; i < tile.blocks().count(); ++i) total.add(totals_[i]);
  return total.value();
}

double CrossEntropy::add_sums() {
  Sum total;
  for_tiles(
      features_, nullptr,
      [&](const Block& place, const Numbers& dots, const Numbers&) {
        with_block(place, dots, [&](const CrossEntropyBlock& b) {
          totals_[place.index] = kernels_.log_sums(b, parts_.rows(place), parts_.cols(place));
        });
      },
      [&](const Tile& tile) {
        parts_.merge(tile, rows_.sums.data(), cols_ ? cols_->sums.data() : nullptr,
                     TILEWISE_DISPATCH(merge_log_sums));
        total.add(total_of(tile));
      });
  return total.value();
}

double CrossEntropy::differentiate(const FeatureGradients& gradients) {
  Sum total;
  for_tiles(
      features_, &gradients,
      [&](const Block& place, const Numbers& dots, const Numbers& out) {
        with_block(place, dots, [&](const CrossEntropyBlock& b) {
          totals_[place.index] =
              kernels_.gradient(b, out.data, out.stride, out.type == at::kBFloat16);
        });
      },
      [&](const Tile& tile) { total.add(total_of(tile)); });
  return total.value();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> CrossEntropy::results(bool need_rows, bool need_cols,
                                                                 bool need_scale) {
  Sum loss;
  loss.add(-add_sums());
  add_log_sums(rows_, loss);
  if (cols_) add_log_sums(*cols_, loss);
  const FeatureGradients gradients(features_, need_rows, need_cols);
  double d_scale = 0;
  if (need_rows || need_cols || need_scale) d_scale = differentiate(gradients);
  const auto options = features_.options();
  return {scalar_result(loss.value(), options), gradients.rows, gradients.cols,
          scalar_if(need_scale, d_scale, options)};
}

}  // namespace tilewise
