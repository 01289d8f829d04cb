// Vector kernel of gumbel_softmax: noise, exponentials and their sum while a row is in cache.
#include "gumbel_softmax.h"

#include <float.h>
#include <math.h>

#include "../../common/sum.h"
#include "noise.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kGroupRows = 64;

// Calls f(column, x, y, out) for 32 columns at a time: those of x and y, out being in y, or at the
// end of a row copies, x's padded.
template <typename F>
TILEWISE_INLINE void for_steps(const float* x, float* y, int64_t cols, float padding, const F& f) {
  int64_t col = 0;
  for (; col + kStep <= cols; col += kStep) f(col, x + col, y + col, y + col);
  if (col == cols) return;
  const int64_t left = cols - col;
  float a[kStep], b[kStep], out[kStep];
  f(col, step_at(x + col, left, padding, a), step_at(y + col, left, 0.5f, b), out);
  for (int64_t i = 0; i < left; ++i) y[col + i] = out[i];
}

// y = the uniform variates of the columns from `first`. These and logarithms are long chains: in
// loops of their own, and over several rows, more of each are under way at once.
TILEWISE_INLINE void randomize(NoiseRow noise, float* y, int64_t first, int64_t cols) {
  for_steps(y, y, cols, 0.0f, [&](int64_t col, const float*, const float*, float* out) {
    Floats u[2];
    uniform_columns(noise, Stream::Gumbel, first + col, u);
    for (int i = 0; i < 2; ++i) u[i].store(out + 16 * i);
  });
}

// y = x + noise, made of uniform variates y.
TILEWISE_INLINE void perturb(const float* x, float* y, int64_t count) {
  for_steps(x, y, count, 0.0f, [&](int64_t, const float* logits, const float* u, float* out) {
    for (int i = 0; i < 2; ++i) {
      (Floats::load(logits + 16 * i) + gumbel(Floats::load(u + 16 * i))).store(out + 16 * i);
    }
  });
}

TILEWISE_INLINE float maximum(const float* y, int64_t cols) {
  Floats max[2] = {Floats::all(-INFINITY), Floats::all(-INFINITY)};
  float copy[kStep];
  for (int64_t col = 0; col < cols; col += kStep) {
    const float* z = step_at(y + col, cols - col, -INFINITY, copy);
    for (int i = 0; i < 2; ++i) max[i] = higher(Floats::load(z + 16 * i), max[i]);
  }
  return fold(higher(max[0], max[1]), Largest());
}

// y = exp((y - base) / tau); returns the sum.
TILEWISE_INLINE float exponentials(float* y, int64_t cols, float base, float inverse_tau) {
  Floats sum[2] = {Floats::all(0.0f), Floats::all(0.0f)};
  for_steps(y, y, cols, -INFINITY, [&](int64_t, const float* in, const float*, float* out) {
    for (int i = 0; i < 2; ++i) {
      const Floats d = Floats::load(in + 16 * i) - Floats::all(base);
      const Floats e = exp_nonpositive(d * Floats::all(inverse_tau));
      e.store(out + 16 * i);
      sum[i] = sum[i] + e;
    }
  });
  return fold(sum[0] + sum[1], Add());
}

TILEWISE_INLINE void scale(float* y, int64_t cols, float factor) {
  for_steps(y, y, cols, 0.0f, [&](int64_t, const float* in, const float*, float* out) {
    for (int i = 0; i < 2; ++i) {
      (Floats::load(in + 16 * i) * Floats::all(factor)).store(out + 16 * i);
    }
  });
}

// Rows of one block. Each pass takes all of them, so that short rows do not wait for one another's
// sums.
void softmax_group(NoiseRow noise, const float* x, float* y, int64_t rows, int64_t cols,
                   float inverse_tau) {
  float max[kGroupRows], sum[kGroupRows];
  for (int64_t r = 0; r < rows; ++r) {
    randomize({noise.seed, noise.row + r}, y + r * cols, 0, cols);
  }
  perturb(x, y, rows * cols);
  for (int64_t r = 0; r < rows; ++r) max[r] = maximum(y + r * cols, cols);
  for (int64_t r = 0; r < rows; ++r) {
    sum[r] = exponentials(y + r * cols, cols, max[r], inverse_tau);
  }
  for (int64_t r = 0; r < rows; ++r) scale(y + r * cols, cols, 1 / sum[r]);
}

// Exponentials below the block's own maximum.
SoftmaxPart exponentials_of(NoiseRow noise, const float* x, float* y, int64_t col, int64_t cols,
                            float inverse_tau) {
  randomize(noise, y, col, cols);
  perturb(x, y, cols);
  const float max = maximum(y, cols);
  if (max > -INFINITY) return {max, exponentials(y, cols, max, inverse_tau)};
  double sum = 0;  // all is masked
  for (int64_t i = 0; i < cols; ++i) sum += y[i] = y[i] == -INFINITY ? 0.0f : NAN;
  return {max, sum};
}

