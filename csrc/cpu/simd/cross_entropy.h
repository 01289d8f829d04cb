// Vector kernels of cross entropies: sums of exponentials, then gradients. Of the rows of a block
// of logits, each of which chooses among the columns; where `kBoth`, of its columns as well.
#pragma once

#include <c10/util/BFloat16.h>
#include <math.h>

#include "cross_entropy_block.h"
#include "lane_math.h"
#include "line.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {  // inlined as in a file of their own

// Logits of a row; -inf in the last lanes.
template <typename T>
TILEWISE_INLINE void read_row(const CrossEntropyBlock& block, int64_t i, Line<T>& z) {
  read_logits(static_cast<const T*>(block.dots) + i * block.stride, block.cols, padded(block.cols),
              block.scale, z);
}

// The largest logit of a row.
TILEWISE_INLINE float largest(const Line<float>& z, int64_t cols) {
  Floats row = Floats::all(-INFINITY);
  for_lanes(cols, [&](int64_t j) { row = higher(Floats::load(z.at + j), row); });
  return fold(row, Largest());
}

TILEWISE_INLINE double largest(const Line<double>& z, int64_t cols) {
  double row = -INFINITY;
  for (int64_t j = 0; j < cols; ++j) row = z.at[j] > row ? z.at[j] : row;
  return row;
}

// The same; raises those of the columns to the row's.
TILEWISE_INLINE float maxima(const Line<float>& z, int64_t cols, Line<float>& max) {
  Floats row = Floats::all(-INFINITY);
  for_lanes(cols, [&](int64_t j) {
    const Floats v = Floats::load(z.at + j);
    row = higher(v, row);
    higher(v, Floats::load(max.at + j)).store(max.at + j);
  });
  return fold(row, Largest());
}

TILEWISE_INLINE double maxima(const Line<double>& z, int64_t cols, Line<double>& max) {
  double row = -INFINITY;
  for (int64_t j = 0; j < cols; ++j) {
    row = z.at[j] > row ? z.at[j] : row;
    max.at[j] = z.at[j] > max.at[j] ? z.at[j] : max.at[j];
  }
  return row;
}

// The columns' sums of exponentials, relative to `base`. See lane_sum.h for the roundings: eight
// rows are added in float32, which every column meets, and what they give in float64.
template <typename T>
struct ColumnSums {
  static constexpr int64_t kRows = 8;
  Line<T> base;
  Line<float> part;
  Line<double> total;

  TILEWISE_INLINE void flush(int64_t cols) {
    for_lanes(cols, [&](int64_t j) {
      for (int64_t k = j; k < j + kLanes; k += 8) {
        (Lanes::load(total.at + k) + widen(part.at + k)).store(total.at + k);
      }
      Floats::all(0.0f).store(part.at + j);
    });
  }
  double value(int64_t j) const { return total.at[j]; }
};

template <>
struct ColumnSums<double> {
  static constexpr int64_t kRows = 1;
  Line<double> base;
  Sum total[kMaxBlockCols];

  void flush(int64_t) {}
  double value(int64_t j) const { return total[j].value(); }
};

// The sum of a row's exponentials.
TILEWISE_INLINE double sums(const Line<float>& z, int64_t cols, float base) {
  return sum_lanes(
      cols, [&](int64_t j) { return exp_nonpositive(Floats::load(z.at + j) - Floats::all(base)); });
}

TILEWISE_INLINE double sums(const Line<double>& z, int64_t cols, double base) {
  Sum row;
  for (int64_t j = 0; j < cols; ++j) row.add(::exp(z.at[j] - base));
  return row.value();
}

// The same; adds to those of the columns.
TILEWISE_INLINE double sums(const Line<float>& z, int64_t cols, float base,
                            ColumnSums<float>& of_cols) {
  return sum_lanes(cols, [&](int64_t j) {
    const Floats v = Floats::load(z.at + j);
    const Floats e = exp_nonpositive(v - Floats::load(of_cols.base.at + j));
    (Floats::load(of_cols.part.at + j) + e).store(of_cols.part.at + j);
    return exp_nonpositive(v - Floats::all(base));
  });
}

TILEWISE_INLINE double sums(const Line<double>& z, int64_t cols, double base,
                            ColumnSums<double>& of_cols) {
  Sum row;
  for (int64_t j = 0; j < cols; ++j) {
    row.add(::exp(z.at[j] - base));
    of_cols.total[j].add(::exp(z.at[j] - of_cols.base.at[j]));
  }
  return row.value();
}

