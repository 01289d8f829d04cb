// What filters of nearest_code make of rows and codes: transformed, quantised, and the bounds that
// integers start from.

#include <cmath>
#include <cstring>
#include <limits>

#include "nearest_code_lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

// Calls take(d, integers) with 16 quantised elements at a time. Returns the norm of the rest.
template <typename Take>
TILEWISE_INLINE double quantize(const float* v, double norm, int64_t depth, double scale, int limit,
                                const Take& take) {
  const Floats unit = Floats::all(static_cast<float>(scale));
  const Floats inverse = Floats::all(static_cast<float>(1.0 / scale));
  const Floats high = Floats::all(static_cast<float>(limit)), low = Floats::all(0.0f) - high;
  const Floats magic = Floats::all(0x1.8p23f);
  Floats squares = Floats::all(0.0f);
  for (int64_t d = 0; d < depth; d += 16) {
    const Floats value = Floats::load(v + d);
    const Floats shifted = higher(lower(value * inverse, high), low) + magic;
    const Floats rest = value - (shifted - magic) * unit;
    squares = squares + rest * rest;
    take(d, shifted.as<Ints>() - magic.as<Ints>());  // an integer stands in the low bits
  }
  // Up, by the rounding of these lines, and of v to float.
  const double residual = std::sqrt(fold(squares, Add())) * (1.0 + (depth + 32) * 0x1p-23);
  return residual + (norm + residual) * 0x1p-21 + 0x1p-120;
}

// The low bytes of 16 integers.
TILEWISE_INLINE void store_bytes(const Ints& integers, void* out) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)integers.v[0]);
  std::memcpy(out, &bytes, sizeof bytes);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i mask = _mm256_set1_epi32(255);
  const __m256i words =
      _mm256_packus_epi32((__m256i)integers.v[0] & mask, (__m256i)integers.v[1] & mask);
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes =
      _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  std::memcpy(out, &bytes, sizeof bytes);
#else
  int32_t words[16];
  integers.store(words);
  for (int i = 0; i < 16; ++i) static_cast<uint8_t*>(out)[i] = static_cast<uint8_t>(words[i]);
#endif
}

}  // namespace

double quantize_row(const float* v, double norm, int64_t depth, double scale, int limit,
                    uint8_t* q) {
  const Ints offset = Ints::all(limit + 1);
  return quantize(v, norm, depth, scale, limit,
                  [&](int64_t d, const Ints& integers) { store_bytes(integers + offset, q + d); });
}

double quantize_code(const float* v, double norm, int64_t depth, double scale, int limit,
                     int8_t* quads, int32_t& sum) {
  Ints sums = Ints::all(0);
  const double residual =
      quantize(v, norm, depth, scale, limit, [&](int64_t d, const Ints& integers) {
        int8_t bytes[16];
        store_bytes(Ints::all(0) - integers, bytes);
        for (int64_t i = 0; i < 16 && d + i < depth; i += 4) {
          std::memcpy(quads + (d + i) * kPanel, bytes + i, 4);
        }
        sums = sums + integers;
      });
  sum = fold(sums, Add());
  return residual;
}

bool integer_bias(const Packed& packed, int64_t first_panel, int64_t panels, double row_scale,
                  const Parts& parts, int limit, int32_t* bias) {
  const Floats length = Floats::all(static_cast<float>(parts.length * (1.0 + 0x1p-20)));
  const Floats residual = Floats::all(static_cast<float>(parts.residual * (1.0 + 0x1p-20)));
  const Floats highest = Floats::all(0x1p30f), lowest = Floats::all(-0x1p30f);
  const Floats rounding = Floats::all(0x1p-21f), two = Floats::all(2.0f);
  const Ints offset = Ints::all(limit + 1), none = Ints::all(0), one = Ints::all(1);
  Ints valid = one;
  for (int64_t p = 0; p < panels; ++p) {
    const Floats inverse =
        Floats::all(static_cast<float>(1.0 / (row_scale * packed.scales[first_panel + p])));
    for (int64_t j = p * kPanel; j < (p + 1) * kPanel; j += 16) {
      const int64_t at = first_panel * kPanel + j;
      const Floats square = Floats::load(packed.bias + at);
      const Floats margin =
          Floats::load(packed.residual + at) * length + Floats::load(packed.length + at) * residual;
      // Rounded down: less the rounding of this line and of the conversion.
      Floats bound = (square - margin - (square + margin) * rounding) * inverse - two;
      valid = valid & if_less(lowest, bound, one, none);                // NaN is not
      bound = higher(if_less(bound, highest, bound, highest), lowest);  // also where it is infinite
      (convert<int32_t>(bound) + Ints::load(packed.sums + at) * offset).store(bias + j);
    }
  }
  return fold(valid, Smallest()) == 1;
}

