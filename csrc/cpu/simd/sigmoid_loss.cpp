// Vector kernel of the sigmoid loss: a block of dot products becomes its gradients.
#include "sigmoid_loss.h"

#include <ATen/cpu/vec/vec.h>
#include <math.h>

#include "flush_denormals.h"
#include "lane_math.h"
#include "lane_sum.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

// float64 takes torch's functions.
template <typename F>
TILEWISE_INLINE Lanes each(const Lanes& x, const F& f) {
  using V = at::vec::Vectorized<double>;
  double lanes[8];
  x.store(lanes);
  for (int i = 0; i < 8; i += V::size()) f(V::loadu(lanes + i)).store(lanes + i);
  return Lanes::load(lanes);
}
TILEWISE_INLINE Lanes exp_nonpositive(const Lanes& x) {
  return each(x, [](auto v) { return v.exp(); });
}
TILEWISE_INLINE Lanes log1p_unit(const Lanes& x) {
  return each(x, [](auto v) { return v.log1p(); });
}
TILEWISE_INLINE Lanes reciprocal(const Lanes& x) { return Lanes::all(1.0) / x; }
TILEWISE_INLINE Lanes minus_abs(const Lanes& x) {
  return (x.as<Longs>() | Longs::all(INT64_MIN)).as<Lanes>();
}
TILEWISE_INLINE Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return a * b + c;
}

// The vector of an element type.
template <typename T>
using Vector = std::conditional_t<std::is_same_v<T, double>, Lanes, Floats>;

template <typename T>
struct Coefficients {
  Vector<T> scale, bias, factor;
  explicit Coefficients(const SigmoidBlock& block)
      : scale(Vector<T>::all(static_cast<T>(block.scale))),
        bias(Vector<T>::all(static_cast<T>(block.coefficients.bias))),
        factor(Vector<T>::all(static_cast<T>(block.coefficients.grad_factor))) {}
};

// loss, dz * dot and dz of some pairs.
template <typename V>
struct Terms {
  V loss, dz_dot, dz;
};

template <typename V>
TILEWISE_INLINE Terms<V> operator+(const Terms<V>& a, const Terms<V>& b) {
  return {a.loss + b.loss, a.dz_dot + b.dz_dot, a.dz + b.dz};
}

// What a row's pairs add up to.
template <typename T>
struct Totals {
  LaneSum<Vector<T>> loss, dz_dot, dz;
};

template <bool kGrad, typename T>
TILEWISE_INLINE void add(const Terms<Vector<T>>& terms, Totals<T>& totals) {
  totals.loss.add(terms.loss);
  if (!kGrad) return;
  totals.dz_dot.add(terms.dz_dot);
  totals.dz.add(terms.dz);
}

// A vector of pairs that do not match: loss softplus(z), dz = sigmoid(z).
template <bool kGrad, typename T, typename V = Vector<T>>
TILEWISE_INLINE Terms<V> negative(const V& dot, const Coefficients<T>& c) {
  const V zero = V::all(0), one = V::all(1);
  const V z = multiply_add(dot, c.scale, c.bias);
  const V e = exp_nonpositive(minus_abs(z));  // in (0, 1]: nothing overflows
  Terms<V> out{zero, zero, zero};
  out.loss = higher(zero, z) + log1p_unit(e);  // NaN passes
  if (!kGrad) return out;
  out.dz = if_less(zero, z, one, e) * reciprocal(one + e);
  out.dz_dot = out.dz * dot;
  return out;
}

TILEWISE_INLINE void store(const Floats& v, float* out) { v.store(out); }
TILEWISE_INLINE void store(const Lanes& v, double* out) { v.store(out); }
TILEWISE_INLINE void store(const Floats& v, c10::BFloat16* out) { store_bfloat16(v, out); }

// What n pairs give, less than a vector.
template <bool kGrad, typename T, typename G, typename V = Vector<T>>
TILEWISE_INLINE Terms<V> rest(const T* dots, G* grads, int64_t n, const Coefficients<T>& c) {
  constexpr int64_t size = 64 / sizeof(T);
  T x[size] = {};
  G g[size];
  for (int64_t i = 0; i < n; ++i) x[i] = dots[i];
  const Terms<V> terms = negative<kGrad, T>(V::load(x), c);
  if (kGrad) {
    store(terms.dz * c.factor, g);
    for (int64_t i = 0; i < n; ++i) grads[i] = g[i];
  }
  const auto keep = [&](const V& v) {
    v.store(x);
    for (int64_t i = n; i < size; ++i) x[i] = 0;
    return V::load(x);
  };
  return {keep(terms.loss), keep(terms.dz_dot), keep(terms.dz)};
}

