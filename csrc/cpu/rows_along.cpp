#include "rows_along.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../common/integer.h"
#include "arguments.h"
#include "pages.h"
#include "simd/transpose.h"

namespace tilewise {
namespace {

using at::Tensor;

constexpr int64_t kPieceElements = 32768;
constexpr int64_t kBlock = 16;           // rows that are transposed together
constexpr int64_t kMaxStaged = 1 << 20;  // elements of these, unless a row has more

int64_t product(at::IntArrayRef sizes) {
  int64_t out = 1;
  for (const int64_t n : sizes) out *= n;
  return out;
}

// The gradient of a sum is one number, expanded: it is not written out but for a piece at a time.
bool is_expanded(const Tensor& x) {
  return std::all_of(x.strides().begin(), x.strides().end(), [](int64_t s) { return s == 0; });
}

// Consecutive rows of x (outer, cols, inner) that share an outer index, or any if inner is 1.
Tensor rows_of(const Tensor& x, const RowsAlong& shape, int64_t first, int64_t count) {
  const Tensor x3 = x.view({shape.outer, shape.cols, shape.inner});
  if (shape.inner == 1) return x3.squeeze(2).narrow(0, first, count);
  return x3.select(0, first / shape.inner).narrow(1, first % shape.inner, count).t();
}

// Whether `view` (rows, cols) of float has the elements of a column side by side.
bool is_transposed(const Tensor& view) {
  return view.scalar_type() == at::kFloat && view.stride(0) == 1 && view.stride(1) > 1;
}

// out = in, one of which is transposed: bits change their places in registers.
void copy_transposed(const Tensor& in, int64_t in_stride, const Tensor& out, int64_t out_stride,
                     int64_t rows, int64_t cols) {
  const auto function = TILEWISE_DISPATCH_AS(
      void (*)(const uint32_t*, int64_t, int64_t, int64_t, uint32_t*, int64_t), transpose);
  function(static_cast<const uint32_t*>(in.const_data_ptr()), in_stride, rows, cols,
           static_cast<uint32_t*>(out.mutable_data_ptr()), out_stride);
}

// An operand, of whose rows a piece at a time lies as kernels read it: where it is, or staged.
class Staged {
 public:
  Staged(const Tensor& x, const RowsAlong& shape, at::ScalarType type, int64_t size)
      : x_(x), shape_(shape), type_(type), size_(size) {
    direct_ = x.defined() && x.scalar_type() == type && shape.inner == 1 && x.is_contiguous();
  }

  const void* load(int64_t first, int64_t count) {
    if (!x_.defined()) return nullptr;
    if (direct_) return static_cast<const char*>(x_.const_data_ptr()) + offset(first);
    view_ = rows_of(x_, shape_, first, count);
    stage(count);
    if (is_transposed(view_)) {
      copy_transposed(view_, view_.stride(1), staged_, staged_.stride(0), shape_.cols, count);
    } else {
      staged_.copy_(view_);
    }
    return staged_.const_data_ptr();
  }

  // Where an output's rows are to be written; save() follows. A fresh page costs as much as what is
  // computed for it, half of that if it comes with others.
  void* target(int64_t first, int64_t count) {
    if (direct_) {
      char* at = static_cast<char*>(x_.mutable_data_ptr()) + offset(first);
      fetch_pages(at, offset(count));
      return at;
    }
    view_ = rows_of(x_, shape_, first, count);
    stage(count);
    return staged_.mutable_data_ptr();
  }

  void save() {
    if (direct_) return;
    if (is_transposed(view_)) {
      copy_transposed(staged_, staged_.stride(0), view_, view_.stride(1), view_.size(0),
                      shape_.cols);
    } else {
      view_.copy_(staged_);
    }
  }

 private:
  int64_t offset(int64_t row) const { return row * shape_.cols * x_.element_size(); }

  void stage(int64_t count) {
    if (!space_.defined()) space_ = at::empty({size_, shape_.cols}, x_.options().dtype(type_));
    staged_ = space_.narrow(0, 0, count);
  }