double fingerprint(const Matrix& matrix, int64_t row, int64_t dim) {
  // Lanes differ in their weights, steps in how often they were multiplied.
  constexpr double kWeights[8] = {1.0,           -0.7548776662, 0.5698402910,  0.8191725134,
                                  -0.6710436067, 0.5497004779,  -0.8566748838, 0.7338918566};
  const Lanes factor = Lanes::all(0.9961);
  const auto run = [&](const auto* v) {
    Lanes sum = Lanes::all(0.0);
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) sum = sum * factor + load(v + d);
    if (d < dim) sum = sum * factor + load_first(v + d, dim - d);
    return tree(sum * Lanes::load(kWeights)) + 0.0;  // not -0, which equals 0 as a number only
  };
  return matrix.is_double ? run(row_of<double>(matrix, row)) : run(row_of<float>(matrix, row));
}

bool equal_rows(const Matrix& matrix, int64_t row, int64_t other, int64_t dim) {
  const auto run = [&](const auto* a, const auto* b) {
    if (std::memcmp(a, b, dim * sizeof *a) == 0) return true;
    for (int64_t d = 0; d < dim; ++d) {  // -0 is 0
      if (a[d] != b[d]) return false;
    }
    return true;
  };
  return matrix.is_double ? run(row_of<double>(matrix, row), row_of<double>(matrix, other))
                          : run(row_of<float>(matrix, row), row_of<float>(matrix, other));
}

void add_row(const Matrix& matrix, int64_t row, int64_t dim, double factor, double* sums) {
  const auto add = [&](const auto* v) {
    for (int64_t d = 0; d < dim; ++d) sums[d] += v[d] * factor;
  };
  matrix.is_double ? add(row_of<double>(matrix, row)) : add(row_of<float>(matrix, row));
}

namespace {

template <bool scale, bool subtract, typename T>
Moments transform(const T* v, int64_t dim, const Transform& how, float* out) {
  const Lanes pre = Lanes::all(how.pre), post = Lanes::all(how.post);
  const Longs absolute = Longs::all(std::numeric_limits<int64_t>::max());
  Lanes squares = Lanes::all(0.0), dots = squares;
  Longs largest = Longs::all(0);
  const auto take = [&](Lanes x, int64_t d) __attribute__((always_inline)) {
    if (scale) x = x * pre;
    const Lanes centre = load(how.centre + d);
    if (subtract) x = x - centre;
    x = x * post;
    squares = squares + x * x;
    if (!subtract) dots = dots + x * centre;
    // Absolute values order as integers do, for which there is a maximum without a NaN's rules.
    largest = higher(x.template as<Longs>() & absolute, largest);
    narrow(x, out + d);
  };
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) take(load(v + d), d);
  if (d < dim) take(load_first(v + d, dim - d), d);
  for (d = (dim + 7) / 8 * 8; d < (dim + 15) / 16 * 16; ++d) out[d] = 0.0f;
  return {tree(squares), subtract ? 0.0 : tree(dots), fold(largest.as<Lanes>(), Largest())};
}

}  // namespace

// Sums here are not those of the contract: their rounding is in `slack`.
Moments transform(const Matrix& matrix, int64_t row, int64_t dim, const Transform& how,
                  float* out) {
  const auto run = [&](const auto* v) {
    if (how.subtract) {
      return how.pre == 1.0 ? transform<false, true>(v, dim, how, out)
                            : transform<true, true>(v, dim, how, out);
    }
    return how.pre == 1.0 ? transform<false, false>(v, dim, how, out)
                          : transform<true, false>(v, dim, how, out);
  };
  return matrix.is_double ? run(row_of<double>(matrix, row)) : run(row_of<float>(matrix, row));
}

void prepare_row(const Search& search, const Packed& packed, Row& row, float* a) {
  const bool l2 = search.metric == Metric::L2, cosine = search.metric == Metric::Cosine;
  if (cosine) row.norm = exact_norm(search.x, row.index, search.dim);
  // A row without a direction is infinite then, and left to the exact comparison.
  const Transform how{cosine ? 1.0 / row.norm : 1.0, packed.centre, l2, packed.size};
  const Moments moments = transform(search.x, row.index, search.dim, how, a);
  row.largest = moments.largest;
  row.length = std::sqrt(moments.square);
  if (l2) {
    row.shift = -0.5 * moments.square - packed.least_bias;
    row.slack = packed.rounding * (moments.square + packed.least_bias);
  } else {
    row.shift = moments.dot * packed.size - cosine;
    row.slack = packed.rounding * (cosine ? 4.0 : row.length * packed.largest * packed.size);
  }
  row.found = row.groups = 0;
  row.best_distance[0] = std::numeric_limits<double>::infinity();
  row.best_index[0] = std::numeric_limits<int64_t>::max();
  row.threshold = std::numeric_limits<float>::infinity();
  row.hard = !(moments.square < 1e300);  // NaN, infinity
  if (cosine) row.hard |= !in_range(row.norm);
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