// A row of several blocks.
void softmax_long_row(const GumbelRows& rows, NoiseRow noise, const float* x, float* y,
                      SoftmaxPart* parts) {
  const int64_t cols = rows.cols, blocks = (cols - 1) / kSoftmaxBlock + 1;
  const auto width = [&](int64_t block) {
    const int64_t left = cols - block * kSoftmaxBlock;
    return left < kSoftmaxBlock ? left : kSoftmaxBlock;
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t col = b * kSoftmaxBlock;
    parts[b] = exponentials_of(noise, x + col, y + col, col, width(b),
                               static_cast<float>(rows.inverse_tau));
  }
  softmax_factors(parts, blocks, rows.inverse_tau);
  for (int64_t b = blocks - 1; b >= 0; --b) {  // the last one is still in the cache
    scale(y + b * kSoftmaxBlock, width(b), static_cast<float>(parts[b].sum));
  }
}

void softmax_rows(const GumbelRows& rows, const float* x, float* y, SoftmaxPart* parts) {
  const int64_t cols = rows.cols;
  if (cols > kSoftmaxBlock) {
    for (int64_t r = 0; r < rows.rows; ++r) {
      softmax_long_row(rows, {rows.seed, rows.first_row + r}, x + r * cols, y + r * cols, parts);
    }
    return;
  }
  int64_t group = kSoftmaxBlock / cols < kGroupRows ? kSoftmaxBlock / cols : kGroupRows;
  for (int64_t r = 0; r < rows.rows; r += group) {
    if (group > rows.rows - r) group = rows.rows - r;
    softmax_group({rows.seed, rows.first_row + r}, x + r * cols, y + r * cols, group, cols,
                  static_cast<float>(rows.inverse_tau));
  }
}

// The same in float64, of float32 noise.
void softmax_rows(const GumbelRows& rows, const double* x, double* y, SoftmaxPart*) {
  const int64_t cols = rows.cols;
  for (int64_t r = 0; r < rows.rows; ++r, x += cols, y += cols) {
    double max = -INFINITY;
    Sum sum;
    for (int64_t col = 0; col < cols; col += kStep) {
      float g[kStep];
      gumbel_step({rows.seed, rows.first_row + r}, Stream::Gumbel, col, g);
      for (int64_t i = col; i < cols && i < col + kStep; ++i) {
        y[i] = x[i] + g[i - col];
        if (y[i] > max) max = y[i];
      }
    }
    for (int64_t i = 0; i < cols; ++i) sum.add(y[i] = ::exp((y[i] - max) * rows.inverse_tau));
    for (int64_t i = 0; i < cols; ++i) y[i] /= sum.value();
  }
}

TILEWISE_INLINE double dot_block(const float* a, const float* b, int64_t cols) {
  Floats sum[2] = {Floats::all(0.0f), Floats::all(0.0f)};
  int64_t j = 0;
  for (; j + kStep <= cols; j += kStep) {
    for (int i = 0; i < 2; ++i) {
      sum[i] = multiply_add(Floats::load(a + j + 16 * i), Floats::load(b + j + 16 * i), sum[i]);
    }
  }
  double total = fold(sum[0] + sum[1], Add());
  for (; j < cols; ++j) total += a[j] * b[j];
  return total;
}

TILEWISE_INLINE double dot(const float* a, const float* b, int64_t cols) {
  double total = 0;
  for (int64_t col = 0; col < cols; col += kSoftmaxBlock) {
    const int64_t n = cols - col < kSoftmaxBlock ? cols - col : kSoftmaxBlock;
    total += dot_block(a + col, b + col, n);
  }
  return total;
}

TILEWISE_INLINE double dot(const double* a, const double* b, int64_t cols) {
  Sum total;
  for (int64_t j = 0; j < cols; ++j) total.add(a[j] * b[j]);
  return total.value();
}

// Sum of -y * (grad - mean) * log(y): tau times the gradient of tau. A perturbed logit is
// tau * log(y) and a constant of its row, which drops out.
TILEWISE_INLINE double tau_sum(const float* grad, const float* y, int64_t cols, float mean) {
  double total = 0;
  for (int64_t first = 0; first < cols; first += kSoftmaxBlock) {
    Floats sum = Floats::all(0.0f);
    for (int64_t col = first; col < cols && col < first + kSoftmaxBlock; col += kStep) {
      float copies[2][kStep];
      const float* g = step_at(grad + col, cols - col, mean, copies[0]);
      const float* p = step_at(y + col, cols - col, 0.0f, copies[1]);
      for (int i = 0; i < 2; ++i) {
        const Floats v = Floats::load(p + 16 * i);
        const Floats log = minus_log(higher(v, Floats::all(FLT_MIN)));  // 0 * log(0) is 0
        sum = multiply_add(v * (Floats::load(g + 16 * i) - Floats::all(mean)), log, sum);
      }
    }
    total += fold(sum, Add());
  }
  return total;
}

