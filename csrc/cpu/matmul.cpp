#include "matmul.h"

#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <atomic>

#include "../common/integer.h"
#include "arguments.h"

// MKL's, where torch is built on MKL; null elsewhere.
extern "C" int MKL_Set_Num_Threads_Local(int count) __attribute__((weak));

namespace tilewise {
namespace {

using at::Tensor;

// Makes torch's product run on, and plan for, one thread. Without it MKL and oneDNN choose their
// blocking by the number of threads that they could have, even where they then run on one.
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

bool is_bfloat16(const Tensor& x) { return x.scalar_type() == at::kBFloat16; }
bool is_double(const Tensor& x) { return x.scalar_type() == at::kDouble; }

constexpr int64_t kBand = 2;             // block rows
constexpr int64_t kLeastWork = 1 << 21;  // about as long as it takes to wake a thread
constexpr int64_t kShareOfThread = 4;    // a thread takes 1 / kShareOfThread of its share

}  // namespace

Block Grid::block(int64_t index) const {
  const int64_t band = index / (kBand * across()), in_band = index % (kBand * across());
  const int64_t height = std::min(kBand, down() - kBand * band);
  const int64_t row = (kBand * band + in_band % height) * block_rows_;
  const int64_t col = in_band / height * block_cols_;
  return {index, row, std::min(block_rows_, rows_ - row), col, std::min(block_cols_, cols_ - col)};
}

int64_t Grid::index(int64_t row, int64_t col) const {
  const int64_t band = row / kBand * kBand;
  return band * across() + col * std::min(kBand, down() - band) + row % kBand;
}

void deal(int64_t count, int64_t work, const std::function<void(int64_t)>& task) {
  const int64_t threads = work < kLeastWork ? 1 : std::min<int64_t>(at::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const BelowAutograd below;
    for (int64_t begin = next.load(); begin < count;) {
      const int64_t take = std::max<int64_t>(1, (count - begin) / (kShareOfThread * threads));
      if (!next.compare_exchange_weak(begin, begin + take)) continue;
      for (int64_t i = begin; i < begin + take; ++i) task(i);
      begin = next.load();
    }
  });
}

Left::Left(const Tensor& rows) : matrix(rows) {
  if (is_double(rows)) return;
  const int64_t numbers = is_bfloat16(rows) ? 2 : 1;
  if (rows.stride(0) % numbers) {  // every row begins with a pair
    matrix = at::empty({rows.size(0), round_up(rows.size(1), numbers)}, rows.options());
    matrix.narrow(1, 0, rows.size(1)).copy_(rows);
  }
  elements.data = matrix.const_data_ptr();
  elements.stride = matrix.stride(0) / numbers;
}

int64_t RightFactor::floats(int64_t depth, int64_t cols, at::ScalarType type) {
  if (type == at::kDouble) return 0;
  return round_up(cols, kPanel) * padded_depth(depth_of(depth, type == at::kBFloat16));
}

void RightFactor::set(const Tensor& b, float* memory) {
  b_ = b;
  packed_ = memory;
}

int64_t RightFactor::panels() const { return is_double(b_) ? 0 : ceil_div(b_.size(1), kPanel); }

void RightFactor::pack(int64_t panel) const {
  const int64_t depth = b_.size(0), first = panel * kPanel;
  const bool transposed = b_.stride(1) != 1;
  PanelSource source{
      static_cast<const char*>(b_.const_data_ptr()) + first * b_.stride(1) * b_.element_size(),
      transposed ? b_.stride(1) : b_.stride(0),
      depth,
      std::min(kPanel, b_.size(1) - first),
      transposed,
      is_bfloat16(b_)};
  TILEWISE_DISPATCH(pack_panel)
  (source, packed_ + first * padded_depth(depth_of(depth, source.bfloat16)));
}

void RightFactor::multiply(const Left& left, const Block& block, void* out, int64_t stride,
                           bool accumulate) const {
  if (is_double(b_)) {
    const OneThread one_thread;
    Tensor target = at::from_blob(out, {block.rows, block.cols}, {stride, 1}, b_.options());
    const Tensor rows = left.matrix.narrow(0, block.row, block.rows);
    const Tensor cols = b_.narrow(1, block.col, block.cols);
    accumulate ? at::addmm_out(target, target, rows, cols) : at::mm_out(target, rows, cols);
    return;
  }
  const bool bfloat16 = is_bfloat16(b_);
  LeftFactor rows = left.elements;
  rows.data = static_cast<const float*>(rows.data) +
              (rows.transposed ? block.row / kChunk * rows.strip + block.row % kChunk
                               : block.row * rows.stride);
  const float* panel = packed_ + block.col * padded_depth(depth_of(b_.size(0), bfloat16));
  TILEWISE_DISPATCH(multiply)
  ({rows, panel, block.rows, block.cols, b_.size(0), static_cast<float*>(out), stride, accumulate},
   bfloat16 ? bfloat16_unit() : Bfloat16Unit::NONE);
}

void matmul(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate, Tensor& space) {
  const int64_t floats = RightFactor::floats(b.size(0), b.size(1), b.scalar_type());
  if (!space.defined() || space.numel() < floats) {
    space = at::empty({floats}, b.options().dtype(at::kFloat));
  }
  RightFactor right;
  right.set(b, space.mutable_data_ptr<float>());
  for (int64_t panel = 0; panel < right.panels(); ++panel) right.pack(panel);
  right.multiply(Left(a), {0, 0, a.size(0), 0, b.size(1)}, out.mutable_data_ptr(), out.stride(0),
                 accumulate);
}

}  // namespace tilewise
