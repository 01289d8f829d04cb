// tilewise::hard_negatives on CPU: the tiles of clip_loss, without gradients. The vector kernel is
// in simd/hard_negatives.cpp.
#include "simd/hard_negatives.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/registration.h"
#include "arguments.h"
#include "contrast.h"

namespace tilewise {
namespace {

using at::Tensor;

// Blocks of a row come in the order of their columns, so that of equals the first one stays.
void merge(Best* all, const Best* part, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (part[i].value > all[i].value) all[i] = part[i];
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
  BlockParts<Best> parts(features);
  for_tiles(
      features, nullptr,
      [&](const Block& place, const Numbers& dots, const Numbers&) {
        // What was found in earlier tiles spares most of the logarithms.
        Best *of_rows = parts.rows(place), *of_cols = parts.cols(place);
        std::copy_n(texts.begin() + place.row, place.rows, of_rows);
        std::copy_n(images.begin() + place.col, place.cols, of_cols);
        const Positives::InBlock pairs = matches.in_block(place);
        TILEWISE_DISPATCH(hard_negatives)({matched_block(place, dots, pairs, scale), key,
                                           noise_row(place.row, row_offset), place.row, place.col},
                                          of_rows, of_cols);
      },
      [&](const Tile& tile) { parts.merge(tile, texts.data(), images.data(), merge); });
  return {indices(texts, image_features), indices(images, text_features)};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("hard_negatives", &hard_negatives); }

}  // namespace tilewise
