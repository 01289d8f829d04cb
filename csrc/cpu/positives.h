// Which images match which texts: by an offset, or by equal ids. Never a matrix.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "features.h"
#include "matmul.h"

namespace tilewise {

class Positives {
 public:
  // Image i matches text i + offset, if there is one; without an offset nothing matches.
  Positives(int64_t images, int64_t texts, std::optional<int64_t> offset);
  // An image and a text match where their ids are equal. int64, (B,) and (N,).
  Positives(const at::Tensor& image_ids, const at::Tensor& text_ids);
  // As the ops take them: ids of both, or else an offset. Checks them.
  static Positives of(const Features& features, std::optional<int64_t> offset,
                      const std::optional<at::Tensor>& image_ids,
                      const std::optional<at::Tensor>& text_ids);

  // The pairs in a block of the logits: of its row i, the columns
  // cols[begin[i]..begin[i + 1]), counted within the block, ascending.
  struct InBlock {
    std::vector<int64_t> begin, cols;
  };
  InBlock in_block(const Block& block) const;

  // How many texts match each image, and how many images each text.
  std::vector<int64_t> per_image() const;
  std::vector<int64_t> per_text() const;

 private:
  int64_t images_, texts_count_;
  int64_t offset_;              // beyond all texts where nothing matches
  std::vector<int64_t> texts_;  // those with equal ids side by side, each group ascending
  std::vector<int64_t> per_text_;
  std::vector<int64_t> first_, last_;  // of each image: its texts are texts_[first..last)
};

}  // namespace tilewise
