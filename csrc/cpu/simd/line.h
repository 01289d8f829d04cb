// A row of a block of logits at a time, in a buffer of whole vectors.
#pragma once

#include "../../common/integer.h"
#include "flush_denormals.h"
#include "lane_sum.h"
#include "logit_block.h"

namespace tilewise {
namespace CPU_CAPABILITY {

// A number for each column of a block, and for what fills up the last vectors.
template <typename T>
struct Line {
  alignas(64) T at[kMaxBlockCols];
};

TILEWISE_INLINE int64_t padded(int64_t cols, int64_t lanes = kLanes) {
  return round_up(cols, lanes);
}

// z = scale * dots up to `cols`; from there to `end` -inf, whose exponential is 0.
template <typename T>
TILEWISE_INLINE void read_logits(const T* dots, int64_t cols, int64_t end, double scale,
                                 Line<T>& z) {
  const T factor = static_cast<T>(scale);
  for (int64_t j = 0; j < cols; ++j) z.at[j] = dots[j] * factor;
  for (int64_t j = cols; j < end; ++j) z.at[j] = -__builtin_inf();
}

template <typename F>
TILEWISE_INLINE void for_lanes(int64_t cols, const F& f) {
  for (int64_t j = 0; j < cols; j += kLanes) f(j);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
