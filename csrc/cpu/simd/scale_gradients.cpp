// Vector kernels of the losses' backward pass: finished gradients times the incoming one.
#include "scale_gradients.h"

#include <ATen/cpu/vec/vec.h>

#include "lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
void scale_wide(const T* in, T factor, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] * factor;
}

using V = at::vec::Vectorized<float>;

void store(const V& low, const V& high, c10::BFloat16* out) {
  at::vec::convert_float_bfloat16(low, high).store(out);
}
void store(const V& low, const V& high, c10::Half* out) {
  at::vec::convert_float_half(low, high).store(out);
}

// To numbers of half the size.
template <typename To>
void scale_narrow(const float* in, float factor, int64_t n, To* out) {
  constexpr int64_t size = 2 * V::size();
  const V factors(factor);
  int64_t i = 0;
  for (; i + size <= n; i += size) {
    const V low = V::loadu(in + i) * factors, high = V::loadu(in + i + V::size()) * factors;
    store(low, high, out + i);
  }
  for (; i < n; ++i) out[i] = static_cast<To>(in[i] * factor);
}

}  // namespace

void scale(const double* in, double factor, int64_t n, double* out) {
  scale_wide(in, factor, n, out);
}
void scale(const float* in, float factor, int64_t n, float* out) { scale_wide(in, factor, n, out); }
void scale(const float* in, float factor, int64_t n, c10::BFloat16* out) {
  scale_narrow(in, factor, n, out);
}
void scale(const float* in, float factor, int64_t n, c10::Half* out) {
  scale_narrow(in, factor, n, out);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
