// Exact distances, in float64 and in one fixed order: element d goes to lane d mod 8, each lane is
// summed in sequence without FMA (the build forbids contraction), then the lanes in a tree. The
// same bits on every instruction set.
#include <cmath>
#include <cstring>
#include <limits>

#include "nearest_code.h"
#include "vec_math.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

typedef double Lanes __attribute__((vector_size(64)));
typedef float Floats8 __attribute__((vector_size(32)));

TILEWISE_INLINE Lanes load(const double* p) {
  Lanes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

TILEWISE_INLINE Lanes load(const float* p) {
  Floats8 v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Lanes);
}

template <typename T>
TILEWISE_INLINE Lanes load_first(const T* p, int64_t count) {
  T buffer[8] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

TILEWISE_INLINE double tree(Lanes v) {
  const double a = v[0] + v[4], b = v[1] + v[5], c = v[2] + v[6], d = v[3] + v[7];
  return (a + c) + (b + d);
}

template <typename T>
const T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}

template <typename T>
double lane_norm(const T* v, int64_t dim) {
  Lanes sum = {};
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) sum += load(v + d) * load(v + d);
  if (d < dim) {
    const Lanes rest = load_first(v + d, dim - d);
    sum += rest * rest;
  }
  return std::sqrt(tree(sum));
}

template <typename T>
void widen(const T* v, int64_t dim, double* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = v[d];
}

// Sums of `term` over the elements of x (dim, in double) and of four codes.
template <typename T, typename Term>
TILEWISE_INLINE void sum_four(const double* x, const T* const (&codes)[4], int64_t dim,
                              const Term& term, double (&out)[4]) {
  Lanes sums[4] = {};
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    const Lanes v = load(x + d);
    for (int i = 0; i < 4; ++i) sums[i] += term(v, load(codes[i] + d));
  }
  if (d < dim) {
    const Lanes v = load_first(x + d, dim - d);
    for (int i = 0; i < 4; ++i) sums[i] += term(v, load_first(codes[i] + d, dim - d));
  }
  for (int i = 0; i < 4; ++i) out[i] = tree(sums[i]);
}

template <typename T>
void four_distances(const Search& search, const double* x, double x_norm,
                    const int64_t (&index)[4], double (&out)[4]) {
  const T* codes[4];
  for (int i = 0; i < 4; ++i) codes[i] = row_of<T>(search.codebook, index[i]);
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
      const double code_norm = search.norms[index[i]];
      const bool zero = (x_norm == 0.0 || code_norm == 0.0) && !std::isnan(out[i]);
      out[i] = zero ? 1.0 : 1.0 - out[i] / (x_norm * code_norm);
    }
  }
}

void four_distances(const Search& search, const double* x, double x_norm,
                    const int64_t (&index)[4], double (&out)[4]) {
  search.codebook.is_double ? four_distances<double>(search, x, x_norm, index, out)
                            : four_distances<float>(search, x, x_norm, index, out);
}

// Nearest first, the lower index among equals, NaN last.
TILEWISE_INLINE bool before(double a, int64_t i, double b, int64_t j) {
  if (a < b) return true;
  if (a > b) return false;
  if (a == b) return i < j;
  return std::isnan(b) && (!std::isnan(a) || i < j);
}

void load_row(const Search& search, const Row& row, double* wide) {
  search.x.is_double ? widen(row_of<double>(search.x, row.index), search.dim, wide)
                     : widen(row_of<float>(search.x, row.index), search.dim, wide);
}

// The k-th best distance as a score, rounded up. Whatever has a larger lower bound is out.
void tighten(const Search& search, const Packed& packed, Row& row) {
  const double distance = row.best_distance[search.k - 1];
  const bool l2 = search.metric == Metric::L2;
  const double scaled =
      distance * (l2 ? 0.5 * packed.size * packed.size : search.metric == Metric::Dot ? packed.size * packed.size : 1.0);
  const double rounding = (search.dim + 32) * 0x1p-51;
  const double score = scaled + row.shift + row.slack + rounding * std::abs(scaled);
  // Far beyond float's range nothing is certain: the row goes to the exact comparison.
  if (!(std::abs(score) < 1e35)) row.hard = true;
  row.threshold = static_cast<float>(score + std::abs(score) * 0x1p-21);
}

TILEWISE_INLINE void compare_group(const Search& search, const Packed& packed, int64_t group,
                                   const double* wide, Row& row) {
  const int64_t* order = packed.order + group / kGroups * kPanel + group % kGroups;
  int64_t index[4];
  for (int i = 0; i < 4; ++i) index[i] = order[i * kGroups] < 0 ? order[0] : order[i * kGroups];
  double distance[4];
  four_distances(search, wide, row.norm, index, distance);
  for (int i = 0; i < 4; ++i) {
    if (order[i * kGroups] >= 0) insert(search.k, distance[i], index[i], row);
  }
  ++row.groups;
  if (row.found == search.k) tighten(search, packed, row);
}

// Of the groups' bounds.
int64_t smallest(const float* bounds, int64_t count) {
  float low[kGroups];
  for (int l = 0; l < kGroups; ++l) low[l] = bounds[l];
  for (int64_t g = kGroups; g < count; g += kGroups) {
    for (int l = 0; l < kGroups; ++l) low[l] = bounds[g + l] < low[l] ? bounds[g + l] : low[l];
  }
  float least = low[0];
  for (int l = 1; l < kGroups; ++l) least = low[l] < least ? low[l] : least;
  for (int64_t g = 0; g < count; g += kGroups) {
    int hit = 0;
    for (int l = 0; l < kGroups; ++l) hit |= bounds[g + l] == least;
    if (!hit) continue;
    for (int l = 0; l < kGroups; ++l) {
      if (bounds[g + l] == least) return g + l;
    }
  }
  return 0;
}

