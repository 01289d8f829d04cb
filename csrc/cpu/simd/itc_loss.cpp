// Vector kernel of itc_loss: logits become the weights of candidates, relative to the largest so
// far.
#include "itc_loss.h"

#include <math.h>

#include "lane_math.h"
#include "line.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

TILEWISE_INLINE float largest_of(const Line<float>& z, int64_t end) {
  Floats most = Floats::all(-INFINITY);
  for_lanes(end, [&](int64_t j) { most = higher(Floats::load(z.at + j), most); });
  return fold(most, Largest());
}

TILEWISE_INLINE double largest_of(const Line<double>& z, int64_t end) {
  double most = -INFINITY;
  for (int64_t j = 0; j < end; ++j) most = z.at[j] > most ? z.at[j] : most;
  return most;
}

// z becomes exp(z - largest), whose sum this returns.
TILEWISE_INLINE float exponentials(Line<float>& z, int64_t end, float largest) {
  Floats sum = Floats::all(0.0f);
  for_lanes(end, [&](int64_t j) {
    const Floats e = exp_nonpositive(Floats::load(z.at + j) - Floats::all(largest));
    e.store(z.at + j);
    sum = sum + e;
  });
  return fold(sum, Add());
}

TILEWISE_INLINE double exponentials(Line<double>& z, int64_t end, double largest) {
  double sum = 0;
  for (int64_t j = 0; j < end; ++j) {
    z.at[j] = ::exp(z.at[j] - largest);
    sum += z.at[j];
  }
  return sum;
}

template <typename T>
void weights_of(const ItcBlock& block) {
  Line<T> z;
  const int64_t end = padded(block.cols);
  for (int64_t i = 0; i < block.rows; ++i) {
    T* dots = static_cast<T*>(block.dots) + i * block.stride;
    read_logits(dots, block.cols, end, block.scale, z);
    ItcRow& row = block.of_row[i];
    const T largest = largest_of(z, end);
    if (largest > row.largest) {
      const double factor = ::exp(row.largest - largest);
      row.largest = largest;
      row.sum *= factor;
      row.nearest = block.first;
      while (z.at[row.nearest - block.first] != largest) ++row.nearest;
      T* mean = static_cast<T*>(block.means) + i * block.dim;
      for (int64_t d = 0; d < block.dim; ++d) mean[d] *= static_cast<T>(factor);
    }
    // Before the first finite logit any base will do, and -inf less -inf would be NaN.
    const double base = row.largest == -INFINITY ? 0 : row.largest;
    row.sum += exponentials(z, end, static_cast<T>(base));
    for (int64_t j = 0; j < block.cols; ++j) dots[j] = z.at[j];
  }
}

}  // namespace

void itc_weights(const ItcBlock& block) {
  const FlushDenormals flush;
  block.is_double ? weights_of<double>(block) : weights_of<float>(block);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
