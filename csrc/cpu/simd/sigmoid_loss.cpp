// Vector kernel of the sigmoid loss: turns a tile of dot products into its gradients.
#include "sigmoid_loss.h"

#include <math.h>

#include "vec_math.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

template <typename V>
struct Coefficients {
  V scale, bias, factor;
  explicit Coefficients(const SigmoidParams& p)
      : scale(p.scale), bias(p.bias), factor(p.grad_factor) {}
};

template <typename V>
struct Partial {
  V loss = V(0), dz_dot = V(0), dz = V(0);
};

template <typename V>
inline double sum(V v) {
  typename V::value_type lanes[V::size()];
  v.store(lanes);
  double total = 0;
  for (int i = 0; i < V::size(); ++i) total += lanes[i];
  return total;
}

// Pairs that do not match: loss softplus(z), dz = sigmoid(z). Adds the first `count` lanes to the
// sums and returns d(loss)/d(dot).
template <bool kGrad, typename V>
TILEWISE_INLINE V negative(V dot, const Coefficients<V>& c, Partial<V>& partial, int64_t count) {
  const V zero(0), one(1);
  const bool full = count >= V::size();  // known when compiled, in the loops below
  const V z = at::vec::fmadd(dot, c.scale, c.bias);
  const V e = exp_nonpositive(z.abs().neg());  // in (0, 1]: nothing overflows
  const V loss = at::vec::clamp_min(z, zero) + log1p_unit(e);
  partial.loss = partial.loss + (full ? loss : V::set(zero, loss, count));
  if (!kGrad) return dot;
  V dz = V::blendv(e, one, z > zero) * reciprocal(one + e);
  if (!full) dz = V::set(zero, dz, count);
  partial.dz_dot = at::vec::fmadd(dz, dot, partial.dz_dot);
  partial.dz = partial.dz + dz;
  return dz * c.factor;
}

template <bool kGrad, typename scalar_t>
TILEWISE_INLINE void negatives(const scalar_t* dots, scalar_t* grads, int64_t n,
                               const Coefficients<Vectorized<scalar_t>>& c,
                               Partial<Vectorized<scalar_t>>& partial) {
  using V = Vectorized<scalar_t>;
  int64_t j = 0;
  for (; j + V::size() <= n; j += V::size()) {
    const V g = negative<kGrad>(V::loadu(dots + j), c, partial, V::size());
    if (kGrad) g.store(grads + j);
  }
  if (const int64_t rest = n - j) {
    const V g = negative<kGrad>(V::loadu(dots + j, rest), c, partial, rest);
    if (kGrad) g.store(grads + j, rest);
  }
}

// Two float vectors make one of bfloat16.
template <bool kGrad>
TILEWISE_INLINE void negatives(const float* dots, c10::BFloat16* grads, int64_t n,
                               const Coefficients<Float>& c, Partial<Float>& partial) {
  constexpr int64_t kWidth = Float::size();
  int64_t j = 0;
  for (; j + 2 * kWidth <= n; j += 2 * kWidth) {
    const Float a = negative<kGrad>(Float::loadu(dots + j), c, partial, kWidth);
    const Float b = negative<kGrad>(Float::loadu(dots + j + kWidth), c, partial, kWidth);
    if (kGrad) at::vec::convert_float_bfloat16(a, b).store(grads + j);
  }
  for (; j < n; j += kWidth) {
    const int64_t rest = n - j < kWidth ? n - j : kWidth;
    const Float a = negative<kGrad>(Float::loadu(dots + j, rest), c, partial, rest);
    if (kGrad) at::vec::convert_float_bfloat16(a, a).store(grads + j, rest);
  }
}

// A pair that matches: loss softplus(-z), dz = sigmoid(z) - 1 = -sigmoid(-z).
template <bool kGrad, typename scalar_t, typename grad_t>
inline void positive(const scalar_t* dots, grad_t* grads, const SigmoidParams& params,
                     SigmoidSums& sums) {
  const double dot = *dots;
  const double z = params.scale * dot + params.bias;
  const double e = ::exp(-::fabs(z));
  const double dz = -(z > 0 ? e : 1.0) / (1.0 + e);
  sums.loss += (z < 0 ? -z : 0.0) + ::log1p(e);
  sums.dz_dot += dz * dot;
  sums.dz += dz;
  if (kGrad) *grads = static_cast<grad_t>(dz * params.grad_factor);
}

template <bool kGrad, typename scalar_t, typename grad_t>
SigmoidSums tile(const SigmoidTile& t, const SigmoidParams& params) {
  using V = Vectorized<scalar_t>;
  const FlushDenormals flush;
  const Coefficients<V> c(params);
  SigmoidSums sums;
  for (int64_t i = 0; i < t.rows; ++i) {
    const scalar_t* dots = static_cast<const scalar_t*>(t.dots) + i * t.dots_stride;
    grad_t* grads = static_cast<grad_t*>(t.grads) + i * t.grads_stride;
    Partial<V> partial;  // one row's worth: float32 lanes stay short, rows are added in float64
    int64_t j = 0;
    for (int64_t p = t.begin[i]; p < t.begin[i + 1]; ++p) {
      const int64_t d = t.positives[p];
      negatives<kGrad>(dots + j, grads + j, d - j, c, partial);
      positive<kGrad>(dots + d, grads + d, params, sums);
      j = d + 1;
    }
    negatives<kGrad>(dots + j, grads + j, t.cols - j, c, partial);
    sums.loss += sum(partial.loss);
    sums.dz_dot += sum(partial.dz_dot);
    sums.dz += sum(partial.dz);
  }
  return sums;
}

template <bool kGrad>
SigmoidSums tile(TileType type, const SigmoidTile& t, const SigmoidParams& params) {
  switch (type) {
    case TileType::Double:
      return tile<kGrad, double, double>(t, params);
    case TileType::FloatToBFloat16:
      return tile<kGrad, float, c10::BFloat16>(t, params);
    default:
      return tile<kGrad, float, float>(t, params);
  }
}

}  // namespace

SigmoidSums sigmoid_tile(TileType type, const SigmoidTile& t, const SigmoidParams& params) {
  return params.need_grad ? tile<true>(type, t, params) : tile<false>(type, t, params);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
