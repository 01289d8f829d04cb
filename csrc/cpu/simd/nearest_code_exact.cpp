// Exact distances, in float64 and in one fixed order: element d goes to lane d mod 8, each lane is
// summed in sequence without FMA (the build forbids contraction), then the lanes in a tree. The
// same bits on every instruction set.
#include <cmath>
#include <cstring>
#include <limits>

#include "nearest_code_lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

template <typename T>
double lane_norm(const T* v, int64_t dim) {
  Lanes sum = Lanes::all(0.0);
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) sum = sum + load(v + d) * load(v + d);
  if (d < dim) {
    const Lanes rest = load_first(v + d, dim - d);
    sum = sum + rest * rest;
  }
  return std::sqrt(tree(sum));
}

// Sums of `term` over the elements of x (dim) and of four codes.
template <typename X, typename T, typename Term>
TILEWISE_INLINE void sum_four(const X* x, const T* const (&codes)[4], int64_t dim, const Term& term,
                              double (&out)[4]) {
  Lanes sums[4] = {Lanes::all(0.0), Lanes::all(0.0), Lanes::all(0.0), Lanes::all(0.0)};
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    const Lanes v = load(x + d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] = sums[i] + term(v, load(codes[i] + d));
  }
  if (d < dim) {
    const Lanes v = load_first(x + d, dim - d);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[i] = sums[i] + term(v, load_first(codes[i] + d, dim - d));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) out[i] = tree(sums[i]);
}

// The codes are order[0], order[step], order[2 * step] and order[3 * step].
template <typename X, typename T>
void four_distances(const Search& search, const Row& row, const int64_t* order, int64_t step,
                    double (&out)[4]) {
  const X* x = row_of<X>(search.x, row.index);
  const T* const codes[4] = {
      row_of<T>(search.codebook, order[0]), row_of<T>(search.codebook, order[step]),
      row_of<T>(search.codebook, order[2 * step]), row_of<T>(search.codebook, order[3 * step])};
  if (search.metric == Metric::L2) {
    const auto square = [](Lanes a, Lanes b) {
      const Lanes difference = a - b;
      return difference * difference;
    };
    return sum_four(x, codes, search.dim, square, out);
  }
  sum_four(x, codes, search.dim, [](Lanes a, Lanes b) { return a * b; }, out);
  for (int i = 0; i < 4; ++i) {
    if (search.metric == Metric::Dot) {
      out[i] = -out[i];
    } else {
      const double code_norm = search.norms[order[i * step]];
      const bool zero = (row.norm == 0.0 || code_norm == 0.0) && !std::isnan(out[i]);
      out[i] = zero ? 1.0 : 1.0 - out[i] / (row.norm * code_norm);
    }
  }
}

TILEWISE_INLINE void four_distances(const Search& search, const Row& row, const int64_t* order,
                                    int64_t step, double (&out)[4]) {
  if (search.x.is_double) {
    search.codebook.is_double ? four_distances<double, double>(search, row, order, step, out)
                              : four_distances<double, float>(search, row, order, step, out);
  } else {
    search.codebook.is_double ? four_distances<float, double>(search, row, order, step, out)
                              : four_distances<float, float>(search, row, order, step, out);
  }
}

}  // namespace

void exact_four(const Search& search, const Row& row, const int64_t* order, int64_t step,
                double (&out)[4]) {
  four_distances(search, row, order, step, out);
}

namespace {

// Nearest first, the lower index among equals, NaN last.
TILEWISE_INLINE bool before(double a, int64_t i, double b, int64_t j) {
  if (a < b) return true;
  if (a > b) return false;
  if (a == b) return i < j;
  return std::isnan(b) && (!std::isnan(a) || i < j);
}

// The k-th best distance as a score, rounded up. Whatever has a larger lower bound is out.
TILEWISE_INLINE void tighten(const Search& search, const Packed& packed, Row& row) {
  const double scaled = row.best_distance[search.k - 1] * packed.distance_factor;
  const double score = scaled + row.shift + row.slack + packed.rounding * std::abs(scaled);
  // Far beyond float's range nothing is certain: the row goes to the exact comparison.
  if (!(std::abs(score) < 1e35)) row.hard = true;
  row.threshold = static_cast<float>(score + std::abs(score) * 0x1p-21 + 0x1p-120);
}

}  // namespace

