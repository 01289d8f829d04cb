// Vector kernel of gumbel_argmax: logarithms only where the random word leaves a chance to win.
#include "gumbel_argmax.h"

#include <math.h>

#include "lane_sum.h"
#include "noise.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

TILEWISE_INLINE void load_step(const float* x, int64_t left, Floats (&logits)[2]) {
  float copy[kStep];
  const float* in = step_at(x, left, -INFINITY, copy);
  for (int i = 0; i < 2; ++i) logits[i] = Floats::load(in + 16 * i);
}

// The column of the largest; with `mark_invalid` maybe -1.
TILEWISE_INLINE int64_t largest(NoiseRow noise, const float* x, int64_t cols, bool mark_invalid) {
  float best = -INFINITY;
  int64_t index = 0;
  const Floats infinity = Floats::all(INFINITY);
  Floats invalid = Floats::all(0.0f);  // takes up NaN and +inf
  for (int64_t col = 0; col < cols; col += kStep) {
    Floats logits[2], z[2];
    load_step(x + col, cols - col, logits);
    for (int i = 0; i < 2; ++i) invalid = if_less(logits[i], infinity, invalid, logits[i]);
    const Floats threshold[2] = {Floats::all(best), Floats::all(best)};
    const uint32_t bits = candidates(noise, Stream::Gumbel, logits, col, threshold, z);
    if (bits) index = col + place_of_largest(z, bits, best);
  }
  if (!mark_invalid) return index;
  const bool finite = less(invalid, Floats::all(1.0f)) == 0xFFFF && best > -INFINITY;
  return finite ? index : -1;
}

TILEWISE_INLINE bool smaller(const Perturbed& a, const Perturbed& b) {
  return a.value < b.value || (a.value == b.value && a.col > b.col);
}

