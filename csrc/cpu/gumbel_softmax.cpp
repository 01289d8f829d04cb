// tilewise::gumbel_softmax and its gradient on CPU: checks and memory. The vector kernel is
// in simd/gumbel_softmax.cpp.
#include "simd/gumbel_softmax.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/integer.h"
#include "../common/registration.h"
#include "../common/sum.h"
#include "arguments.h"
#include "pages.h"
#include "rows_along.h"
#include "simd/gumbel_argmax.h"

namespace tilewise {
namespace {

using at::Tensor;

double checked_tau(const Tensor& tau) {
  const double value = one_element("tau", tau);
  TORCH_CHECK_VALUE(!(value < 0), "tau: expected at least 0, got ", value);
  return value;
}

GumbelRows rows_of(const Piece& piece, const RowsAlong& shape, at::ScalarType type, uint64_t seed,
                   int64_t row_offset, double tau) {
  const bool is_double = type == at::kDouble;
  // At the limits 0 / tau stays 0 and -infinity / tau stays -infinity.
  const double low = is_double ? DBL_MIN : FLT_MIN, high = is_double ? DBL_MAX : FLT_MAX;
  const double inverse = std::isnan(tau) ? tau : std::clamp(1 / tau, low, high);
  return {is_double, piece.count, shape.cols, seed, noise_row(piece.first, row_offset), inverse};
}

// The columns' blocks, whose maxima the kernel notes.
int64_t blocks(const RowsAlong& shape) { return ceil_div(shape.cols, kSoftmaxBlock); }

Tensor relaxed(const Tensor& logits, const RowsAlong& shape, double tau, uint64_t seed,
               int64_t row_offset) {
  const Tensor y = at::empty_like(logits, logits.options(), at::MemoryFormat::Contiguous);
  const at::ScalarType type = compute_type(logits);
  for_pieces(shape, type, {logits}, {y}, [&](const Piece& piece) {
    std::vector<float> maxima(blocks(shape));
    TILEWISE_DISPATCH(gumbel_softmax)
    (rows_of(piece, shape, type, seed, row_offset, tau), piece.inputs[0], piece.outputs[0],
     maxima.data());
  });
  return y;
}

// Only indices are computed; the rest is 0, which is written here for rows that lie in a piece.
template <typename T>
void one_hot(const Tensor& logits, const RowsAlong& shape, uint64_t seed, int64_t row_offset,
             const Tensor& y) {
  T* out = y.mutable_data_ptr<T>();
  const at::ScalarType type = compute_type(logits);
  for_pieces(shape, type, {logits}, {}, [&](const Piece& piece) {
    const ArgmaxRows rows{type == at::kDouble,
                          piece.inputs[0],
                          piece.count,
                          shape.cols,
                          1,
                          seed,
                          noise_row(piece.first, row_offset)};
    if (shape.inner == 1) {
      const int64_t bytes = piece.count * shape.cols * static_cast<int64_t>(sizeof(T));
      fetch_pages(out + piece.first * shape.cols, bytes);
      std::memset(static_cast<void*>(out + piece.first * shape.cols), 0, bytes);
    }
    std::vector<int64_t> index(piece.count);
    Perturbed heap;
    TILEWISE_DISPATCH(gumbel_argmax)(rows, &heap, index.data(), nullptr, true);
    for (int64_t i = 0; i < piece.count; ++i) {
      const int64_t row = piece.first + i;
      T* first = out + row / shape.inner * shape.cols * shape.inner + row % shape.inner;
      if (index[i] >= 0) {
        first[index[i] * shape.inner] = 1;
        continue;
      }
      for (int64_t col = 0; col < shape.cols; ++col) first[col * shape.inner] = NAN;
    }
  });
}

Tensor one_hot(const Tensor& logits, const RowsAlong& shape, uint64_t seed, int64_t row_offset) {
  const Tensor y = shape.inner == 1 ? at::empty(logits.sizes(), logits.options())
                                    : at::zeros(logits.sizes(), logits.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, y.scalar_type(), "one_hot",
                                  [&] { one_hot<scalar_t>(logits, shape, seed, row_offset, y); });
  return y;
}

// See pyext/tilewise/ops/gumbel_softmax.py.
Tensor gumbel_softmax(const Tensor& logits, const Tensor& tau, const Tensor& seed,
                      int64_t row_offset, int64_t dim, bool hard) {
  const BelowAutograd below;
  const RowsAlong shape = rows_along("logits", logits, dim);
  const double t = checked_tau(tau);
  const uint64_t key = random_key(seed);
  return hard || t == 0 ? one_hot(logits, shape, key, row_offset)
                        : relaxed(logits, shape, t, key, row_offset);
}

// saved: the relaxed sample, or the logits if `hard`.
std::tuple<Tensor, Tensor> gumbel_softmax_backward(const Tensor& grad, const Tensor& saved,
                                                   const Tensor& tau, const Tensor& seed,
                                                   int64_t row_offset, int64_t dim, bool hard,
                                                   bool need_tau) {
  const BelowAutograd below;
  const RowsAlong shape = rows_along("saved", saved, dim);
  TORCH_CHECK_VALUE(grad.sizes() == saved.sizes(), "grad: expected ", saved.sizes(), ", got ",
                    grad.sizes());
  const double t = checked_tau(tau);
  const uint64_t key = random_key(seed);
  const at::ScalarType type = compute_type(saved);
  const Tensor d_logits = at::empty_like(saved, saved.options(), at::MemoryFormat::Contiguous);
  std::vector<double> d_tau(need_tau ? shape.rows() : 0);
  for_pieces(shape, type, {grad, saved}, {d_logits}, [&](const Piece& piece) {
    const GumbelRows rows = rows_of(piece, shape, type, key, row_offset, t);
    std::vector<float> maxima(blocks(shape));
    const auto differentiate = [&](const GumbelRows& part, int64_t row, const void* g,
                                   const void* y, void* d_x) {
      GumbelRows scaled = part;
      if (t == 0) scaled.inverse_tau = 0;  // the limit is constant, even where a tie shares y
      TILEWISE_DISPATCH(softmax_gradient)
      (scaled, g, y, d_x, need_tau ? d_tau.data() + row : nullptr);
    };
    if (!hard) {
      differentiate(rows, piece.first, piece.inputs[0], piece.inputs[1], piece.outputs[0]);
      return;
    }
    // The relaxed sample of some rows at a time, which stays in the cache.
    const int64_t bytes = shape.cols * (rows.is_double ? sizeof(double) : sizeof(float));
    const int64_t together = std::max<int64_t>(1, kSoftmaxBlock / shape.cols);
    std::vector<char> y(together * bytes);
    for (int64_t r = 0; r < rows.rows; r += together) {
      GumbelRows some = rows;
      some.rows = std::min(together, rows.rows - r);
      some.first_row += r;
      const auto at = [&](int input) {
        return static_cast<const char*>(piece.inputs[input]) + r * bytes;
      };
      TILEWISE_DISPATCH(gumbel_softmax)(some, at(1), y.data(), maxima.data());
      differentiate(some, piece.first + r, at(0), y.data(),
                    static_cast<char*>(piece.outputs[0]) + r * bytes);
    }
  });
  Sum total;  // in the order of rows
  for (const double part : d_tau) total.add(part);
  return {d_logits, scalar_if(need_tau, total.value(), tau.options())};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) {
  library.impl("gumbel_softmax", &gumbel_softmax);
  library.impl("gumbel_softmax_backward", &gumbel_softmax_backward);
}

}  // namespace tilewise
