#include "positives.h"

#include <algorithm>
#include <numeric>

namespace tilewise {

Positives::Positives(int64_t images, int64_t texts, std::optional<int64_t> offset)
    // Beyond the matrix no offset matches, and none overflows.
    : images_(images),
      texts_count_(texts),
      offset_(std::clamp(offset.value_or(texts), -images, texts)) {}

Positives::Positives(const at::Tensor& image_ids, const at::Tensor& text_ids)
    : images_(image_ids.numel()), texts_count_(text_ids.numel()), offset_(0) {
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
  std::vector<int64_t> sorted(wanted, wanted + images.numel());
  std::sort(sorted.begin(), sorted.end());
  for (int64_t j = 0; j < texts.numel(); ++j) {
    const auto [first, last] = std::equal_range(sorted.begin(), sorted.end(), id[j]);
    per_text_.push_back(last - first);
  }
}

Positives Positives::of(const Features& features, std::optional<int64_t> offset,
                        const std::optional<at::Tensor>& image_ids,
                        const std::optional<at::Tensor>& text_ids) {
  const int64_t rows = features.rows.size(0), cols = features.cols.size(0);
  if (!image_ids && !text_ids) return Positives(rows, cols, offset);
  TORCH_CHECK_VALUE(image_ids && text_ids, "positives: expected ids of images and texts, got one");
  TORCH_CHECK_VALUE(image_ids->numel() == rows && text_ids->numel() == cols, "positives: expected ",
                    rows, " and ", cols, " ids, got ", image_ids->sizes(), " and ",
                    text_ids->sizes());
  return Positives(*image_ids, *text_ids);
}

std::vector<int64_t> Positives::per_image() const {
  std::vector<int64_t> out(images_);
  for (int64_t i = 0; i < images_; ++i) {
    const int64_t text = i + offset_;
    out[i] = first_.empty() ? text >= 0 && text < texts_count_ : last_[i] - first_[i];
  }
  return out;
}

std::vector<int64_t> Positives::per_text() const {
  if (!first_.empty()) return per_text_;
  std::vector<int64_t> out(texts_count_);
  for (int64_t j = 0; j < texts_count_; ++j) out[j] = j - offset_ >= 0 && j - offset_ < images_;
  return out;
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
