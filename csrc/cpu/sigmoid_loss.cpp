// Vector kernel of the sigmoid loss: turns a tile of dot products into its gradients, in place.
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
  V dz = V::blendv(e, one, z > zero) / (one + e);
  if (!full) dz = V::set(zero, dz, count);
  partial.dz_dot = at::vec::fmadd(dz, dot, partial.dz_dot);
  partial.dz = partial.dz + dz;
  return dz * c.factor;
}

template <bool kGrad, typename scalar_t, typename V>
TILEWISE_INLINE void negatives(scalar_t* p, int64_t n, const Coefficients<V>& c,
                               Partial<V>& partial) {
  int64_t j = 0;
  for (; j + V::size() <= n; j += V::size()) {
    const V g = negative<kGrad>(V::loadu(p + j), c, partial, V::size());
    if (kGrad) g.store(p + j);
  }
  if (const int64_t rest = n - j) {
    const V g = negative<kGrad>(V::loadu(p + j, rest), c, partial, rest);
    if (kGrad) g.store(p + j, rest);
  }
}

// bfloat16 tiles are widened, two float vectors at a time.
template <bool kGrad>
TILEWISE_INLINE void negatives(c10::BFloat16* p, int64_t n, const Coefficients<Float>& c,
                               Partial<Float>& partial) {
  using Half = Vectorized<c10::BFloat16>;
  int64_t j = 0;
  for (; j + Half::size() <= n; j += Half::size()) {
    auto [a, b] = at::vec::convert_bfloat16_float(Half::loadu(p + j));
    a = negative<kGrad>(a, c, partial, Float::size());
    b = negative<kGrad>(b, c, partial, Float::size());
    if (kGrad) at::vec::convert_float_bfloat16(a, b).store(p + j);
  }
  if (const int64_t rest = n - j) {
    auto [a, b] = at::vec::convert_bfloat16_float(Half::loadu(p + j, rest));
    a = negative<kGrad>(a, c, partial, rest);
    b = negative<kGrad>(b, c, partial, rest > Float::size() ? rest - Float::size() : 0);
    if (kGrad) at::vec::convert_float_bfloat16(a, b).store(p + j, rest);
  }
}

// A pair that matches: loss softplus(-z), dz = sigmoid(z) - 1 = -sigmoid(-z).
template <bool kGrad, typename scalar_t>
inline void positive(scalar_t* p, const SigmoidParams& params, SigmoidSums& sums) {
  const double dot = *p;
  const double z = params.scale * dot + params.bias;
  const double e = ::exp(-::fabs(z));
  const double dz = -(z > 0 ? e : 1.0) / (1.0 + e);
  sums.loss += (z < 0 ? -z : 0.0) + ::log1p(e);
  sums.dz_dot += dz * dot;
  sums.dz += dz;
  if (kGrad) *p = static_cast<scalar_t>(dz * params.grad_factor);
}

template <bool kGrad, typename scalar_t, typename V>
SigmoidSums tile(const SigmoidTile& t, const SigmoidParams& params) {
  const FlushDenormals flush;
  const Coefficients<V> c(params);
  SigmoidSums sums;
  for (int64_t i = 0; i < t.rows; ++i) {
    scalar_t* row = static_cast<scalar_t*>(t.dots) + i * t.stride;
    Partial<V> partial;  // one row's worth: float32 lanes stay short, rows are added in float64
    const int64_t d = t.diagonal == kNoPositives ? -1 : i + t.diagonal;
    if (d >= 0 && d < t.cols) {
      negatives<kGrad>(row, d, c, partial);
      positive<kGrad>(row + d, params, sums);
      negatives<kGrad>(row + d + 1, t.cols - d - 1, c, partial);
    } else {
      negatives<kGrad>(row, t.cols, c, partial);
    }
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
      return tile<kGrad, double, Double>(t, params);
    case TileType::BFloat16:
      return tile<kGrad, c10::BFloat16, Float>(t, params);
    default:
      return tile<kGrad, float, Float>(t, params);
  }
}

}  // namespace

SigmoidSums sigmoid_tile(TileType type, const SigmoidTile& t, const SigmoidParams& params) {
  return params.need_grad ? tile<true>(type, t, params) : tile<false>(type, t, params);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