TILEWISE_INLINE double tau_sum(const double* grad, const double* y, int64_t cols, double mean) {
  Sum total;
  for (int64_t j = 0; j < cols; ++j) {
    total.add(-y[j] * (grad[j] - mean) * ::log(y[j] < DBL_MIN ? DBL_MIN : y[j]));
  }
  return total.value();
}

// d_x = y * (grad - mean) / tau.
TILEWISE_INLINE void softmax_gradient_row(const float* grad, const float* y, float* d_x,
                                          int64_t cols, float mean, float inverse_tau) {
  const Floats m = Floats::all(mean), inverse = Floats::all(inverse_tau);
  int64_t col = 0;
  for (; col + kStep <= cols; col += kStep) {
    for (int64_t j = col; j < col + kStep; j += 16) {
      (Floats::load(y + j) * (Floats::load(grad + j) - m) * inverse).store(d_x + j);
    }
  }
  for (; col < cols; ++col) d_x[col] = y[col] * (grad[col] - mean) * inverse_tau;
}

TILEWISE_INLINE void softmax_gradient_row(const double* grad, const double* y, double* d_x,
                                          int64_t cols, double mean, double inverse_tau) {
  for (int64_t j = 0; j < cols; ++j) d_x[j] = y[j] * (grad[j] - mean) * inverse_tau;
}

// In passes over a few rows, as softmax_group.
template <typename T>
void gradient_rows(const GumbelRows& rows, const T* grad, const T* y, T* d_x, double* d_tau) {
  const int64_t cols = rows.cols, fit = kSoftmaxBlock / cols;
  const int64_t group = fit < 1 ? 1 : fit < kGroupRows ? fit : kGroupRows;
  for (int64_t first = 0; first < rows.rows; first += group) {
    const int64_t end = first + group < rows.rows ? first + group : rows.rows;
    T means[kGroupRows];
    for (int64_t r = first; r < end; ++r) {
      means[r - first] = static_cast<T>(dot(y + r * cols, grad + r * cols, cols));
    }
    for (int64_t r = first; r < end; ++r) {
      const int64_t at = r * cols;
      const T mean = means[r - first];
      if (d_tau) d_tau[r] = tau_sum(grad + at, y + at, cols, mean) * rows.inverse_tau;
      softmax_gradient_row(grad + at, y + at, d_x + at, cols, mean,
                           static_cast<T>(rows.inverse_tau));
    }
  }
}

}  // namespace

void gumbel_softmax(const GumbelRows& rows, const void* x, void* y, SoftmaxPart* parts) {
  const FlushDenormals flush;
  rows.is_double ? softmax_rows(rows, static_cast<const double*>(x), static_cast<double*>(y), parts)
                 : softmax_rows(rows, static_cast<const float*>(x), static_cast<float*>(y), parts);
}

SoftmaxPart softmax_block(const GumbelRows& row, int64_t col, const float* x, float* y) {
  const FlushDenormals flush;
  return exponentials_of({row.seed, row.first_row}, x, y, col, row.cols,
                         static_cast<float>(row.inverse_tau));
}

// Of a row of only -inf: NaN.
void softmax_factors(SoftmaxPart* parts, int64_t blocks, double inverse_tau) {
  float max = -INFINITY;
  for (int64_t b = 0; b < blocks; ++b) max = Largest()(parts[b].max, max);
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const double above = static_cast<double>(parts[b].max) - max;
    const double weight = parts[b].max == max && max > -INFINITY ? 1 : ::exp(above * inverse_tau);
    total += parts[b].sum * weight;
    parts[b].sum = weight;
  }
  for (int64_t b = 0; b < blocks; ++b) parts[b].sum /= total;
}

void softmax_scale(float* y, int64_t cols, double factor) {
  const FlushDenormals flush;
  scale(y, cols, static_cast<float>(factor));
}

double softmax_dot(const float* y, const float* grad, int64_t cols) {
  const FlushDenormals flush;
  return dot_block(y, grad, cols);
}

void softmax_gradient_block(const GumbelRows& row, const float* grad, const float* y, double dot,
                            float* d_x, double* d_tau) {
  const FlushDenormals flush;
  const float mean = static_cast<float>(dot);
  if (d_tau) *d_tau = tau_sum(grad, y, row.cols, mean);
  softmax_gradient_row(grad, y, d_x, row.cols, mean, static_cast<float>(row.inverse_tau));
}

void softmax_gradient(const GumbelRows& rows, const void* grad, const void* y, void* d_x,
                      double* d_tau) {
  const FlushDenormals flush;
  rows.is_double ? gradient_rows(rows, static_cast<const double*>(grad),
                                 static_cast<const double*>(y), static_cast<double*>(d_x), d_tau)
                 : gradient_rows(rows, static_cast<const float*>(grad),
                                 static_cast<const float*>(y), static_cast<float*>(d_x), d_tau);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