void compare_codes(const Search& search, const int64_t* order, int64_t count, const int64_t* next,
                   Row& row) {
  double distance[4];
  four_distances(search, row, order, kGroups, distance);
  if (search.k == 1) {  // what fills up a panel is a code once more
    for (int i = 0; i < 4; ++i) keep_nearer(distance[i], order[i * kGroups], row);
    row.found = row.best_index[0] < search.codes;
  } else {
    for (int64_t i = 0; i < 4 && i < count; ++i) {
      bool kept = insert(search.k, distance[i], order[i * kGroups], row);
      if (!next) continue;
      for (int64_t j = order[i * kGroups]; kept && (j = next[j]) >= 0;) {
        kept = insert(search.k, distance[i], j, row);
      }
    }
  }
  ++row.groups;
}

namespace {

TILEWISE_INLINE void compare_group(const Search& search, const Packed& packed, int64_t group,
                                   Row& row) {
  const int64_t first = group / kGroups * kPanel + group % kGroups;
  if (first >= packed.codes) return;  // nothing but what fills up the last panel
  compare_codes(search, packed.order + first, (packed.codes - first + kGroups - 1) / kGroups,
                packed.next, row);
  if (row.found == search.k) tighten(search, packed, row);
}

// Which of 16 bounds are at most `limit`, as bits.
TILEWISE_INLINE uint32_t at_most(const float* bounds, float limit) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(bounds), _mm512_set1_ps(limit), _CMP_LE_OQ);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 top = _mm256_set1_ps(limit);
  const __m256 low = _mm256_cmp_ps(_mm256_loadu_ps(bounds), top, _CMP_LE_OQ);
  const __m256 high = _mm256_cmp_ps(_mm256_loadu_ps(bounds + 8), top, _CMP_LE_OQ);
  return _mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8;
#else
  uint32_t bits = 0;
  for (int l = 0; l < kGroups; ++l) bits |= (bounds[l] <= limit) << l;
  return bits;
#endif
}

// Fetches the codes of a group: they lie anywhere in a codebook that is larger than the cache.
void prefetch_group(const Search& search, const Packed& packed, int64_t group) {
  const int64_t* order = packed.order + group / kGroups * kPanel + group % kGroups;
  const int64_t size = search.codebook.is_double ? sizeof(double) : sizeof(float);
  for (int i = 0; i < 4; ++i) {
    const char* code = static_cast<const char*>(search.codebook.data) +
                       order[i * kGroups] * search.codebook.stride * size;
    for (int64_t at = 0; at < search.dim * size; at += 64) __builtin_prefetch(code + at, 0, 2);
  }
}

// A running minimum and where it was found. No branch depends on the values.
struct Low {
  Floats value;
  Ints where;

  TILEWISE_INLINE void take(const Floats& next, const Ints& place) {
    where = if_less(next, value, place, where);
    value = lower(next, value);
  }
  TILEWISE_INLINE void take(const float* bounds, int64_t g) {
    take(Floats::load(bounds + g), Ints::all(static_cast<int32_t>(g)));
  }
};

// The group with the smallest bound, -1 if there is none.
int64_t smallest_group(const float* bounds, int64_t count) {
  const float infinity = std::numeric_limits<float>::infinity();
  Low even{Floats::all(infinity), Ints::all(0)}, odd = even;
  for (int64_t g = 0; g + kGroups < count; g += 2 * kGroups) {
    even.take(bounds, g);
    odd.take(bounds, g + kGroups);
  }
  if (count / kGroups % 2) even.take(bounds, count - kGroups);
  even.take(odd.value, odd.where);
  const float least = fold(even.value, Smallest());
  if (least == infinity) return -1;
  float values[kGroups];
  int32_t where[kGroups];
  even.value.store(values);
  even.where.store(where);
  const int lane = __builtin_ctz(at_most(values, least));
  return where[lane] + lane;
}

// Appends the groups of bounds[begin..end) that are at most `limit`.
TILEWISE_INLINE Candidate* append_groups(const float* bounds, int64_t begin, int64_t end,
                                         float limit, int32_t row, Candidate* candidates) {
  for (int64_t g = begin; g < end; g += kGroups) {
    for (uint32_t bits = at_most(bounds + g, limit); bits; bits &= bits - 1) {
      *candidates++ = {row, static_cast<int32_t>(g) + __builtin_ctz(bits)};
    }
  }
  return candidates;
}

// All groups whose bound is at most `limit`; stops beyond `max_groups`. Returns their end.
Candidate* find_groups(const float* bounds, int64_t count, float limit, int64_t max_groups,
                       int32_t row, Candidate* candidates) {
  constexpr int64_t kStep = 4 * kGroups;
  Candidate* end = candidates;
  int64_t g = 0;
  for (; g + kStep <= count && end - candidates <= max_groups; g += kStep) {
    Floats low = Floats::load(bounds + g);
    for (int i = 1; i < 4; ++i) low = lower(low, Floats::load(bounds + g + i * kGroups));
    float values[kGroups];
    low.store(values);
    if (at_most(values, limit)) end = append_groups(bounds, g, g + kStep, limit, row, end);
  }
  if (end - candidates <= max_groups) end = append_groups(bounds, g, count, limit, row, end);
  return end;
}

