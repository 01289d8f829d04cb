#include "positives.h"

#include <algorithm>
#include <numeric>

namespace tilewise {

Positives::Positives(int64_t images, int64_t texts, std::optional<int64_t> offset)
    // Beyond the matrix no offset matches, and none overflows.
    : offset_(std::clamp(offset.value_or(texts), -images, texts)) {}

Positives::Positives(const at::Tensor& image_ids, const at::Tensor& text_ids) : offset_(0) {
  const at::Tensor images = image_ids.contiguous(), texts = text_ids.contiguous();
  const auto* id = texts.const_data_ptr<int64_t>();
  texts_.resize(texts.numel());
  std::iota(texts_.begin(), texts_.end(), 0);
  std::stable_sort(texts_.begin(), texts_.end(),
                   [&](int64_t a, int64_t b) { return id[a] < id[b]; });
  const auto* wanted = images.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < images.numel(); ++i) {
    const auto first =
        std::lower_bound(texts_.begin(), texts_.end(), wanted[i],
                         [&](int64_t text, int64_t value) { return id[text] < value; });
    const auto last =
        std::upper_bound(first, texts_.end(), wanted[i],
                         [&](int64_t value, int64_t text) { return value < id[text]; });
    first_.push_back(first - texts_.begin());
    last_.push_back(last - texts_.begin());
  }
}

Positives::InBlock Positives::in_block(const Block& block) const {
  InBlock out;
  out.begin.reserve(block.rows + 1);
  for (int64_t i = block.row; i < block.row + block.rows; ++i) {
    out.begin.push_back(out.cols.size());
    if (first_.empty()) {
      const int64_t col = i + offset_ - block.col;
      if (col >= 0 && col < block.cols) out.cols.push_back(col);
      continue;
    }
    const auto end = texts_.begin() + last_[i];
    auto text = std::lower_bound(texts_.begin() + first_[i], end, block.col);
    for (; text != end && *text < block.col + block.cols; ++text) {
      out.cols.push_back(*text - block.col);
    }
  }
  out.begin.push_back(out.cols.size());
  return out;
}

}  // namespace tilewise
