// Vector kernels of clip_loss: sums of exponentials by row and column, then their gradients.
#include "clip_loss.h"

#include <math.h>

#include "lane_math.h"
#include "line.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

// Logits of a row; -inf in the last lanes.
template <typename T>
TILEWISE_INLINE void read_row(const ClipBlock& block, int64_t i, Line<T>& z) {
  read_logits(static_cast<const T*>(block.dots) + i * block.stride, block.cols, padded(block.cols),
              block.scale, z);
}

// The largest logit of a row; raises those of the columns to the row's.
TILEWISE_INLINE float maxima(const Line<float>& z, int64_t cols, Line<float>& most) {
  Floats row = Floats::all(-INFINITY);
  for_lanes(cols, [&](int64_t j) {
    const Floats v = Floats::load(z.at + j);
    row = higher(v, row);
    higher(v, Floats::load(most.at + j)).store(most.at + j);
  });
  return fold(row, Largest());
}

TILEWISE_INLINE double maxima(const Line<double>& z, int64_t cols, Line<double>& most) {
  double row = -INFINITY;
  for (int64_t j = 0; j < cols; ++j) {
    row = z.at[j] > row ? z.at[j] : row;
    most.at[j] = z.at[j] > most.at[j] ? z.at[j] : most.at[j];
  }
  return row;
}

// The sum of a row's exponentials; adds to those of the columns.
TILEWISE_INLINE float sums(const Line<float>& z, int64_t cols, float row_most,
                           const Line<float>& most, Line<float>& sum) {
  Floats row = Floats::all(0.0f);
  for_lanes(cols, [&](int64_t j) {
    const Floats v = Floats::load(z.at + j);
    row = row + exp_nonpositive(v - Floats::all(row_most));
    const Floats e = exp_nonpositive(v - Floats::load(most.at + j));
    (Floats::load(sum.at + j) + e).store(sum.at + j);
  });
  return fold(row, Add());
}

TILEWISE_INLINE double sums(const Line<double>& z, int64_t cols, double row_most,
                            const Line<double>& most, Line<double>& sum) {
  double row = 0;
  for (int64_t j = 0; j < cols; ++j) {
    row += ::exp(z.at[j] - row_most);
    sum.at[j] += ::exp(z.at[j] - most.at[j]);
  }
  return row;
}

// The weighted probabilities of both directions, of the row and of the columns.
template <typename T>
struct Softmax {
  Line<T> largest, factor;  // of the columns
  T row_largest, row_factor;
};

TILEWISE_INLINE void probabilities(const Line<float>& z, int64_t cols, const Softmax<float>& s,
                                   Line<float>& dz) {
  for_lanes(cols, [&](int64_t j) {
    const Floats v = Floats::load(z.at + j);
    const Floats p = exp_nonpositive(v - Floats::all(s.row_largest));
    const Floats q = exp_nonpositive(v - Floats::load(s.largest.at + j));
    multiply_add(p, Floats::all(s.row_factor), q * Floats::load(s.factor.at + j)).store(dz.at + j);
  });
}

TILEWISE_INLINE void probabilities(const Line<double>& z, int64_t cols, const Softmax<double>& s,
                                   Line<double>& dz) {
  for (int64_t j = 0; j < cols; ++j) {
    dz.at[j] = ::exp(z.at[j] - s.row_largest) * s.row_factor +
               ::exp(z.at[j] - s.largest.at[j]) * s.factor.at[j];
  }
}

// Targets of every pair of row i, less those of the matches.
template <typename T, typename F>
TILEWISE_INLINE void for_matches(const ClipBlock& block, int64_t i, const F& f) {
  for (int64_t p = block.begin[i]; p < block.begin[i + 1]; ++p) {
    const int64_t j = block.positives[p];
    f(j, block.row.target[i] + block.col.target[j]);
  }
}

TILEWISE_INLINE double smooth_target(const ClipBlock& block, int64_t i, int64_t j) {
  return block.row.weight[i] * block.row.smoothing + block.col.weight[j] * block.col.smoothing;
}

