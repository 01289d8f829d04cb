// Vector kernel of gaussian_sample: sample and divergence in one pass, and their gradients.
#include "gaussian_sample.h"

#include <math.h>

#include "lane_sum.h"
#include "noise.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

// Of a log variance v: the deviation exp(v / 2), and exp(v) - 1 and exp(v) - 1 - v without
// cancellation.
template <typename V>
struct Spread {
  V deviation, excess, gap;
};

TILEWISE_INLINE Spread<Floats> spread(const Floats& v) {
  const Floats one = Floats::all(1.0f), half = v * Floats::all(0.5f);
  const Reduced x = reduce(lower(Floats::all(89.0f), higher(Floats::all(-88.0f), half)));
  // exp(r) = 1 + a
  const Floats rest = polynomial(x.r, {1.38145986e-3f, 8.36871698e-3f, 4.16683881e-2f,
                                       1.66665206e-1f, 4.99999934e-1f}) *
                      (x.r * x.r);
  const Floats a = x.r + rest;
  const Floats n = lower(x.n, Floats::all(127.0f));  // the others in two steps
  Spread<Floats> out;
  out.deviation = times_power_of_two(times_power_of_two(one + a, n), x.n - n);
  const Floats square = out.deviation * out.deviation;
  // Where n = 0, exp(v) = (1 + a)^2 and v = 2 r.
  const Ints is_near = if_less(x.n * x.n, one, Ints::all(-1), Ints::all(0));
  const auto choose = [&](const Floats& near, const Floats& far) {
    return ((near.as<Ints>() & is_near) | (far.as<Ints>() & (is_near ^ -1))).as<Floats>();
  };
  out.excess = choose(multiply_add(a, a, a + a), square - one);
  out.gap = choose(multiply_add(a, a, rest + rest), square - one - v);
  return out;
}

TILEWISE_INLINE Spread<double> spread(double v) {
  const double excess = ::expm1(v);
  return {::exp(v / 2), excess, excess - v};
}

TILEWISE_INLINE Floats clamped(const Floats& v, const GaussianRows& rows) {
  return lower(Floats::all(static_cast<float>(rows.high)),
               higher(Floats::all(static_cast<float>(rows.low)), v));  // NaN passes
}

TILEWISE_INLINE double clamped(double v, const GaussianRows& rows) {
  return v < rows.low ? rows.low : v > rows.high ? rows.high : v;
}

// Samples of 32 columns; term: twice their divergences.
TILEWISE_INLINE void sample_step(const GaussianRows& rows, NoiseRow noise, int64_t col,
                                 const float* mean, const float* logvar, float* z,
                                 Floats (&term)[2]) {
  Floats n[2];
  normal_columns(noise, rows.first_col + col, n);
  for (int i = 0; i < 2; ++i) {
    const Floats m = Floats::load(mean + 16 * i);
    const Spread<Floats> s = spread(clamped(Floats::load(logvar + 16 * i), rows));
    multiply_add(s.deviation, n[i], m).store(z + 16 * i);
    term[i] = multiply_add(m, m, s.gap);
  }
}

double sample_block(const GaussianRows& rows, NoiseRow noise, const float* mean,
                    const float* logvar, float* z) {
  LaneSum<Floats> sum;
  Floats term[2];
  int64_t col = 0;
  for (; col + kStep <= rows.cols; col += kStep) {
    sample_step(rows, noise, col, mean + col, logvar + col, z + col, term);
    sum.add(term[0] + term[1]);
  }
  double total = sum.value();
  if (const int64_t left = rows.cols - col) {
    float m[kStep], v[kStep], out[kStep], terms[kStep];
    sample_step(rows, noise, col, step_at(mean + col, left, 0.0f, m),
                step_at(logvar + col, left, 0.0f, v), out, term);
    for (int i = 0; i < 2; ++i) term[i].store(terms + 16 * i);
    for (int64_t i = 0; i < left; ++i) {
      z[col + i] = out[i];
      total += terms[i];
    }
  }
  return total / 2;
}

double sample_block(const GaussianRows& rows, NoiseRow noise, const double* mean,
                    const double* logvar, double* z) {
  Sum total;
  for (int64_t col = 0; col < rows.cols; col += kStep) {
    float n[kStep];
    normal_step(noise, rows.first_col + col, n);
    for (int64_t i = col; i < rows.cols && i < col + kStep; ++i) {
      const Spread<double> s = spread(clamped(logvar[i], rows));
      z[i] = mean[i] + s.deviation * n[i - col];
      total.add(mean[i] * mean[i] + s.gap);
    }
  }
  return total.value() / 2;
}

