#include "matmul.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>

#include "../common/integer.h"
#include "arguments.h"
#include "simd/logit_block.h"
#include "simd/pack.h"

// MKL's, where torch is built on MKL; null elsewhere.
extern "C" int MKL_Set_Num_Threads_Local(int count) __attribute__((weak));

namespace tilewise {
namespace {

using at::Tensor;

// Makes gemm run on, and plan for, one thread. Without it MKL and oneDNN choose their blocking by
// the number of threads that they could have, even where they then run on one.
class OneThread {
 public:
  OneThread() {
    if (MKL_Set_Num_Threads_Local) mkl_threads_ = MKL_Set_Num_Threads_Local(1);
#ifdef _OPENMP
    omp_threads_ = omp_get_max_threads();
    omp_set_num_threads(1);
#endif
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(mkl_threads_);
#ifdef _OPENMP
    omp_set_num_threads(omp_threads_);
#endif
  }
  OneThread(const OneThread&) = delete;

 private:
  int mkl_threads_ = 0, omp_threads_ = 1;
};

// A vendor's gemm may split the sum over K differently for each thread count, so the threads are
// ours: the output is cut into blocks by its size alone, and each is computed by one thread.
class Blocks {
 public:
  Blocks(int64_t out_rows, int64_t out_cols)
      : out_rows_(out_rows),
        out_cols_(out_cols),
        rows_(even_part(out_rows, 1)),
        cols_(even_part(out_cols, 1)) {
    if (count() == 1) rows_ = even_part(out_rows, 2);
  }

  int64_t count() const { return ceil_div(out_rows_, rows_) * ceil_div(out_cols_, cols_); }

  template <typename Function>
  void for_each(const Function& function) const {
    const int64_t across = ceil_div(out_cols_, cols_);
    at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      const BelowAutograd below;
      const OneThread one_thread;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = i / across * rows_, c = i % across * cols_;
        function(Block{i, r, std::min(rows_, out_rows_ - r), c, std::min(cols_, out_cols_ - c)});
      }
    });
  }

 private:
  // The size of equal parts: large ones, since each block packs its factors anew, and equal, so
  // that threads finish together. At least `least` parts.
  static int64_t even_part(int64_t size, int64_t least) {
    return round_up(ceil_div(size, std::max(ceil_div(size, kMaxBlock), least)), kBlockMultiple);
  }

  int64_t out_rows_, out_cols_, rows_, cols_;
};

// out = in^T, where the elements are those of T: uint16_t, or uint32_t for pairs of them.
// in (rows, cols) row-major, out (cols, rows) contiguous; both counted in T.
template <typename T>
void transpose(const T* in, int64_t stride, int64_t rows, int64_t cols, T* out) {
  using Kernel = void (*)(const T*, int64_t, int64_t, int64_t, T*, int64_t);
  const Kernel kernel = TILEWISE_DISPATCH_AS(Kernel, transpose);
  at::parallel_for(0, cols, 32, [&](int64_t begin, int64_t end) {
    kernel(in + begin, stride, rows, end - begin, out + begin * rows, rows);
  });
}

// (K, N) bfloat16 with K even -> (K / 2, N) of the pairs of rows that the instructions multiply.
Tensor pack_pairs(const Tensor& b, Workspace& workspace) {
  const int64_t pairs = b.size(0) / 2, cols = b.size(1);
  if (!workspace.pairs.defined() || workspace.pairs.numel() < pairs * cols) {
    workspace.pairs = at::empty({pairs * cols}, b.options().dtype(at::kInt));
  }
  const Tensor out = workspace.pairs.narrow(0, 0, pairs * cols).view({pairs, cols});
  auto* target = reinterpret_cast<uint32_t*>(out.mutable_data_ptr());
  // The transpose of a matrix with whole pairs in its rows is a transpose of those pairs.
  if (b.stride(0) == 1 && b.stride(1) % 2 == 0 && cols > 1) {
    transpose(static_cast<const uint32_t*>(b.const_data_ptr()), b.stride(1) / 2, cols, pairs,
              target);
    return out;
  }
  const Tensor rows = b.stride(1) == 1 ? b : b.contiguous();
  const auto* source = static_cast<const uint16_t*>(rows.const_data_ptr());
  const auto kernel = TILEWISE_DISPATCH(pack_pairs);
  at::parallel_for(0, pairs, 64, [&](int64_t begin, int64_t end) {
    kernel(source + 2 * begin * rows.stride(0), rows.stride(0), end - begin, cols,
           target + begin * cols);
  });
  return out;
}

constexpr int64_t kDepth = 512;  // of one bfloat16 product: its right factor stays in cache

