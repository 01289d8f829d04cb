// Cross entropies of all logits of two batches: each row chooses among the columns, and for some
// losses each column among the rows. A pass for the sums of exponentials, another for gradients.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "contrast.h"
#include "simd/cross_entropy_block.h"

namespace tilewise {

class CrossEntropy {
 public:
  // What the rows, or the columns, have to do with all of the others.
  struct Side {
    std::vector<LogSum> sums;
    std::vector<double> weight, target;
    double smoothing;

    // The mean over those that have a match, times `share`; matches: of each; others: how many
    // there are.
    Side(const std::vector<int64_t>& matches, int64_t others, double label_smoothing, double share);
    // Of `weights`, the same for a match; `sums` as sums_of() gave them, or empty.
    Side(std::vector<double> weights, std::vector<LogSum> log_sums);

    CrossEntropySide from(int64_t first) const {
      return {sums.data() + first, weight.data() + first, target.data() + first, smoothing};
    }
  };

  // Without `cols` only the rows choose, and the kernels are for that.
  CrossEntropy(const Features& features, const Positives& positives, double scale, Side rows,
               std::optional<Side> cols, const CrossEntropyKernels& kernels);

  // The loss; its gradients by rows, columns and scale, empty where they are not needed.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> results(bool need_rows, bool need_cols,
                                                                     bool need_scale);

  // The two passes. The first fills the sides' sums, and returns that of targets times logits.
  double add_sums();
  // Fills the gradients; returns that of the scale.
  double differentiate(const FeatureGradients& gradients);
  const Side& rows() const { return rows_; }
  const Side& cols() const { return *cols_; }

 private:
  template <typename F>
  void with_block(const Block& place, const Numbers& dots, const F& f) const;
  double total_of(const Tile& tile) const;  // in a fixed order

  const Features& features_;
  const Positives& positives_;
  double scale_;
  Side rows_;
  std::optional<Side> cols_;
  CrossEntropyKernels kernels_;
  BlockParts<LogSum> parts_;
  std::vector<double> totals_;  // of the blocks of a tile
};

}  // namespace tilewise
