#include "rows_along.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "simd/pack.h"

namespace tilewise {
namespace {

using at::Tensor;

constexpr int64_t kPieceElements = 32768;
constexpr int64_t kBlock = 16;  // rows that are transposed together

int64_t product(at::IntArrayRef sizes) {
  int64_t out = 1;
  for (const int64_t n : sizes) out *= n;
  return out;
}

// The gradient of a sum is one number, expanded: it is not written out but for a piece at a time.
bool is_expanded(const Tensor& x) {
  return std::all_of(x.strides().begin(), x.strides().end(), [](int64_t s) { return s == 0; });
}

bool is_direct(const Tensor& x, const RowsAlong& shape, at::ScalarType type) {
  return x.scalar_type() == type && shape.inner == 1 && x.is_contiguous();
}

// Consecutive rows of x (outer, cols, inner) that share an outer index, or any if inner is 1.
Tensor rows_of(const Tensor& x, const RowsAlong& shape, int64_t first, int64_t count) {
  const Tensor x3 = x.view({shape.outer, shape.cols, shape.inner});
  if (shape.inner == 1) return x3.squeeze(2).narrow(0, first, count);
  return x3.select(0, first / shape.inner).narrow(1, first % shape.inner, count).t();
}

// from (rows, cols) a transposed view of float: its bits are turned in registers.
void turn(const Tensor& in, const Tensor& out) {
  const auto function = TILEWISE_DISPATCH_AS(
      void (*)(const uint32_t*, int64_t, int64_t, int64_t, uint32_t*, int64_t), transpose);
  function(static_cast<const uint32_t*>(in.const_data_ptr()), in.stride(0), in.size(0), in.size(1),
           static_cast<uint32_t*>(out.mutable_data_ptr()), out.stride(1));
}

void load(const Tensor& view, const Tensor& staged) {
  if (view.scalar_type() == at::kFloat && view.stride(0) == 1 && view.stride(1) > 1) {
    turn(view.t(), staged.t());
  } else {
    staged.copy_(view);
  }
}

void save(const Tensor& staged, const Tensor& view) {
  if (view.scalar_type() == at::kFloat && view.stride(0) == 1 && view.stride(1) > 1) {
    turn(staged, view);
  } else {
    view.copy_(staged);
  }
}

}  // namespace

RowsAlong::RowsAlong(at::IntArrayRef sizes, int64_t dim)
    : outer(product(sizes.slice(0, dim))), cols(sizes[dim]), inner(product(sizes.slice(dim + 1))) {}

RowsAlong rows_along(const char* name, const Tensor& x, int64_t dim) {
  TORCH_CHECK_TYPE(x.is_floating_point(), name, ": expected a floating dtype, got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(dim >= 0 && dim < x.dim(), "dim: expected from 0 to ", x.dim() - 1, ", got ",
                    dim);
  return RowsAlong(x.sizes(), dim);
}

uint64_t random_key(const Tensor& seed) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong && seed.numel() == 1,
                   "seed: expected one int64 element, got ", seed.scalar_type(), " ", seed.sizes());
  return static_cast<uint64_t>(seed.item<int64_t>());
}

void for_pieces(const RowsAlong& shape, at::ScalarType type, const std::vector<Tensor>& inputs,
                const std::vector<Tensor>& outputs, const std::function<void(const Piece&)>& work) {
  if (shape.rows() == 0 || shape.cols == 0) return;
  std::vector<Tensor> operands;
  for (const Tensor& x : inputs) {
    operands.push_back(x.defined() && !is_expanded(x) ? x.contiguous() : x);
  }
  operands.insert(operands.end(), outputs.begin(), outputs.end());

  int64_t size = std::max<int64_t>(1, kPieceElements / shape.cols);
  if (shape.inner > 1) size = (size + kBlock - 1) / kBlock * kBlock;
  const int64_t line = shape.inner == 1 ? shape.outer : shape.inner;  // a piece stays within one
  const int64_t each = (line + size - 1) / size;
  const int64_t lines = shape.rows() / line;
  at::parallel_for(0, lines * each, 1, [&](int64_t begin, int64_t end) {
    std::vector<Tensor> space(operands.size());
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t start = piece % each * size;
      Piece p{piece / each * line + start, std::min(size, line - start), {}};
      std::vector<Tensor> views(operands.size()), staged(operands.size());
      for (size_t i = 0; i < operands.size(); ++i) {
        if (!operands[i].defined()) {
          p.data.push_back(nullptr);
          continue;
        }
        views[i] = staged[i] = rows_of(operands[i], shape, p.first, p.count);
        if (!is_direct(operands[i], shape, type)) {
          if (!space[i].defined()) {
            space[i] = at::empty({size, shape.cols}, operands[i].options().dtype(type));
          }
          staged[i] = space[i].narrow(0, 0, p.count);
          if (i < inputs.size()) load(views[i], staged[i]);
        }
        p.data.push_back(staged[i].mutable_data_ptr());
      }
      work(p);
      for (size_t i = inputs.size(); i < operands.size(); ++i) {
        if (views[i].defined() && !is_direct(operands[i], shape, type)) save(staged[i], views[i]);
      }
    }
  });
}

}  // namespace tilewise
