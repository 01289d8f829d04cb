// tilewise::hard_negatives on CPU: the tiles of clip_loss, without gradients. The vector kernel is
// in simd/hard_negatives.cpp.
#include "simd/hard_negatives.h"

#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/registration.h"
#include "arguments.h"
#include "contrast.h"

namespace tilewise {
namespace {

using at::Tensor;

// What one block gives.
struct Part {
  Block block;
  std::vector<Best> texts, images;
};

// Blocks of a row come in the order of their columns, so that of equals the first one stays.
void merge(const std::vector<Best>& part, int64_t first, std::vector<Best>& all) {
  for (size_t i = 0; i < part.size(); ++i) {
    if (part[i].value > all[first + i].value) all[first + i] = part[i];
  }
}

Tensor indices(const std::vector<Best>& best, const Tensor& like) {
  const Tensor out =
      at::empty({static_cast<int64_t>(best.size())}, like.options().dtype(at::kLong));
  auto* index = out.mutable_data_ptr<int64_t>();
  for (const Best& b : best) *index++ = b.index;
  return out;
}

// See pyext/tilewise/ops/hard_negatives.py.
std::tuple<Tensor, Tensor> hard_negatives(const Tensor& image_features, const Tensor& text_features,
                                          const Tensor& logit_scale,
                                          std::optional<int64_t> positives,
                                          const std::optional<Tensor>& image_ids,
                                          const std::optional<Tensor>& text_ids, const Tensor& seed,
                                          int64_t row_offset) {
  const BelowAutograd below;
  const Features features(image_features, text_features);
  const Positives matches = Positives::of(features, positives, image_ids, text_ids);
  const double scale = one_element("logit_scale", logit_scale);
  const uint64_t key = random_key(seed);
  std::vector<Best> texts(image_features.size(0)), images(text_features.size(0));
  std::vector<Part> parts(max_blocks(features));
  for_tiles(
      features, nullptr,
      [&](const Block& block, const Tensor& dots, const Tensor&) {
        Part& part = parts[block.index];
        part.block = block;
        // What was found in earlier tiles spares most of the logarithms.
        part.texts.assign(texts.begin() + block.row, texts.begin() + block.row + block.rows);
        part.images.assign(images.begin() + block.col, images.begin() + block.col + block.cols);
        const Positives::InBlock pairs = matches.in_block(block);
        TILEWISE_DISPATCH(hard_negatives)({matched_block(dots, pairs, scale), key,
                                           noise_row(block.row, row_offset), block.row, block.col},
                                          part.texts.data(), part.images.data());
      },
      [&](int64_t blocks) {
        for (int64_t k = 0; k < blocks; ++k) {
          merge(parts[k].texts, parts[k].block.row, texts);
          merge(parts[k].images, parts[k].block.col, images);
        }
      });
  return {indices(texts, image_features), indices(images, text_features)};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("hard_negatives", &hard_negatives); }

}  // namespace tilewise
