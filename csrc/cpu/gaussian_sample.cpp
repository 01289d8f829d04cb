// tilewise::gaussian_sample and its gradient on CPU: checks and memory. The vector kernel is
// in simd/gaussian_sample.cpp.
#include "simd/gaussian_sample.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <tuple>

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