// Weighted probabilities: of the row, or of the row and the columns.
template <typename T, bool kBoth>
struct Softmax {
  T row_largest, row_factor;

  void read_columns(const CrossEntropyBlock&, int64_t) {}
};

template <typename T>
struct Softmax<T, true> : Softmax<T, false> {
  Line<T> largest, factor;  // of the columns

  TILEWISE_INLINE void read_columns(const CrossEntropyBlock& block, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const LogSum sums = j < block.cols ? block.col.sums[j] : LogSum();
      const double weight = j < block.cols ? block.col.weight[j] : 0;
      largest.at[j] = static_cast<T>(base_of(sums.largest));
      factor.at[j] = weight == 0 ? 0 : weight / sums.sum;
    }
  }
};

TILEWISE_INLINE void probabilities(const Line<float>& z, int64_t cols,
                                   const Softmax<float, false>& s, Line<float>& dz) {
  for_lanes(cols, [&](int64_t j) {
    const Floats p = exp_nonpositive(Floats::load(z.at + j) - Floats::all(s.row_largest));
    (p * Floats::all(s.row_factor)).store(dz.at + j);
  });
}

TILEWISE_INLINE void probabilities(const Line<double>& z, int64_t cols,
                                   const Softmax<double, false>& s, Line<double>& dz) {
  for (int64_t j = 0; j < cols; ++j) {
    dz.at[j] = ::exp(z.at[j] - s.row_largest) * s.row_factor;
  }
}

TILEWISE_INLINE void probabilities(const Line<float>& z, int64_t cols,
                                   const Softmax<float, true>& s, Line<float>& dz) {
  for_lanes(cols, [&](int64_t j) {
    const Floats v = Floats::load(z.at + j);
    const Floats p = exp_nonpositive(v - Floats::all(s.row_largest));
    const Floats q = exp_nonpositive(v - Floats::load(s.largest.at + j));
    multiply_add(p, Floats::all(s.row_factor), q * Floats::load(s.factor.at + j)).store(dz.at + j);
  });
}

TILEWISE_INLINE void probabilities(const Line<double>& z, int64_t cols,
                                   const Softmax<double, true>& s, Line<double>& dz) {
  for (int64_t j = 0; j < cols; ++j) {
    dz.at[j] = ::exp(z.at[j] - s.row_largest) * s.row_factor +
               ::exp(z.at[j] - s.largest.at[j]) * s.factor.at[j];
  }
}

// Calls f(j, target) for the matches of row i: their targets beyond those that every pair has.
template <bool kBoth, typename F>
TILEWISE_INLINE void for_matches(const CrossEntropyBlock& block, int64_t i, const F& f) {
  for (int64_t p = block.begin[i]; p < block.begin[i + 1]; ++p) {
    const int64_t j = block.positives[p];
    f(j, kBoth ? block.row.target[i] + block.col.target[j] : block.row.target[i]);
  }
}

// The target that every pair has.
template <bool kBoth>
TILEWISE_INLINE double smooth_target(const CrossEntropyBlock& block, int64_t i, int64_t j) {
  const double target = block.row.weight[i] * block.row.smoothing;
  return kBoth ? target + block.col.weight[j] * block.col.smoothing : target;
}

template <bool kBoth>
TILEWISE_INLINE bool smooth(const CrossEntropyBlock& block) {
  return block.row.smoothing != 0 || (kBoth && block.col.smoothing != 0);
}

// Adds the targets times the logits of a row.
template <bool kBoth, typename T>
TILEWISE_INLINE void add_targets(const CrossEntropyBlock& block, int64_t i, const Line<T>& z,
                                 Sum& total) {
  for_matches<kBoth>(block, i, [&](int64_t j, double target) { total.add(target * z.at[j]); });
  if (!smooth<kBoth>(block)) return;
  for (int64_t j = 0; j < block.cols; ++j) total.add(smooth_target<kBoth>(block, i, j) * z.at[j]);
}

template <typename T>
double row_log_sums(const CrossEntropyBlock& block, LogSum* rows) {
  Line<T> z;
  const int64_t n = padded(block.cols);
  Sum total;
  for (int64_t i = 0; i < block.rows; ++i) {
    read_row(block, i, z);
    const T row = largest(z, n);
    rows[i] = {row, sums(z, n, base_of(row))};
    add_targets<false>(block, i, z, total);
  }
  return total.value();
}

