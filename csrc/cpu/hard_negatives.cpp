// tilewise::hard_negatives on CPU: the tiles of clip_loss, without gradients. The vector kernel is
// in simd/hard_negatives.cpp.
#include "simd/hard_negatives.h"

#include <ATen/ops/empty.h>

#include <atomic>
#include <cmath>
#include <limits>
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

// Of rows or columns: what a choice has to exceed, whichever block found so much, on any thread. It
// spares most of the logarithms and changes no result: it lies below the best value, so that an
// equal one of an earlier column is still found.
class Floors {
 public:
  explicit Floors(int64_t count) : floors_(count) {
    for (auto& floor : floors_) floor.store(kNone, std::memory_order_relaxed);
  }

  void begin(int64_t first, Best* part, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      part[i] = {floors_[first + i].load(std::memory_order_relaxed), -1};
    }
  }

  void raise(int64_t first, const Best* part, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const float floor = std::nextafter(static_cast<float>(part[i].value), kNone);
      float before = floors_[first + i].load(std::memory_order_relaxed);
      while (before < floor &&
             !floors_[first + i].compare_exchange_weak(before, floor, std::memory_order_relaxed)) {
      }
    }
  }

 private:
  static constexpr float kNone = -std::numeric_limits<float>::infinity();

  std::vector<std::atomic<float>> floors_;
};

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
  Floors row_floors(texts.size()), col_floors(images.size());
  for_tiles(
      features, nullptr,
      [&](const Block& place, const Numbers& dots, const Numbers&) {
        Best *of_rows = parts.rows(place), *of_cols = parts.cols(place);
        row_floors.begin(place.row, of_rows, place.rows);
        col_floors.begin(place.col, of_cols, place.cols);
        const Positives::InBlock pairs = matches.in_block(place);
        TILEWISE_DISPATCH(hard_negatives)({matched_block(place, dots, pairs, scale), key,
                                           noise_row(place.row, row_offset), place.row, place.col},
                                          of_rows, of_cols);
        row_floors.raise(place.row, of_rows, place.rows);
        col_floors.raise(place.col, of_cols, place.cols);
      },
      [&](const Tile& tile) { parts.merge(tile, texts.data(), images.data(), merge); });
  return {indices(texts, image_features), indices(images, text_features)};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) { library.impl("hard_negatives", &hard_negatives); }

}  // namespace tilewise