// The sum of targets times logits of a row.
template <typename T>
TILEWISE_INLINE double targets(const ClipBlock& block, int64_t i, const Line<T>& z) {
  double total = 0;
  for_matches<T>(block, i, [&](int64_t j, double target) { total += target * z.at[j]; });
  if (block.row.smoothing == 0 && block.col.smoothing == 0) return total;
  for (int64_t j = 0; j < block.cols; ++j) total += smooth_target(block, i, j) * z.at[j];
  return total;
}

template <typename T>
double log_sums(const ClipBlock& block, LogSum* rows, LogSum* cols) {
  Line<T> z, most, sum;
  const int64_t n = padded(block.cols);
  for (int64_t j = 0; j < n; ++j) {
    most.at[j] = -INFINITY;
    sum.at[j] = 0;
  }
  double total = 0;
  for (int64_t i = 0; i < block.rows; ++i) {
    read_row(block, i, z);
    rows[i].largest = maxima(z, n, most);
    total += targets(block, i, z);
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    read_row(block, i, z);
    rows[i].sum = sums(z, n, static_cast<T>(rows[i].largest), most, sum);
  }
  for (int64_t j = 0; j < block.cols; ++j) cols[j] = {most.at[j], sum.at[j]};
  return total;
}

// What exponentials are relative to. Where all logits are -inf any base will do, and -inf less -inf
// would be NaN.
TILEWISE_INLINE double base(const LogSum& sums) {
  return sums.largest == -INFINITY ? 0 : sums.largest;
}

template <typename T, typename G>
double gradient(const ClipBlock& block, G* grads, int64_t stride) {
  Line<T> z, dz;
  Softmax<T> s;
  const int64_t n = padded(block.cols);
  for (int64_t j = 0; j < n; ++j) {
    const LogSum sums = j < block.cols ? block.col.sums[j] : LogSum();
    const double weight = j < block.cols ? block.col.weight[j] : 0;
    s.largest.at[j] = base(sums);
    s.factor.at[j] = weight == 0 ? 0 : weight / sums.sum;
  }
  const bool smooth = block.row.smoothing != 0 || block.col.smoothing != 0;
  const T scale = static_cast<T>(block.scale);
  double dz_dot = 0;
  for (int64_t i = 0; i < block.rows; ++i) {
    read_row(block, i, z);
    const LogSum& row = block.row.sums[i];
    s.row_largest = static_cast<T>(base(row));
    s.row_factor = static_cast<T>(block.row.weight[i] == 0 ? 0 : block.row.weight[i] / row.sum);
    probabilities(z, n, s, dz);
    for_matches<T>(block, i, [&](int64_t j, double t) { dz.at[j] -= static_cast<T>(t); });
    if (smooth) {
      for (int64_t j = 0; j < block.cols; ++j) {
        dz.at[j] -= static_cast<T>(smooth_target(block, i, j));
      }
    }
    const T* dots = static_cast<const T*>(block.dots) + i * block.stride;
    T lanes[kLanes] = {};
    for (int64_t j = 0; j + kLanes <= block.cols; j += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] += dz.at[j + k] * dots[j + k];
    }
    for (int64_t j = block.cols / kLanes * kLanes; j < block.cols; ++j) {
      lanes[j % kLanes] += dz.at[j] * dots[j];
    }
    for (const T lane : lanes) dz_dot += lane;
    G* out = grads + i * stride;
    for (int64_t j = 0; j < block.cols; ++j) out[j] = static_cast<G>(dz.at[j] * scale);
  }
  return dz_dot;
}

}  // namespace

double clip_log_sums(const ClipBlock& block, LogSum* rows, LogSum* cols) {
  const FlushDenormals flush;
  return block.is_double ? log_sums<double>(block, rows, cols) : log_sums<float>(block, rows, cols);
}

double clip_gradient(const ClipBlock& block, void* grads, int64_t stride, bool bfloat16) {
  const FlushDenormals flush;
  if (block.is_double) return gradient<double>(block, static_cast<double*>(grads), stride);
  if (bfloat16) return gradient<float>(block, static_cast<c10::BFloat16*>(grads), stride);
  return gradient<float>(block, static_cast<float*>(grads), stride);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