  const Tensor x_;
  const RowsAlong& shape_;
  const at::ScalarType type_;
  const int64_t size_;  // of a piece, at most
  bool direct_;
  Tensor space_, view_, staged_;
};

// Rows that are read together. Those along an inner dimension are transposed, several at once.
int64_t rows_of_piece(const RowsAlong& shape) {
  const int64_t size = std::max<int64_t>(1, kPieceElements / shape.cols);
  if (shape.inner == 1) return size;
  const int64_t together = std::clamp<int64_t>(kMaxStaged / shape.cols, 1, kBlock);
  return std::min(round_up(size, together), shape.inner);
}

constexpr int64_t kShares = 4;  // of rows for each thread, which keep all busy to the end

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

bool is_wide(const RowsAlong& shape, at::ScalarType type) {
  const int64_t threads = at::get_num_threads();
  return type == at::kFloat && shape.cols > kRowBlock && threads > 1 && !at::in_parallel_region() &&
         shape.rows() < kShares * threads;
}

Tensor wide_rows(const Tensor& x, const RowsAlong& shape) {
  const bool direct = x.scalar_type() == at::kFloat && shape.inner == 1 && x.is_contiguous();
  if (direct) return x.view({shape.rows(), shape.cols});
  const Tensor rows = x.reshape({shape.outer, shape.cols, shape.inner}).transpose(1, 2);
  return rows.reshape({shape.rows(), shape.cols}).to(at::kFloat).contiguous();
}

Tensor wide_output(const Tensor& out, const RowsAlong& shape) {
  const bool direct = out.scalar_type() == at::kFloat && shape.inner == 1;
  return direct ? out.view({shape.rows(), shape.cols})
                : at::empty({shape.rows(), shape.cols}, out.options().dtype(at::kFloat));
}

void save_wide(const Tensor& rows, const RowsAlong& shape, const Tensor& out) {
  if (rows.const_data_ptr() == out.const_data_ptr()) return;
  out.view({shape.outer, shape.cols, shape.inner})
      .copy_(rows.view({shape.outer, shape.inner, shape.cols}).transpose(1, 2));
}

void for_row_parts(const RowsAlong& shape, const std::function<void(const RowPart&)>& work) {
  const int64_t blocks = row_blocks(shape);
  at::parallel_for(0, shape.rows() * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number / blocks, col = number % blocks * kRowBlock;
      work({row, col, std::min(kRowBlock, shape.cols - col), row * shape.cols + col, number});
    }
  });
}

void for_pieces(const RowsAlong& shape, at::ScalarType type, const std::vector<Tensor>& inputs,
                const std::vector<Tensor>& outputs, const std::function<void(const Piece&)>& work) {
  if (shape.rows() == 0 || shape.cols == 0) return;
  std::vector<Tensor> operands;
  for (const Tensor& x : inputs) {
    operands.push_back(x.defined() && !is_expanded(x) ? x.contiguous() : x);
  }
  const int64_t line = shape.inner == 1 ? shape.outer : shape.inner;  // a piece stays within one
  const int64_t size = rows_of_piece(shape), each = ceil_div(line, size);
  at::parallel_for(0, shape.rows() / line * each, 1, [&](int64_t begin, int64_t end) {
    const BelowAutograd below;
    std::vector<Staged> in, out;
    for (const Tensor& x : operands) in.emplace_back(x, shape, type, size);
    for (const Tensor& x : outputs) out.emplace_back(x, shape, type, size);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t start = piece % each * size;
      Piece p{piece / each * line + start, std::min(size, line - start), {}, {}};
      for (Staged& x : in) p.inputs.push_back(x.load(p.first, p.count));
      for (Staged& x : out) p.outputs.push_back(x.target(p.first, p.count));
      work(p);
      for (Staged& x : out) x.save();
    }
  });
}

}  // namespace tilewise
