// tilewise::gaussian_sample and its gradient on CPU: checks and memory. The vector kernel is
// cpu/gaussian_sample.cpp.
#include "simd/gaussian_sample.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../ops.h"
#include "rows_along.h"

namespace tilewise {
namespace {

using at::Tensor;

// A row for each index of the first dimension.
RowsAlong rows_of_first(const Tensor& mean, const Tensor& logvar) {
  TORCH_CHECK_VALUE(mean.dim() >= 1 && mean.sizes() == logvar.sizes(),
                    "mean and logvar (B, ...) of one shape expected, got ", mean.sizes(), " and ",
                    logvar.sizes());
  TORCH_CHECK_TYPE(mean.is_floating_point() && mean.scalar_type() == logvar.scalar_type(),
                   "mean and logvar must share a floating dtype, got ", mean.scalar_type(), " and ",
                   logvar.scalar_type());
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

}  // namespace

std::tuple<Tensor, Tensor> gaussian_sample(const Tensor& mean, const Tensor& logvar,
                                           const Tensor& seed, int64_t row_offset, double low,
                                           double high) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const RowsAlong shape = rows_of_first(mean, logvar);
  const at::ScalarType type = compute_type(mean);
  const uint64_t key = random_key(seed);
  const Tensor z = at::empty_like(mean, mean.options(), at::MemoryFormat::Contiguous);
  const Tensor kl = at::zeros({shape.rows()}, mean.options().dtype(at::kDouble));
  for_pieces(shape, type, {mean, logvar}, {z}, [&](const Piece& piece) {
    TILEWISE_DISPATCH(gaussian_sample)
    (rows_of(piece, shape, type, key, row_offset, low, high), piece.data[0], piece.data[1],
     piece.data[2], kl.mutable_data_ptr<double>() + piece.first);
  });
  return {z, kl.to(type)};
}

std::tuple<Tensor, Tensor> gaussian_sample_backward(const std::optional<Tensor>& d_z,
                                                    const std::optional<Tensor>& d_kl,
                                                    const Tensor& mean, const Tensor& logvar,
                                                    const Tensor& seed, int64_t row_offset,
                                                    double low, double high) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const RowsAlong shape = rows_of_first(mean, logvar);
  TORCH_CHECK_VALUE(!d_z || d_z->sizes() == mean.sizes(), "d_z: expected the shape of mean");
  TORCH_CHECK_VALUE(!d_kl || d_kl->numel() == shape.rows(), "d_kl: expected an element per row");
  const at::ScalarType type = compute_type(mean);
  const uint64_t key = random_key(seed);
  const Tensor d_mean = at::empty_like(mean, mean.options(), at::MemoryFormat::Contiguous);
  const Tensor d_logvar = at::empty_like(mean, mean.options(), at::MemoryFormat::Contiguous);
  const Tensor per_row = d_kl ? d_kl->to(at::kDouble).contiguous() : Tensor();
  for_pieces(shape, type, {d_z.value_or(Tensor()), mean, logvar}, {d_mean, d_logvar},
             [&](const Piece& piece) {
               TILEWISE_DISPATCH(gaussian_gradient)
               (rows_of(piece, shape, type, key, row_offset, low, high), piece.data[0],
                d_kl ? per_row.const_data_ptr<double>() + piece.first : nullptr, piece.data[1],
                piece.data[2], piece.data[3], piece.data[4]);
             });
  return {d_mean, d_logvar};
}

}  // namespace tilewise