template <bool kGrad, typename T, typename G>
TILEWISE_INLINE void negatives(const T* dots, G* grads, int64_t n, const Coefficients<T>& c,
                               Totals<T>& totals) {
  using V = Vector<T>;
  constexpr int64_t size = 64 / sizeof(T);
  int64_t j = 0;
  const auto take = [&](int64_t k) __attribute__((always_inline)) {
    const Terms<V> terms = negative<kGrad, T>(V::load(dots + j + k * size), c);
    if (kGrad) store(terms.dz * c.factor, grads + j + k * size);
    return terms;
  };
  for (; j + kPairedSum * size <= n; j += kPairedSum * size) {
    add<kGrad, T>(add_pairs<kPairedSum>(take), totals);
  }
  for (; j + kShortSum * size <= n; j += kShortSum * size) {
    add<kGrad, T>(add_pairs<kShortSum>(take), totals);
  }
  if (j == n) return;
  Terms<V> sum{V::all(0), V::all(0), V::all(0)};
  for (; j + size <= n; j += size) sum = sum + take(0);
  if (j < n) sum = sum + rest<kGrad>(dots + j, grads + j, n - j, c);
  add<kGrad, T>(sum, totals);
}

// A pair that matches: loss softplus(-z), dz = sigmoid(z) - 1 = -sigmoid(-z).
template <bool kGrad, typename T, typename G>
inline Terms<double> positive(const T* dots, G* grads, const SigmoidBlock& block) {
  const double dot = *dots, z = block.scale * dot + block.coefficients.bias;
  const double e = ::exp(-::fabs(z));
  const double dz = -(z > 0 ? e : 1.0) / (1.0 + e);
  if (kGrad) *grads = static_cast<G>(dz * block.coefficients.grad_factor);
  return {(z < 0 ? -z : 0.0) + ::log1p(e), dz * dot, dz};
}

template <bool kGrad, typename T, typename G>
SigmoidSums run(const SigmoidBlock& block, G* all_grads, int64_t stride) {
  const Coefficients<T> c(block);
  Totals<T> totals;
  Sum loss, dz_dot, dz;  // of the matches
  for (int64_t i = 0; i < block.rows; ++i) {
    const T* dots = static_cast<const T*>(block.dots) + i * block.stride;
    G* grads = all_grads + i * stride;
    int64_t j = 0;
    for (int64_t p = block.begin[i]; p < block.begin[i + 1]; ++p) {
      const int64_t match = block.positives[p];
      negatives<kGrad>(dots + j, grads + j, match - j, c, totals);
      const Terms<double> terms = positive<kGrad>(dots + match, grads + match, block);
      loss.add(terms.loss);
      dz_dot.add(terms.dz_dot);
      dz.add(terms.dz);
      j = match + 1;
    }
    negatives<kGrad>(dots + j, grads + j, block.cols - j, c, totals);
  }
  loss.add(totals.loss.value());
  dz_dot.add(totals.dz_dot.value());
  dz.add(totals.dz.value());
  return {loss.value(), dz_dot.value(), dz.value()};
}

template <bool kGrad>
SigmoidSums run(const SigmoidBlock& block, void* grads, int64_t stride, bool bfloat16) {
  if (block.is_double) return run<kGrad, double>(block, static_cast<double*>(grads), stride);
  if (bfloat16) return run<kGrad, float>(block, static_cast<c10::BFloat16*>(grads), stride);
  return run<kGrad, float>(block, static_cast<float*>(grads), stride);
}

}  // namespace

SigmoidSums sigmoid_block(const SigmoidBlock& block, void* grads, int64_t stride, bool bfloat16) {
  const FlushDenormals flush;
  return block.coefficients.need_grad ? run<true>(block, grads, stride, bfloat16)
                                      : run<false>(block, grads, stride, bfloat16);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
