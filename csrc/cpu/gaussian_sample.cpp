// tilewise::gaussian_sample and its gradient on CPU: checks and memory. The vector kernel is
// in simd/gaussian_sample.cpp.
#include "simd/gaussian_sample.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/registration.h"
#include "arguments.h"
#include "rows_along.h"

namespace tilewise {
namespace {

using at::Tensor;

// A row for each index of the first dimension.
RowsAlong rows_of_first(const Tensor& mean, const Tensor& logvar) {
  TORCH_CHECK_VALUE(mean.dim() >= 1, "mean: expected (B, ...), got ", mean.sizes());
  TORCH_CHECK_VALUE(logvar.sizes() == mean.sizes(), "logvar: expected ", mean.sizes(),
                    ", as mean, got ", logvar.sizes());
  TORCH_CHECK_TYPE(mean.is_floating_point(), "mean: expected a floating dtype, got ",
                   mean.scalar_type());
  TORCH_CHECK_TYPE(logvar.scalar_type() == mean.scalar_type(), "logvar: expected ",
                   mean.scalar_type(), ", as mean, got ", logvar.scalar_type());
  const int64_t rows = mean.size(0);
  return RowsAlong({rows, mean.numel() / std::max<int64_t>(rows, 1)}, 1);
}

GaussianRows rows_of(const Piece& piece, const RowsAlong& shape, at::ScalarType type, uint64_t seed,
                     int64_t row_offset, double low, double high) {
  return {type == at::kDouble,
          piece.count,
          shape.cols,
          seed,
          noise_row(piece.first, row_offset),
          low,
          high};
}

static_assert(kGaussianBlock == kRowBlock, "a row is cut where its sums are");

// A part of a row, as a row of its own.
GaussianRows row_of(const RowPart& part, uint64_t seed, int64_t row_offset, double low,
                    double high) {
  return {false, 1, part.cols, seed, noise_row(part.row, row_offset), low, high, part.col};
}

// Elements of few wide rows, from a part on; null for an undefined tensor.
const float* part_of(const Tensor& rows, const RowPart& part) {
  return rows.defined() ? rows.const_data_ptr<float>() + part.at : nullptr;
}

// Samples of few wide rows, and their divergences.
void sample_wide(const Tensor& mean, const Tensor& logvar, const RowsAlong& shape, uint64_t seed,
                 int64_t row_offset, double low, double high, const Tensor& z, double* kl) {
  const Tensor means = wide_rows(mean, shape), logvars = wide_rows(logvar, shape);
  const Tensor out = wide_output(z, shape);
  auto* to = out.mutable_data_ptr<float>();
  std::vector<double> parts(shape.rows() * row_blocks(shape));
  for_row_parts(shape, [&](const RowPart& part) {
    TILEWISE_DISPATCH(gaussian_sample)
    (row_of(part, seed, row_offset, low, high), part_of(means, part), part_of(logvars, part),
     to + part.at, &parts[part.number]);
  });
  for (size_t i = 0; i < parts.size(); ++i) kl[i / row_blocks(shape)] += parts[i];
  save_wide(out, shape, z);
}

// Gradients of few wide rows; d_kl has one for each, or is null.
void differentiate_wide(const std::optional<Tensor>& d_z, const double* d_kl, const Tensor& mean,
                        const Tensor& logvar, const RowsAlong& shape, uint64_t seed,
                        int64_t row_offset, double low, double high, const Tensor& d_mean,
                        const Tensor& d_logvar) {
  const Tensor means = wide_rows(mean, shape), logvars = wide_rows(logvar, shape);
  const Tensor grads = d_z ? wide_rows(*d_z, shape) : Tensor();
  const Tensor of_mean = wide_output(d_mean, shape), of_logvar = wide_output(d_logvar, shape);
  auto *to_mean = of_mean.mutable_data_ptr<float>(),
       *to_logvar = of_logvar.mutable_data_ptr<float>();
  for_row_parts(shape, [&](const RowPart& part) {
    TILEWISE_DISPATCH(gaussian_gradient)
    (row_of(part, seed, row_offset, low, high), part_of(grads, part),
     d_kl ? d_kl + part.row : nullptr, part_of(means, part), part_of(logvars, part),
     to_mean + part.at, to_logvar + part.at);
  });
  save_wide(of_mean, shape, d_mean);
  save_wide(of_logvar, shape, d_logvar);
}

// See pyext/tilewise/ops/gaussian_sample.py.
std::tuple<Tensor, Tensor> gaussian_sample(const Tensor& mean, const Tensor& logvar,
                                           const Tensor& seed, int64_t row_offset, double low,
                                           double high) {
  const BelowAutograd below;
  const RowsAlong shape = rows_of_first(mean, logvar);
  const at::ScalarType type = compute_type(mean);
  const uint64_t key = random_key(seed);
  const Tensor z = at::empty_like(mean, mean.options(), at::MemoryFormat::Contiguous);
  const Tensor kl = at::zeros({shape.rows()}, mean.options().dtype(at::kDouble));
  if (is_wide(shape, type)) {
    sample_wide(mean, logvar, shape, key, row_offset, low, high, z, kl.mutable_data_ptr<double>());
    return {z, kl.to(type)};
  }
  for_pieces(shape, type, {mean, logvar}, {z}, [&](const Piece& piece) {
    TILEWISE_DISPATCH(gaussian_sample)
    (rows_of(piece, shape, type, key, row_offset, low, high), piece.inputs[0], piece.inputs[1],
     piece.outputs[0], kl.mutable_data_ptr<double>() + piece.first);
  });
  return {z, kl.to(type)};
}

std::tuple<Tensor, Tensor> gaussian_sample_backward(const std::optional<Tensor>& d_z,
                                                    const std::optional<Tensor>& d_kl,
                                                    const Tensor& mean, const Tensor& logvar,
                                                    const Tensor& seed, int64_t row_offset,
                                                    double low, double high) {
  const BelowAutograd below;
  const RowsAlong shape = rows_of_first(mean, logvar);
  TORCH_CHECK_VALUE(!d_z || d_z->sizes() == mean.sizes(), "d_z: expected ", mean.sizes(), ", got ",
                    d_z->sizes());
  TORCH_CHECK_VALUE(!d_kl || d_kl->numel() == shape.rows(), "d_kl: expected ", shape.rows(),
                    " elements, got ", d_kl->sizes());
  const at::ScalarType type = compute_type(mean);
  const uint64_t key = random_key(seed);
  const Tensor d_mean = at::empty_like(mean, mean.options(), at::MemoryFormat::Contiguous);
  const Tensor d_logvar = at::empty_like(mean, mean.options(), at::MemoryFormat::Contiguous);
  const Tensor per_row = d_kl ? d_kl->to(at::kDouble).contiguous() : Tensor();
  if (is_wide(shape, type)) {
    differentiate_wide(d_z, d_kl ? per_row.const_data_ptr<double>() : nullptr, mean, logvar, shape,
                       key, row_offset, low, high, d_mean, d_logvar);
    return {d_mean, d_logvar};
  }
  for_pieces(shape, type, {d_z.value_or(Tensor()), mean, logvar}, {d_mean, d_logvar},
             [&](const Piece& piece) {
               TILEWISE_DISPATCH(gaussian_gradient)
               (rows_of(piece, shape, type, key, row_offset, low, high), piece.inputs[0],
                d_kl ? per_row.const_data_ptr<double>() + piece.first : nullptr, piece.inputs[1],
                piece.inputs[2], piece.outputs[0], piece.outputs[1]);
             });
  return {d_mean, d_logvar};
}

}  // namespace

TILEWISE_REGISTER(CPU, library) {
  library.impl("gaussian_sample", &gaussian_sample);
  library.impl("gaussian_sample_backward", &gaussian_sample_backward);
}

}  // namespace tilewise
