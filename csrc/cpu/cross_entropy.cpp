#include "cross_entropy.h"

#include <cmath>
#include <utility>

#include "../common/sum.h"
#include "arguments.h"

namespace tilewise {
namespace {

using at::Tensor;

void merge_into(std::vector<LogSum>& sums, int64_t first, const std::vector<LogSum>& part) {
  for (size_t i = 0; i < part.size(); ++i) merge(sums[first + i], part[i]);
}

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
      parts_(max_blocks(features)) {}

template <typename F>
void CrossEntropy::with_block(const Block& block, const Tensor& dots, const F& f) const {
  const Positives::InBlock matches = positives_.in_block(block);
  f(CrossEntropyBlock{matched_block(dots, matches, scale_), rows_.from(block.row),
                      cols_ ? cols_->from(block.col) : CrossEntropySide{}});
}

double CrossEntropy::add_sums() {
  Sum total;
  for_tiles(
      features_, nullptr,
      [&](const Block& block, const Tensor& dots, const Tensor&) {
        Part& part = parts_[block.index];
        part.block = block;
        part.rows.resize(block.rows);
        part.cols.resize(cols_ ? block.cols : 0);
        with_block(block, dots, [&](const CrossEntropyBlock& b) {
          part.total = kernels_.log_sums(b, part.rows.data(), part.cols.data());
        });
      },
      [&](int64_t blocks) {  // in a fixed order: the same bits for every thread count
        for (int64_t k = 0; k < blocks; ++k) {
          const Part& part = parts_[k];
          merge_into(rows_.sums, part.block.row, part.rows);
          if (cols_) merge_into(cols_->sums, part.block.col, part.cols);
          total.add(part.total);
        }
      });
  return total.value();
}

double CrossEntropy::differentiate(const FeatureGradients& gradients) {
  Sum total;
  for_tiles(
      features_, &gradients,
      [&](const Block& block, const Tensor& dots, const Tensor& grads) {
        const Tensor& out = grads.defined() ? grads : dots;
        with_block(block, dots, [&](const CrossEntropyBlock& b) {
          parts_[block.index].total = kernels_.gradient(b, out.mutable_data_ptr(), out.stride(0),
                                                        out.scalar_type() == at::kBFloat16);
        });
      },
      [&](int64_t blocks) {
        for (int64_t k = 0; k < blocks; ++k) total.add(parts_[k].total);
      });
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
  return {scalar_result(loss.value(), options), gradients.rows(), gradients.cols(),
          scalar_if(need_scale, d_scale, options)};
}

}  // namespace tilewise