template <typename T>
double log_sums(const CrossEntropyBlock& block, LogSum* rows, LogSum* cols) {
  Line<T> z, max;
  ColumnSums<T> sum{};
  const int64_t n = padded(block.cols);
  for (int64_t j = 0; j < n; ++j) max.at[j] = -INFINITY;
  Sum total;
  for (int64_t i = 0; i < block.rows; ++i) {
    read_row(block, i, z);
    rows[i].largest = maxima(z, n, max);
    add_targets<true>(block, i, z, total);
  }
  for (int64_t j = 0; j < n; ++j) sum.base.at[j] = base_of(max.at[j]);
  for (int64_t i = 0; i < block.rows; ++i) {
    read_row(block, i, z);
    rows[i].sum = sums(z, n, static_cast<T>(base_of(rows[i].largest)), sum);
    if ((i + 1) % sum.kRows == 0) sum.flush(n);
  }
  sum.flush(n);
  for (int64_t j = 0; j < block.cols; ++j) cols[j] = {max.at[j], sum.value(j)};
  return total.value();
}

// The sum of dz * dot over a row.
TILEWISE_INLINE double dot_with(const Line<float>& dz, const float* dots, int64_t cols) {
  const int64_t whole = cols / kLanes * kLanes;
  double total =
      sum_lanes(whole, [&](int64_t j) { return Floats::load(dz.at + j) * Floats::load(dots + j); });
  for (int64_t j = whole; j < cols; ++j) total += static_cast<double>(dz.at[j]) * dots[j];
  return total;
}

TILEWISE_INLINE double dot_with(const Line<double>& dz, const double* dots, int64_t cols) {
  Sum total;
  for (int64_t j = 0; j < cols; ++j) total.add(dz.at[j] * dots[j]);
  return total.value();
}

template <bool kBoth, typename T, typename G>
double gradient(const CrossEntropyBlock& block, G* grads, int64_t stride) {
  Line<T> z, dz;
  Softmax<T, kBoth> s;
  const int64_t n = padded(block.cols);
  s.read_columns(block, n);
  const T scale = static_cast<T>(block.scale);
  Sum dz_dot;
  for (int64_t i = 0; i < block.rows; ++i) {
    read_row(block, i, z);
    const LogSum& row = block.row.sums[i];
    s.row_largest = static_cast<T>(base_of(row.largest));
    s.row_factor = static_cast<T>(block.row.weight[i] == 0 ? 0 : block.row.weight[i] / row.sum);
    probabilities(z, n, s, dz);
    for_matches<kBoth>(block, i, [&](int64_t j, double t) { dz.at[j] -= static_cast<T>(t); });
    if (smooth<kBoth>(block)) {
      for (int64_t j = 0; j < block.cols; ++j) {
        dz.at[j] -= static_cast<T>(smooth_target<kBoth>(block, i, j));
      }
    }
    const T* dots = static_cast<const T*>(block.dots) + i * block.stride;
    dz_dot.add(dot_with(dz, dots, block.cols));
    G* out = grads + i * stride;
    for (int64_t j = 0; j < block.cols; ++j) out[j] = static_cast<G>(dz.at[j] * scale);
  }
  return dz_dot.value();
}

// The kernels of a loss: see CrossEntropyKernels.
template <bool kBoth>
double log_sums_of(const CrossEntropyBlock& block, LogSum* rows, LogSum* cols) {
  const FlushDenormals flush;
  if constexpr (kBoth) {
    return block.is_double ? log_sums<double>(block, rows, cols)
                           : log_sums<float>(block, rows, cols);
  }
  return block.is_double ? row_log_sums<double>(block, rows) : row_log_sums<float>(block, rows);
}

template <bool kBoth>
double gradient_of(const CrossEntropyBlock& block, void* grads, int64_t stride, bool bfloat16) {
  const FlushDenormals flush;
  if (block.is_double) return gradient<kBoth, double>(block, static_cast<double*>(grads), stride);
  if (bfloat16) return gradient<kBoth, float>(block, static_cast<c10::BFloat16*>(grads), stride);
  return gradient<kBoth, float>(block, static_cast<float*>(grads), stride);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace tilewise