// Gradients of 32 columns.
TILEWISE_INLINE void gradient_step(const GaussianRows& rows, NoiseRow noise, int64_t col,
                                   const float* d_z, float d_kl, const float* mean,
                                   const float* logvar, float* d_mean, float* d_logvar) {
  Floats n[2];
  normal_columns(noise, rows.first_col + col, n);
  const Floats half = Floats::all(0.5f), g = Floats::all(d_kl);
  for (int i = 0; i < 2; ++i) {
    const Floats v = Floats::load(logvar + 16 * i), inside = clamped(v, rows);
    const Spread<Floats> s = spread(inside);
    const Floats d = d_z ? Floats::load(d_z + 16 * i) : Floats::all(0.0f);
    multiply_add(g, Floats::load(mean + 16 * i), d).store(d_mean + 16 * i);
    // Halved first: what has room for the result has room for all of this.
    const Floats d_v = multiply_add(g * half, s.excess, d * half * n[i] * s.deviation);
    const Floats zero = Floats::all(0.0f);
    if_less(v, inside, zero, if_less(inside, v, zero, d_v)).store(d_logvar + 16 * i);
  }
}

void gradient_row(const GaussianRows& rows, NoiseRow noise, const float* d_z, double d_kl,
                  const float* mean, const float* logvar, float* d_mean, float* d_logvar) {
  const float g = static_cast<float>(d_kl);
  int64_t col = 0;
  for (; col + kStep <= rows.cols; col += kStep) {
    gradient_step(rows, noise, col, d_z ? d_z + col : nullptr, g, mean + col, logvar + col,
                  d_mean + col, d_logvar + col);
  }
  if (const int64_t left = rows.cols - col) {
    float d[kStep], m[kStep], v[kStep], out[2][kStep];
    gradient_step(rows, noise, col, d_z ? step_at(d_z + col, left, 0.0f, d) : nullptr, g,
                  step_at(mean + col, left, 0.0f, m), step_at(logvar + col, left, 0.0f, v), out[0],
                  out[1]);
    for (int64_t i = 0; i < left; ++i) {
      d_mean[col + i] = out[0][i];
      d_logvar[col + i] = out[1][i];
    }
  }
}

void gradient_row(const GaussianRows& rows, NoiseRow noise, const double* d_z, double d_kl,
                  const double* mean, const double* logvar, double* d_mean, double* d_logvar) {
  for (int64_t col = 0; col < rows.cols; col += kStep) {
    float n[kStep];
    normal_step(noise, rows.first_col + col, n);
    for (int64_t i = col; i < rows.cols && i < col + kStep; ++i) {
      const double inside = clamped(logvar[i], rows), d = d_z ? d_z[i] : 0;
      const Spread<double> s = spread(inside);
      d_mean[i] = d + d_kl * mean[i];
      const double d_v = d / 2 * n[i - col] * s.deviation + d_kl / 2 * s.excess;
      d_logvar[i] = inside != logvar[i] && logvar[i] == logvar[i] ? 0 : d_v;
    }
  }
}

template <typename T>
double sample_row(const GaussianRows& rows, NoiseRow noise, const T* mean, const T* logvar, T* z) {
  double total = 0;
  for (int64_t col = 0; col < rows.cols; col += kGaussianBlock) {
    GaussianRows block = rows;
    block.first_col += col;
    block.cols = rows.cols - col < kGaussianBlock ? rows.cols - col : kGaussianBlock;
    total += sample_block(block, noise, mean + col, logvar + col, z + col);
  }
  return total;
}

template <typename T>
void sample_rows(const GaussianRows& rows, const T* mean, const T* logvar, T* z, double* kl) {
  const FlushDenormals flush;
  for (int64_t r = 0; r < rows.rows; ++r) {
    const int64_t at = r * rows.cols;
    kl[r] = sample_row(rows, {rows.seed, rows.first_row + r}, mean + at, logvar + at, z + at);
  }
}

template <typename T>
void gradient_rows(const GaussianRows& rows, const T* d_z, const double* d_kl, const T* mean,
                   const T* logvar, T* d_mean, T* d_logvar) {
  const FlushDenormals flush;
  for (int64_t r = 0; r < rows.rows; ++r) {
    const int64_t at = r * rows.cols;
    gradient_row(rows, {rows.seed, rows.first_row + r}, d_z ? d_z + at : nullptr,
                 d_kl ? d_kl[r] : 0, mean + at, logvar + at, d_mean + at, d_logvar + at);
  }
}

}  // namespace

void gaussian_sample(const GaussianRows& rows, const void* mean, const void* logvar, void* z,
                     double* kl) {
  rows.is_double ? sample_rows(rows, static_cast<const double*>(mean),
                               static_cast<const double*>(logvar), static_cast<double*>(z), kl)
                 : sample_rows(rows, static_cast<const float*>(mean),
                               static_cast<const float*>(logvar), static_cast<float*>(z), kl);
}

void gaussian_gradient(const GaussianRows& rows, const void* d_z, const double* d_kl,
                       const void* mean, const void* logvar, void* d_mean, void* d_logvar) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    gradient_rows(rows, static_cast<const T*>(d_z), d_kl, static_cast<const T*>(mean),
                  static_cast<const T*>(logvar), static_cast<T*>(d_mean),
                  static_cast<T*>(d_logvar));
  };
  rows.is_double ? run(0.0) : run(0.0f);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