// Some exact distances for each row, which give it its threshold. The codes are on their way to
// the cache for `ahead` rows before they are needed.
void compare_smallest(const Search& search, const Packed& packed, int64_t first, int64_t count,
                      int64_t ahead, const RowBlock& block, Candidate* smallest) {
  for (int64_t i = 0; i < block.count + ahead; ++i) {
    if (i < block.count && !block.rows[i]->hard && block.rows[i]->found < search.k) {
      smallest[i].group =
          static_cast<int32_t>(smallest_group(block.minima + i * block.stride, count));
      if (smallest[i].group >= 0) prefetch_group(search, packed, first + smallest[i].group);
    }
    if (i < ahead) continue;
    Row& row = *block.rows[i - ahead];
    float* bounds = block.minima + (i - ahead) * block.stride;
    if (row.hard || row.found == search.k) continue;
    for (int64_t g = smallest[i - ahead].group; g >= 0; g = smallest_group(bounds, count)) {
      compare_group(search, packed, first + g, row);
      bounds[g] = std::numeric_limits<float>::infinity();
      if (row.found == search.k || row.hard) break;
    }
  }
}

}  // namespace

void resolve(const Search& search, const Packed& packed, int64_t first_panel, int64_t panels,
             int64_t group_limit, const RowBlock& block, Candidate* candidates) {
  const int64_t first = first_panel * kGroups, count = panels * kGroups;
  // As many groups as take a quarter of a MiB.
  int64_t ahead = (1 << 16) / (4 * search.dim + 1) + 1;
  ahead = ahead < block.count ? ahead : block.count;
  compare_smallest(search, packed, first, count, ahead, block, candidates);
  // What the thresholds leave is compared as well, which may lower them further.
  Candidate* end = candidates;
  for (int64_t i = 0; i < block.count; ++i) {
    Row& row = *block.rows[i];
    if (!row.hard) {
      const int64_t max_groups = group_limit - row.groups;
      Candidate* const own = end;
      end = find_groups(block.minima + i * block.stride, count, row.threshold, max_groups,
                        static_cast<int32_t>(i), own);
      row.hard = end - own > max_groups;
      if (row.hard) end = own;
      for (Candidate* c = own; c < end; ++c) prefetch_group(search, packed, first + c->group);
    }
    if (end - candidates < ahead && i + 1 < block.count) continue;
    for (const Candidate* c = candidates; c < end; ++c) {
      Row& its = *block.rows[c->row];
      // The threshold may have been lowered since.
      const bool out = block.minima[c->row * block.stride + c->group] > its.threshold;
      if (!out && !its.hard) compare_group(search, packed, first + c->group, its);
    }
    end = candidates;
  }
}

double exact_norm(const Matrix& matrix, int64_t row, int64_t dim) {
  return matrix.is_double ? lane_norm(row_of<double>(matrix, row), dim)
                          : lane_norm(row_of<float>(matrix, row), dim);
}

bool insert(int64_t k, double distance, int64_t index, Row& row) {
  int64_t at = row.found;
  if (at == k) {
    if (!before(distance, index, row.best_distance[k - 1], row.best_index[k - 1])) return false;
    --at;
  } else {
    ++row.found;
  }
  for (; at > 0 && before(distance, index, row.best_distance[at - 1], row.best_index[at - 1]);
       --at) {
    row.best_distance[at] = row.best_distance[at - 1];
    row.best_index[at] = row.best_index[at - 1];
  }
  row.best_distance[at] = distance;
  row.best_index[at] = index;
  return true;
}

void compare_all(const Search& search, int64_t first_code, int64_t last_code, Row& row) {
  if (search.metric == Metric::Cosine) row.norm = exact_norm(search.x, row.index, search.dim);
  for (int64_t j = first_code; j < last_code; j += 4) {
    const int64_t last = last_code - 1;
    const int64_t order[4] = {j, j + 1 < last ? j + 1 : last, j + 2 < last ? j + 2 : last,
                              j + 3 < last ? j + 3 : last};
    double distance[4];
    four_distances(search, row, order, 1, distance);
    for (int i = 0; i < 4 && j + i < last_code; ++i) insert(search.k, distance[i], j + i, row);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
