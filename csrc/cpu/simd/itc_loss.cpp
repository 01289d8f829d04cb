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
  Floats max = Floats::all(-INFINITY);
  for_lanes(end, [&](int64_t j) { max = higher(Floats::load(z.at + j), max); });
  return fold(max, Largest());
}

TILEWISE_INLINE double largest_of(const Line<double>& z, int64_t end) {
  double max = -INFINITY;
  for (int64_t j = 0; j < end; ++j) max = z.at[j] > max ? z.at[j] : max;
  return max;
}

// z becomes exp(z - base), whose sum this returns.
TILEWISE_INLINE double exponentials(Line<float>& z, int64_t end, float base) {
  return sum_lanes(end, [&](int64_t j) {
    const Floats e = exp_nonpositive(Floats::load(z.at + j) - Floats::all(base));
    e.store(z.at + j);
    return e;
  });
}

TILEWISE_INLINE double exponentials(Line<double>& z, int64_t end, double base) {
  Sum sum;
  for (int64_t j = 0; j < end; ++j) sum.add(z.at[j] = ::exp(z.at[j] - base));
  return sum.value();
}

template <typename T>
void weights_of(const ItcBlock& block) {
  Line<T> z;
  const int64_t end = padded(block.cols);
  for (int64_t i = 0; i < block.rows; ++i) {
    read_logits(static_cast<const T*>(block.dots) + i * block.stride, block.cols, end, block.scale,
                z);
    ItcRow& row = block.of_row[i];
    const T largest = largest_of(z, end);
    if (largest > row.largest) {
      const double factor = ::exp(row.largest - largest);
      row.largest = largest;
      row.sum *= factor;
      row.argmax = block.first;
      while (z.at[row.argmax - block.first] != largest) ++row.argmax;
      T* sums = static_cast<T*>(block.sums) + i * block.dim;
      for (int64_t d = 0; d < block.dim; ++d) sums[d] *= static_cast<T>(factor);
    }
    row.sum += exponentials(z, end, static_cast<T>(base_of(row.largest)));
    T* weights = static_cast<T*>(block.weights) + i * block.stride;
    for (int64_t j = 0; j < block.cols; ++j) weights[j] = z.at[j];
  }
}

}  // namespace

void itc_weights(const ItcBlock& block) {
  const FlushDenormals flush;
  block.is_double ? weights_of<double>(block) : weights_of<float>(block);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