// torch has no float32 product of bfloat16 matrices on CPU; this is the kernel of its attention.
template <typename Target, typename Finish>
void multiply_bfloat16(const Tensor& a, const Tensor& b, bool accumulate, Workspace& workspace,
                       const Target& target, const Finish& finish) {
  const int64_t depth = a.size(1) / 2 * 2, cols = b.size(1);  // pairs need an even depth
  const Tensor rows = as_left_factor(a);
  const Tensor pairs = pack_pairs(b.narrow(0, 0, depth), workspace);
  const auto* left = rows.const_data_ptr<at::BFloat16>();
  const auto* right = reinterpret_cast<const at::BFloat16*>(pairs.const_data_ptr());
  Blocks(a.size(0), cols).for_each([&](const Block& block) {
    const Tensor part = target(block);
    if (depth == 0 && !accumulate) part.zero_();
    for (int64_t k = 0; k < depth; k += kDepth) {
      at::native::cpublas::brgemm(block.rows, block.cols, std::min(kDepth, depth - k),
                                  rows.stride(0), cols, part.stride(0), accumulate || k > 0,
                                  left + block.row * rows.stride(0) + k,
                                  right + k * cols + 2 * block.col, part.mutable_data_ptr<float>());
    }
    at::native::cpublas::brgemm_release();
    if (depth < a.size(1)) {
      part.addr_(a.select(1, depth).narrow(0, block.row, block.rows).to(at::kFloat),
                 b.select(0, depth).narrow(0, block.col, block.cols).to(at::kFloat));
    }
    finish(block, part);
  });
}

// target(block): where that block of the product goes, (rows, cols). finish(block, target(block))
// follows on the same thread.
template <typename Target, typename Finish>
void multiply(const Tensor& a, const Tensor& b, bool accumulate, Workspace& workspace,
              const Target& target, const Finish& finish) {
  if (a.size(0) == 0 || b.size(1) == 0) return;
  if (a.scalar_type() == at::kBFloat16) {
    return multiply_bfloat16(a, b, accumulate, workspace, target, finish);
  }
  Blocks(a.size(0), b.size(1)).for_each([&](const Block& block) {
    Tensor part = target(block);
    const Tensor rows = a.narrow(0, block.row, block.rows);
    const Tensor cols = b.narrow(1, block.col, block.cols);
    accumulate ? at::addmm_out(part, part, rows, cols) : at::mm_out(part, rows, cols);
    finish(block, part);
  });
}

}  // namespace

void matmul(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate,
            Workspace& workspace) {
  const auto target = [&](const Block& block) {
    return out.narrow(0, block.row, block.rows).narrow(1, block.col, block.cols);
  };
  multiply(a, b, accumulate, workspace, target, [](const Block&, const Tensor&) {});
}

void matmul_blocks(const Tensor& a, const Tensor& b, Workspace& workspace,
                   const std::function<void(const Block&, const Tensor&)>& finish) {
  if (!workspace.blocks.defined()) {
    const auto type = a.scalar_type() == at::kBFloat16 ? at::kFloat : a.scalar_type();
    const int64_t threads =
        at::in_parallel_region() ? at::get_thread_num() + 1 : at::get_num_threads();
    workspace.blocks = at::empty({threads, kMaxBlock * kMaxBlock}, a.options().dtype(type));
  }
  const auto target = [&](const Block& block) {
    return workspace.blocks.select(0, at::get_thread_num())
        .narrow(0, 0, block.rows * block.cols)
        .view({block.rows, block.cols});
  };
  multiply(a, b, /*accumulate=*/false, workspace, target, finish);
}

int64_t count_blocks(int64_t rows, int64_t cols) {
  return rows && cols ? Blocks(rows, cols).count() : 0;
}

Tensor as_left_factor(const Tensor& a) {
  if (a.scalar_type() != at::kBFloat16 || a.stride(1) == 1) return a;
  if (a.stride(0) != 1) return a.contiguous();
  const Tensor out = at::empty(a.sizes(), a.options());
  transpose(static_cast<const uint16_t*>(a.const_data_ptr()), a.stride(1), a.size(1), a.size(0),
            static_cast<uint16_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor transposed(const Tensor& x) {
  const Tensor out = at::empty({x.size(1), x.size(0)}, x.options());
  transpose(static_cast<const uint32_t*>(x.const_data_ptr()), x.stride(0), x.size(0), x.size(1),
            static_cast<uint32_t*>(out.mutable_data_ptr()));
  return out;
}

bool has_bfloat16_matmul() {
  return at::globalContext().userEnabledMkldnn() && at::native::cpublas::could_pack(at::kBFloat16);
}

}  // namespace tilewise
