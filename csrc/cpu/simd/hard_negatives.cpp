// Vector kernel of hard_negatives: each logit is perturbed twice, for its row and for its column.
#include "hard_negatives.h"

#include <math.h>

#include "line.h"
#include "noise.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

static_assert(kBlockMultiple % kStep == 0 && kMaxBlockCols % kStep == 0);

// The largest perturbed logits of the columns, and the rows that have them: small integers.
struct Columns {
  Line<float> value, row;
};

// Logits of a row, -inf where they match.
template <typename T>
TILEWISE_INLINE void read_row(const NegativesBlock& block, int64_t i, Line<T>& z) {
  read_logits(static_cast<const T*>(block.dots) + i * block.stride, block.cols,
              padded(block.cols, kStep), block.scale, z);
  for (int64_t p = block.begin[i]; p < block.begin[i + 1]; ++p) {
    z.at[block.positives[p]] = -INFINITY;
  }
}

TILEWISE_INLINE void load(const float* x, Floats (&out)[2]) {
  for (int i = 0; i < 2; ++i) out[i] = Floats::load(x + 16 * i);
}

void raise(const NegativesBlock& block, int64_t i, const Line<float>& z, Best& text,
           Columns& images) {
  const NoiseRow noise{block.seed, block.noise_row + i};
  float best = static_cast<float>(text.value);
  for (int64_t j = 0; j < block.cols; j += kStep) {
    Floats logits[2], perturbed[2], value[2];
    load(z.at + j, logits);
    load(images.value.at + j, value);
    const Floats threshold[2] = {Floats::all(best), Floats::all(best)};
    const uint32_t better =
        candidates(noise, Stream::NegativeTexts, logits, block.col + j, threshold, perturbed);
    if (better) {
      text.index = block.col + j + place_of_largest(perturbed, better, best);
      text.value = best;
    }
    if (!candidates(noise, Stream::NegativeImages, logits, block.col + j, value, perturbed)) {
      continue;
    }
    const Floats row = Floats::all(static_cast<float>(i));
    for (int k = 0; k < 2; ++k) {
      float* at = images.row.at + j + 16 * k;
      if_less(value[k], perturbed[k], row, Floats::load(at)).store(at);
      if_less(value[k], perturbed[k], perturbed[k], value[k]).store(images.value.at + j + 16 * k);
    }
  }
}

void raise_columns(const NegativesBlock& block, Best* texts, Best* images) {
  Columns columns;
  Line<float> z;
  for (int64_t j = 0; j < padded(block.cols, kStep); ++j) {
    columns.value.at[j] = j < block.cols ? static_cast<float>(images[j].value) : INFINITY;
    columns.row.at[j] = -1;
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    read_row(block, i, z);
    raise(block, i, z, texts[i], columns);
  }
  for (int64_t j = 0; j < block.cols; ++j) {
    if (columns.row.at[j] < 0) continue;
    images[j] = {columns.value.at[j], block.row + static_cast<int64_t>(columns.row.at[j])};
  }
}

TILEWISE_INLINE void raise_one(double value, int64_t index, Best& best) {
  if (value > best.value) best = {value, index};
}

// The sums are float64: the noise is added to what the logits are.
void raise_exactly(const NegativesBlock& block, Best* texts, Best* images) {
  Line<double> z;
  for (int64_t i = 0; i < block.rows; ++i) {
    read_row(block, i, z);
    const NoiseRow noise{block.seed, block.noise_row + i};
    for (int64_t first = 0; first < block.cols; first += kStep) {
      float forth[kStep], back[kStep];
      gumbel_step(noise, Stream::NegativeTexts, block.col + first, forth);
      gumbel_step(noise, Stream::NegativeImages, block.col + first, back);
      for (int64_t j = first; j < block.cols && j < first + kStep; ++j) {
        raise_one(z.at[j] + forth[j - first], block.col + j, texts[i]);
        raise_one(z.at[j] + back[j - first], block.row + i, images[j]);
      }
    }
  }
}

}  // namespace

void hard_negatives(const NegativesBlock& block, Best* texts, Best* images) {
  const FlushDenormals flush;
  block.is_double ? raise_exactly(block, texts, images) : raise_columns(block, texts, images);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