// A binary heap with the smallest element first: lets `item` sink from the root.
void sink(Perturbed* heap, int64_t size, const Perturbed& item) {
  int64_t at = 0;
  for (int64_t child = 1; child < size; child = 2 * at + 1) {
    if (child + 1 < size && smaller(heap[child + 1], heap[child])) ++child;
    if (!smaller(heap[child], item)) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = item;
}

// first: the column that x begins with.
void keep_largest(NoiseRow noise, const float* x, int64_t cols, Perturbed* heap, int64_t k,
                  int64_t first = 0) {
  for (int64_t col = 0; col < cols; col += kStep) {
    Floats logits[2], z[2];
    load_step(x + col, cols - col, logits);
    const Floats least = Floats::all(static_cast<float>(heap[0].value));
    uint32_t bits = candidates(noise, Stream::Gumbel, logits, first + col, {least, least}, z);
    if (!bits) continue;
    float values[kStep];
    for (int i = 0; i < 2; ++i) z[i].store(values + 16 * i);
    for (; bits; bits &= bits - 1) {
      const int i = __builtin_ctz(bits);
      if (values[i] > heap[0].value) sink(heap, k, {values[i], first + col + i});
    }
  }
}

// The sums are float64: the noise is added to what the logits are.
void keep_largest(NoiseRow noise, const double* x, int64_t cols, Perturbed* heap, int64_t k) {
  for (int64_t col = 0; col < cols; col += kStep) {
    float g[kStep];
    gumbel_step(noise, Stream::Gumbel, col, g);
    for (int64_t i = col; i < cols && i < col + kStep; ++i) {
      const double value = x[i] + g[i - col];
      if (value > heap[0].value) sink(heap, k, {value, i});
    }
  }
}

// The columns of the k largest, in order. What is not above -inf comes last.
template <typename T>
void top(NoiseRow noise, const T* x, int64_t cols, Perturbed* heap, int64_t k, int64_t* index) {
  for (int64_t i = 0; i < k; ++i) heap[i] = {-INFINITY, -1};
  keep_largest(noise, x, cols, heap, k);
  int64_t found = k;
  for (int64_t size = k; size > 0; --size) {
    const Perturbed least = heap[0];
    if (least.col < 0) --found;
    index[size - 1] = least.col;
    sink(heap, size - 1, heap[size - 1]);
  }
  for (int64_t col = 0; found < k; ++col) {
    if (!(x[col] > -INFINITY)) index[found++] = col;
  }
}

// The largest logit, and how far the logarithm of the sum of exponentials is above it.
struct Normalizer {
  double largest, rest;
};

TILEWISE_INLINE float largest_of(const float* x, int64_t cols) {
  Floats max = Floats::all(-INFINITY);
  float copy[kStep];
  for (int64_t col = 0; col < cols; col += kStep) {
    const float* in = step_at(x + col, cols - col, -INFINITY, copy);
    max = higher(higher(Floats::load(in), Floats::load(in + 16)), max);
  }
  return fold(max, Largest());
}

TILEWISE_INLINE double sum_exp(const float* x, int64_t cols, float largest) {
  const Floats base = Floats::all(largest);
  float copy[kStep];
  LaneSum<Floats> total;
  for (int64_t col = 0; col < cols; col += kStep) {
    const float* in = step_at(x + col, cols - col, -INFINITY, copy);
    total.add(exp_nonpositive(Floats::load(in) - base) +
              exp_nonpositive(Floats::load(in + 16) - base));
  }
  return total.value();
}

TILEWISE_INLINE Normalizer log_sum_exp(const float* x, int64_t cols) {
  const float largest = largest_of(x, cols);
  double total = 0;
  for (int64_t col = 0; col < cols; col += kArgmaxBlock) {
    total += sum_exp(x + col, cols - col < kArgmaxBlock ? cols - col : kArgmaxBlock, largest);
  }
  return {largest, ::log(total)};
}

TILEWISE_INLINE Normalizer log_sum_exp(const double* x, int64_t cols) {
  double max = -INFINITY;
  Sum total;
  for (int64_t i = 0; i < cols; ++i) max = x[i] > max ? x[i] : max;
  for (int64_t i = 0; i < cols; ++i) total.add(::exp(x[i] - max));
  return {max, ::log(total.value())};
}

TILEWISE_INLINE void choose(NoiseRow noise, const float* x, int64_t cols, Perturbed* heap,
                            int64_t k, int64_t* index, bool mark_invalid) {
  if (k == 1) {
    *index = largest(noise, x, cols, mark_invalid);
  } else {
    top(noise, x, cols, heap, k, index);
  }
}

TILEWISE_INLINE void choose(NoiseRow noise, const double* x, int64_t cols, Perturbed* heap,
                            int64_t k, int64_t* index, bool mark_invalid) {
  top(noise, x, cols, heap, k, index);
  if (!mark_invalid) return;
  if (!(x[index[0]] > -INFINITY)) index[0] = -1;
  for (int64_t i = 0; i < cols; ++i) {
    if (!(x[i] < INFINITY)) index[0] = -1;
  }
}

template <typename T>
void argmax_rows(const ArgmaxRows& rows, const T* x, Perturbed* heap, int64_t* index, T* log_prob,
                 bool mark_invalid) {
  for (int64_t r = 0; r < rows.rows; ++r, x += rows.cols, index += rows.k) {
    choose({rows.seed, rows.first_row + r}, x, rows.cols, heap, rows.k, index, mark_invalid);
    if (!log_prob) continue;
    const Normalizer all = log_sum_exp(x, rows.cols);
    for (int64_t i = 0; i < rows.k; ++i) {
      *log_prob++ = static_cast<T>((x[index[i]] - all.largest) - all.rest);
    }
  }
}

}  // namespace

void gumbel_argmax(const ArgmaxRows& rows, Perturbed* heap, int64_t* index, void* log_prob,
                   bool mark_invalid) {
  const FlushDenormals flush;
  rows.is_double ? argmax_rows(rows, static_cast<const double*>(rows.x), heap, index,
                               static_cast<double*>(log_prob), mark_invalid)
                 : argmax_rows(rows, static_cast<const float*>(rows.x), heap, index,
                               static_cast<float*>(log_prob), mark_invalid);
}

float largest_logit(const float* x, int64_t cols) {
  const FlushDenormals flush;
  return largest_of(x, cols);
}

double sum_of_exponentials(const float* x, int64_t cols, float base) {
  const FlushDenormals flush;
  return sum_exp(x, cols, base);
}

bool largest_of_block(const ArgmaxRows& row, int64_t first_col, Perturbed* heap,
                      bool mark_invalid) {
  const FlushDenormals flush;
  const auto* x = static_cast<const float*>(row.x);
  for (int64_t i = 0; i < row.k; ++i) heap[i] = {-INFINITY, -1};
  keep_largest({row.seed, row.first_row}, x, row.cols, heap, row.k, first_col);
  bool valid = true;
  for (int64_t i = 0; mark_invalid && i < row.cols; ++i) valid &= x[i] < INFINITY;
  return valid;
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