void resolve_row(const Search& search, const Packed& packed, int64_t first_panel, int64_t count,
                 int64_t group_limit, float* bounds, const double* wide, Row& row) {
  const float out = std::numeric_limits<float>::infinity();
  const int64_t first = first_panel * kGroups;
  while (row.found < search.k && !row.hard) {
    const int64_t g = smallest(bounds, count);
    if (bounds[g] == out) return;
    compare_group(search, packed, first + g, wide, row);
    bounds[g] = out;
  }
  for (int64_t g = 0; g < count; g += kGroups) {
    int hit = 0;
    for (int l = 0; l < kGroups; ++l) hit |= bounds[g + l] <= row.threshold;
    if (!hit) continue;
    for (int l = 0; l < kGroups; ++l) {
      if (!(bounds[g + l] <= row.threshold)) continue;
      if (row.groups >= group_limit) row.hard = true;
      if (row.hard) return;
      compare_group(search, packed, first + g + l, wide, row);
    }
  }
}

}  // namespace

double exact_norm(const Matrix& matrix, int64_t row, int64_t dim) {
  return matrix.is_double ? lane_norm(row_of<double>(matrix, row), dim)
                          : lane_norm(row_of<float>(matrix, row), dim);
}

void insert(int64_t k, double distance, int64_t index, Row& row) {
  int64_t at = row.found;
  if (at == k) {
    if (!before(distance, index, row.best_distance[k - 1], row.best_index[k - 1])) return;
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
}

void resolve(const Search& search, const Packed& packed, int64_t first_panel, int64_t panels,
             int64_t group_limit, const RowBlock& block, double* wide) {
  for (int64_t i = 0; i < block.count; ++i) {
    Row& row = block.rows[i];
    if (row.hard) continue;
    load_row(search, row, wide);
    resolve_row(search, packed, first_panel, panels * kGroups, group_limit,
                block.minima + i * block.stride, wide, row);
  }
}

void compare_all(const Search& search, int64_t first_code, int64_t last_code, Row& row,
                 double* wide) {
  load_row(search, row, wide);
  if (search.metric == Metric::Cosine) row.norm = lane_norm(wide, search.dim);
  for (int64_t j = first_code; j < last_code; j += 4) {
    int64_t index[4];
    for (int i = 0; i < 4; ++i) index[i] = j + i < last_code ? j + i : j;
    double distance[4];
    four_distances(search, wide, row.norm, index, distance);
    for (int i = 0; i < 4 && j + i < last_code; ++i) {
      insert(search.k, distance[i], j + i, row);
    }
  }
}

double load_code(const Search& search, int64_t code, double* out) {
  search.codebook.is_double ? widen(row_of<double>(search.codebook, code), search.dim, out)
                            : widen(row_of<float>(search.codebook, code), search.dim, out);
  const double norm = lane_norm(out, search.dim);
  if (search.metric == Metric::Cosine && norm > 0.0) {
    for (int64_t d = 0; d < search.dim; ++d) out[d] /= norm;
  }
  return norm;
}

// Sums here are not those of the contract; their rounding is in `slack`.
void prepare_row(const Search& search, const Packed& packed, Row& row, double* a) {
  load_row(search, row, a);
  const bool l2 = search.metric == Metric::L2;
  const double rounding = (search.dim + 32) * 0x1p-51;
  double norm = 1.0;
  if (search.metric == Metric::Cosine) {
    norm = row.norm = lane_norm(a, search.dim);
    if (!(norm > 0.0)) norm = std::numeric_limits<double>::quiet_NaN();
  }
  Lanes squares = {}, dots = {}, largest = {};
  const double factor = search.metric == Metric::Cosine ? 1.0 / norm : packed.size;
  const auto take = [&](int64_t d, int64_t count) {
    Lanes v = load_first(a + d, count);
    const Lanes centre = load_first(packed.centre + d, count);
    v = l2 ? (v - centre) * factor : v * factor;
    squares += v * v;
    dots += v * centre;
    largest = v > largest ? v : largest;
    largest = -v > largest ? -v : largest;
    std::memcpy(a + d, &v, count * sizeof(double));
  };
  int64_t d = 0;
  for (; d + 8 <= search.dim; d += 8) take(d, 8);
  if (d < search.dim) take(d, search.dim - d);
  const double square = tree(squares);
  row.largest = 0.0;
  for (int l = 0; l < 8; ++l) row.largest = largest[l] > row.largest ? largest[l] : row.largest;
  row.length = std::sqrt(square);
  if (l2) {
    row.shift = -0.5 * square - packed.least_bias;
    row.slack = rounding * (square + packed.least_bias);
  } else {
    row.shift = tree(dots) * packed.size - (search.metric == Metric::Cosine);
    row.slack = rounding * (search.metric == Metric::Cosine ? 4.0 : std::sqrt(square) * packed.largest * packed.size);
  }
  row.found = row.groups = 0;
  row.threshold = std::numeric_limits<float>::infinity();
  row.hard = !(square < 1e300);  // NaN, infinity
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
