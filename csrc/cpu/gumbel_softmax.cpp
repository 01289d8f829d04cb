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

#include "../common/registration.h"
#include "../common/sum.h"
#include "arguments.h"
#include "gumbel_argmax.h"
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

static_assert(kSoftmaxBlock == kRowBlock, "a row is cut where its sums are");

// A part of a row, as a row of its own.
GumbelRows row_of(const RowPart& part, uint64_t seed, int64_t row_offset, double tau) {
  const RowsAlong shape({1, part.cols}, 1);
  return rows_of({part.row, 1, {}, {}}, shape, at::kFloat, seed, row_offset, tau);
}

// y (rows, cols) of few wide rows x.
void relax_wide(const Tensor& x, const RowsAlong& shape, double tau, uint64_t seed,
                int64_t row_offset, const Tensor& y) {
  const auto* from = x.const_data_ptr<float>();
  auto* to = y.mutable_data_ptr<float>();
  std::vector<SoftmaxPart> parts(shape.rows() * row_blocks(shape));
  for_row_parts(shape, [&](const RowPart& part) {
    parts[part.number] = TILEWISE_DISPATCH(softmax_block)(row_of(part, seed, row_offset, tau),
                                                          part.col, from + part.at, to + part.at);
  });
  const double inverse = row_of({0, 0, 1, 0, 0}, seed, row_offset, tau).inverse_tau;
  for (int64_t r = 0; r < shape.rows(); ++r) {
    TILEWISE_DISPATCH(softmax_factors)(&parts[r * row_blocks(shape)], row_blocks(shape), inverse);
  }
  for_row_parts(shape, [&](const RowPart& part) {
    TILEWISE_DISPATCH(softmax_scale)(to + part.at, part.cols, parts[part.number].sum);
  });
}

Tensor relaxed(const Tensor& logits, const RowsAlong& shape, double tau, uint64_t seed,
               int64_t row_offset) {
  const Tensor y = at::empty_like(logits, logits.options(), at::MemoryFormat::Contiguous);
  const at::ScalarType type = compute_type(logits);
  if (is_wide(shape, type)) {
    const Tensor out = wide_output(y, shape);
    relax_wide(wide_rows(logits, shape), shape, tau, seed, row_offset, out);
    save_wide(out, shape, y);
    return y;
  }
  for_pieces(shape, type, {logits}, {y}, [&](const Piece& piece) {
    std::vector<SoftmaxPart> parts(row_blocks(shape));
    TILEWISE_DISPATCH(gumbel_softmax)
    (rows_of(piece, shape, type, seed, row_offset, tau), piece.inputs[0], piece.outputs[0],
     parts.data());
  });
  return y;
}

// Writes a row of the result, all 0 before; index: where its 1 goes, or -1 for a row of NaN.
template <typename T>
void mark(T* out, const RowsAlong& shape, int64_t row, int64_t index) {
  T* first = out + row / shape.inner * shape.cols * shape.inner + row % shape.inner;
  if (index >= 0) {
    first[index * shape.inner] = 1;
    return;
  }
  for (int64_t col = 0; col < shape.cols; ++col) first[col * shape.inner] = NAN;
}

// Only indices are computed; the rest is 0, which is written here for rows that lie in a piece.
template <typename T>
void one_hot(const Tensor& logits, const RowsAlong& shape, uint64_t seed, int64_t row_offset,
             const Tensor& y) {
  T* out = y.mutable_data_ptr<T>();
  const at::ScalarType type = compute_type(logits);
  if (is_wide(shape, type)) {
    std::vector<int64_t> index(shape.rows());
    argmax_wide(wide_rows(logits, shape), shape, 1, seed, row_offset, index.data(), true);
    if (shape.inner == 1) y.zero_();
    for (int64_t row = 0; row < shape.rows(); ++row) mark(out, shape, row, index[row]);
    return;
  }
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
    for (int64_t i = 0; i < piece.count; ++i) mark(out, shape, piece.first + i, index[i]);
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

// In the order of rows.
double sum_of(const std::vector<double>& parts) {
  Sum total;
  for (const double part : parts) total.add(part);
  return total.value();
}

// Gradients of few wide rows; inverse: what to divide by tau, or 0. d_tau: a number per row, or
// none.
void differentiate_wide(const Tensor& grad, const Tensor& y, const RowsAlong& shape, double inverse,
                        const Tensor& d_x, std::vector<double>& d_tau) {
  const auto *g = grad.const_data_ptr<float>(), *p = y.const_data_ptr<float>();
  auto* out = d_x.mutable_data_ptr<float>();
  const int64_t count = row_blocks(shape);
  std::vector<double> dots(shape.rows() * count), tau_parts(d_tau.empty() ? 0 : dots.size());
  for_row_parts(shape, [&](const RowPart& part) {
    dots[part.number] = TILEWISE_DISPATCH(softmax_dot)(p + part.at, g + part.at, part.cols);
  });
  std::vector<double> sums(shape.rows());  // in the order of blocks
  for (size_t i = 0; i < dots.size(); ++i) sums[i / count] += dots[i];
  for_row_parts(shape, [&](const RowPart& part) {
    const GumbelRows row{false, 1, part.cols, 0, 0, inverse};
    TILEWISE_DISPATCH(softmax_gradient_block)
    (row, g + part.at, p + part.at, sums[part.row], out + part.at,
     d_tau.empty() ? nullptr : &tau_parts[part.number]);
  });
  for (size_t i = 0; i < tau_parts.size(); ++i) d_tau[i / count] += tau_parts[i];
  for (double& part : d_tau) part *= inverse;
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
  if (is_wide(shape, type)) {
    Tensor y = wide_rows(saved, shape);
    if (hard) {
      const Tensor logits = y;
      y = at::empty_like(logits);
      relax_wide(logits, shape, t, key, row_offset, y);
    }
    const double inverse = t == 0 ? 0 : row_of({0, 0, 1, 0, 0}, key, row_offset, t).inverse_tau;
    const Tensor out = wide_output(d_logits, shape);
    differentiate_wide(wide_rows(grad, shape), y, shape, inverse, out, d_tau);
    save_wide(out, shape, d_logits);
    return {d_logits, scalar_if(need_tau, sum_of(d_tau), tau.options())};
  }
  for_pieces(shape, type, {grad, saved}, {d_logits}, [&](const Piece& piece) {
    const GumbelRows rows = rows_of(piece, shape, type, key, row_offset, t);
    std::vector<SoftmaxPart> parts(row_blocks(shape));
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
      TILEWISE_DISPATCH(gumbel_softmax)(some, at(1), y.data(), parts.data());
      differentiate(some, piece.first + r, at(0), y.data(),
                    static_cast<char*>(piece.outputs[0]) + r * bytes);
    }
  });
  return {d_logits, scalar_if(need_tau, sum_of(d_tau), tau.options())};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) {
  library.impl("gumbel_softmax", &gumbel_softmax);
  library.impl("gumbel_softmax_backward", &gumbel_softmax_backward);
}

}  // namespace tilewise
