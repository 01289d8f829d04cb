// Search without packing: rows stand in lanes, sixteen at a time, and meet the codes where they
// lie. In float32 first, whose sums bound the distances, then exactly where the bounds leave
// something; where they leave most, exactly at once. The order of the exact sums is that of
// nearest_code_exact.cpp.
#include <cmath>
#include <cstring>

#include "nearest_code_lanes.h"

namespace tilewise {
namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kChunk = 128;  // codes whose bounds stay in the nearest cache
constexpr int kPatience = 4;     // chunks until float32 is tried again where it did not help
constexpr int kCentres = 4;      // codes that others are compared with closely, in a chunk
constexpr float kInfinity = __builtin_inff();

// A code of the chunk, and a bit for each row that it may be the nearest of.
struct Chance {
  int32_t code;
  uint32_t rows;
};

struct Chunk {
  int64_t first, count;
  alignas(64) float bounds[kChunk * kLaneRows];  // lower bounds of (scaled) distances
  Chance chances[kChunk];
  int64_t left;  // how many of these
};

template <typename T>
const T* code_at(const Search& search, int64_t j) {
  return static_cast<const T*>(search.codebook.data) + j * search.codebook.stride;
}

// Fills the chunk's bounds; `least` (16, 16): of each sixteenth of the codes the smallest upper
// bound so far, for each row. False if a code is out of range.
template <bool l2>
bool bound_chunk(const Search& search, const LaneBlock& block, float* least, Chunk& chunk) {
  const float relative = (search.dim + 16) * 0x1p-23f;
  const Floats lengths = Floats::load(block.lengths) * Floats::all(relative);
  for (int64_t j = 0; j < chunk.count; j += kTileCodes) {
    const float* codes[kTileCodes];
    for (int c = 0; c < kTileCodes; ++c) {
      codes[c] = code_at<float>(search, chunk.first + (j + c < chunk.count ? j + c : j));
    }
    Floats sums[kTileCodes];
    sum_tile<l2>(block.x, codes, search.dim, sums);
    for (int c = 0; c < kTileCodes && j + c < chunk.count; ++c) {
      Floats margin = sums[c] * Floats::all(relative);
      if (!l2) {
        const double norm = block.norms[chunk.first + j + c];
        if (!(norm <= 0x1p60 && (norm >= 0x1p-60 || norm == 0.0))) return false;
        const bool divide = search.metric == Metric::Cosine && norm > 0.0;
        sums[c] = sums[c] * Floats::all(static_cast<float>(divide ? -1.0 / norm : -1.0));
        margin = lengths * Floats::all(static_cast<float>(divide ? 1.0 : norm));
      }
      (sums[c] - margin).store(chunk.bounds + (j + c) * kLaneRows);
      float* low = least + (j + c) % kLaneRows * kLaneRows;
      lower(sums[c] + margin, Floats::load(low)).store(low);
    }
  }
  return true;
}

// Below this is every bound of one of the k nearest, since k codes are certainly no farther. False
// if nothing is certain for some row.
bool find_thresholds(const float* least, int64_t k, int64_t rows, float* thresholds) {
  if (k == 1) {
    Floats low = Floats::load(least);
    for (int i = 1; i < kLaneRows; ++i) low = lower(Floats::load(least + i * kLaneRows), low);
    low.store(thresholds);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      float nearest[kMaxK];
      for (int64_t i = 0; i < kLaneRows; ++i) {  // insertion sort
        const float value = least[i * kLaneRows + r];
        int64_t at = i;
        for (; at > 0 && value < nearest[at - 1]; --at) nearest[at] = nearest[at - 1];
        nearest[at] = value;
      }
      thresholds[r] = nearest[k - 1];
    }
  }
  bool certain = true;
  for (int64_t r = 0; r < kLaneRows; ++r) {
    if (r >= rows) thresholds[r] = -kInfinity;
    certain &= r >= rows || std::abs(thresholds[r]) < 1e35f;
    thresholds[r] += std::abs(thresholds[r]) * 0x1p-20f + 0x1p-100f;  // more than underflow takes
  }
  return certain;
}

// The chunk's codes that may be among the nearest; returns how many pairs with rows that are. A
// bound that is not a number is that of a code with a NaN, or of one that is infinitely far.
int64_t find_chances(const float* thresholds, Chunk& chunk) {
  const Floats limit = Floats::load(thresholds);
  int64_t pairs = 0;
  chunk.left = 0;
  for (int64_t j = 0; j < chunk.count; ++j) {
    const uint32_t rows = less(Floats::load(chunk.bounds + j * kLaneRows), limit);
    if (!rows) continue;
    chunk.chances[chunk.left++] = {static_cast<int32_t>(j), rows};
    pairs += __builtin_popcount(rows);
  }
  return pairs;
}

// Drops codes that equal an earlier one: bounds of equal codes are equal. Returns what is left of
// the pairs.
int64_t drop_equal(const Search& search, Chunk& chunk) {
  constexpr uint32_t kPlaces = 4 * kChunk;
  int16_t table[kPlaces];
  std::memset(table, -1, sizeof table);
  int64_t pairs = 0, left = 0;
  for (int64_t i = 0; i < chunk.left; ++i) {
    const Chance chance = chunk.chances[i];
    const float* bounds = chunk.bounds + chance.code * kLaneRows;
    uint64_t words[4], hash = 0;
    std::memcpy(words, bounds, sizeof words);
    for (const uint64_t word : words) hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
    bool equal = false;
    uint32_t place = hash >> 40;
    for (;; ++place) {
      const int16_t other = table[place % kPlaces];
      if (other < 0) break;
      equal =
          std::memcmp(chunk.bounds + other * kLaneRows, bounds, 64) == 0 &&
          equal_rows(search.codebook, chunk.first + other, chunk.first + chance.code, search.dim);
      if (equal) break;
    }
    if (equal) continue;
    table[place % kPlaces] = static_cast<int16_t>(chance.code);
    chunk.chances[left++] = chance;
    pairs += __builtin_popcount(chance.rows);
  }
  chunk.left = left;
  return pairs;
}

// Exact distances of eight rows x (dim, 16) to a code, each as nearest_code_exact.cpp sums it.
template <bool l2>
TILEWISE_INLINE Lanes exact_sums(const double* x, const double* code, int64_t dim) {
  Lanes sums[8];
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {  // so many as there are registers for
    Lanes part[4] = {Lanes::all(0.0), Lanes::all(0.0), Lanes::all(0.0), Lanes::all(0.0)};
    for (int64_t d = half; d < dim; d += 8) {
#pragma GCC unroll 4
      for (int e = 0; e < 4; ++e) {
        const Lanes v = Lanes::load(x + (d + e) * kLaneRows);
        const Lanes element = Lanes::all(code[d + e]);
        const Lanes difference = v - element;
        part[e] = part[e] + (l2 ? difference * difference : v * element);
      }
    }
    for (int e = 0; e < 4; ++e) sums[half + e] = part[e];
  }
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

TILEWISE_INLINE Lanes exact_distances(const Search& search, const LaneBlock& block, int64_t lane,
                                      const double* code, int64_t j) {
  const int64_t dim = (search.dim + 7) / 8 * 8;
  const double* x = block.wide + lane;
  if (search.metric == Metric::L2) return exact_sums<true>(x, code, dim);
  const Lanes dots = exact_sums<false>(x, code, dim), one = Lanes::all(1.0);
  if (search.metric == Metric::Dot) return dots * Lanes::all(-1.0);
  double out[8];
  const double norm = search.norms[j];
  (one - dots / (Lanes::load(block.row_norms + lane) * Lanes::all(norm))).store(out);
  double products[8];
  dots.store(products);
  for (int i = 0; i < 8; ++i) {
    const bool zero = (block.row_norms[lane + i] == 0.0 || norm == 0.0) && !std::isnan(products[i]);
    if (zero) out[i] = 1.0;
  }
  return Lanes::load(out);
}

// Of eight rows. The lower index stays among equals, whatever the order in which codes come.
TILEWISE_INLINE void keep_nearest(const Lanes& distance, int64_t j, double* best, int64_t* index) {
  const Lanes before = Lanes::load(best);
  const Lanes after = lower(distance, Lanes::all(__builtin_inf()));  // NaN
  const Longs number = Longs::all(j), other = Longs::load(index);
  const Longs of_equals = if_less(before, after, other, if_less(number, other, number, other));
  if_less(after, before, number, of_equals).store(index);
  lower(after, before).store(best);
}

// A code as compare_code and exact_distances take it.
void widen_code(const Search& search, int64_t j, double* code) {
  if (search.codebook.is_double) {
    std::memcpy(code, code_at<double>(search, j), search.dim * sizeof(double));
  } else {
    const float* from = code_at<float>(search, j);
    for (int64_t d = 0; d < search.dim; ++d) code[d] = from[d];
  }
}

// A code that has a chance meets all rows.
void compare_code(const Search& search, const LaneBlock& block, int64_t j, double* code) {
  widen_code(search, j, code);
  for (int64_t lane = 0; lane < block.count; lane += 8) {
    const Lanes distance = exact_distances(search, block, lane, code, j);
    if (search.k == 1) {  // lanes beyond the last row are rows once more
      double* best = block.rows[0].best_distance + lane;
      int64_t* index = block.rows[0].best_index + lane;
      keep_nearest(distance, j, best, index);
      continue;
    }
    double distances[8];
    distance.store(distances);
    for (int64_t i = lane; i < lane + 8 && i < block.count; ++i) {
      insert(search.k, distances[i - lane], j, block.rows[i]);
    }
  }
}

// Each row meets the codes that have a chance with it, four at a time.
void compare_chances(const Search& search, const LaneBlock& block, const Chunk& chunk) {
  int64_t codes[kChunk + 3];
  for (int64_t r = 0; r < block.count; ++r) {
    Row& row = block.rows[r];
    int64_t count = 0;
    for (int64_t i = 0; i < chunk.left; ++i) {
      codes[count] = chunk.first + chunk.chances[i].code;
      count += chunk.chances[i].rows >> r & 1;
    }
    for (int64_t i = count; i < count + 3; ++i) codes[i] = codes[count > 0 ? count - 1 : 0];
    for (int64_t i = 0; i < count; i += 4) {
      double distance[4];
      exact_four(search, row, codes + i, 1, distance);
      for (int64_t j = i; j < i + 4 && j < count; ++j) {
        search.k > 1 ? static_cast<void>(insert(search.k, distance[j - i], codes[j], row))
                     : keep_nearer(distance[j - i], codes[j], row);
      }
    }
  }
}

// r (dim) = a - b; returns the sum of its squares, to within (dim + 16) 2^-24 of itself.
float subtract(const float* a, const float* b, int64_t dim, float* r) {
  Floats squares = Floats::all(0.0f);
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16) {
    const Floats difference = Floats::load(a + d) - Floats::load(b + d);
    difference.store(r + d);
    squares = multiply_add(difference, difference, squares);
  }
  float sum = fold(squares, Add());
  for (; d < dim; ++d) {
    r[d] = a[d] - b[d];
    sum += r[d] * r[d];
  }
  return sum;
}

// Drops chances by bounds relative to one of their codes, h: d_ij = d_ih + ||r||^2 - 2 <y, r> with
// y = x_i - c_h and r = c_j - c_h, which is as fine as the codes are close to one another. l2, and
// one code a row. Returns what is left of the pairs; unchanged if nothing is certain.
int64_t refine(const Search& search, const LaneBlock& block, double* code, int64_t pairs,
               Chunk& chunk) {
  const int64_t dim = search.dim, middle = chunk.first + chunk.chances[chunk.left / 2].code;
  const double rounding = (dim + 32) * 0x1p-51;
  alignas(64) double base[kLaneRows];
  alignas(64) float lengths[kLaneRows], limits[kLaneRows], slack[kLaneRows];
  widen_code(search, middle, code);
  for (int64_t lane = 0; lane < kLaneRows; lane += 8) {
    const Lanes distance = exact_distances(search, block, lane, code, middle);
    distance.store(base + lane);
    keep_nearest(distance, middle, block.rows[0].best_distance + lane,
                 block.rows[0].best_index + lane);
  }
  const float relative = (dim + 16) * 0x1p-23f;
  for (int64_t i = 0; i < kLaneRows; ++i) {
    const double best = block.rows[i].best_distance[0];
    const double limit = best - base[i] + rounding * (best + base[i]);
    if (!(std::abs(limit) < 1e35 && base[i] < 1e35)) return pairs;
    limits[i] = static_cast<float>(limit + std::abs(limit) * 0x1p-20 + 0x1p-100);
    slack[i] = static_cast<float>(4.0 * rounding * base[i]) + 0x1p-100f;
    lengths[i] = static_cast<float>(std::sqrt(base[i]) * (1.0 + 0x1p-20)) * relative;
  }
  const float* from = code_at<float>(search, middle);
  float *y = block.scratch, *differences = y + dim * kLaneRows;
  for (int64_t d = 0; d < dim; ++d) {
    (Floats::load(block.x + d * kLaneRows) - Floats::all(from[d])).store(y + d * kLaneRows);
  }
  Floats least = Floats::load(limits);
  for (int64_t i = 0; i < chunk.left; i += kTileCodes) {
    const float* rows[kTileCodes];
    float squares[kTileCodes];
    for (int c = 0; c < kTileCodes; ++c) {
      const int64_t at = i + c < chunk.left ? i + c : i;
      const float* other = code_at<float>(search, chunk.first + chunk.chances[at].code);
      float* r = differences + c * dim;
      rows[c] = r;
      squares[c] = subtract(other, from, dim, r);
    }
    Floats sums[kTileCodes];
    sum_tile<false>(y, rows, dim, sums);
    for (int c = 0; c < kTileCodes && i + c < chunk.left; ++c) {
      const Floats square = Floats::all(squares[c]);
      const Floats length = Floats::all(2.0002f * __builtin_sqrtf(squares[c]));
      const Floats margin =
          multiply_add(Floats::load(lengths), length, square * Floats::all(relative));
      const Floats middle_of = square - (sums[c] + sums[c]);
      (middle_of - margin).store(chunk.bounds + (i + c) * kLaneRows);
      least = lower(middle_of + margin, least);
    }
  }
  const Floats allowance = higher(least, Floats::all(0.0f) - least) * Floats::all(0x1p-20f);
  const Floats limit = lower(least + allowance + Floats::load(slack), Floats::load(limits));
  int64_t left = 0;
  pairs = 0;
  for (int64_t i = 0; i < chunk.left; ++i) {
    Chance chance = chunk.chances[i];
    const bool compared = chunk.first + chance.code == middle;
    chance.rows &= compared ? 0 : less(Floats::load(chunk.bounds + i * kLaneRows), limit);
    if (!chance.rows) continue;
    chunk.chances[left++] = chance;
    pairs += __builtin_popcount(chance.rows);
  }
  chunk.left = left;
  return pairs;
}

}  // namespace

void search_lanes(const Search& search, const LaneBlock& block, int64_t first_code,
                  int64_t last_code, double* code) {
  const bool l2 = search.metric == Metric::L2;
  Chunk chunk;
  alignas(64) float least[kLaneRows * kLaneRows], thresholds[kLaneRows];
  for (float& bound : least) bound = kInfinity;
  const int64_t octets = (block.count + 7) / 8, dim = search.dim;
  std::memset(code, 0, (dim + 7) / 8 * 8 * sizeof(double));
  const bool refines = l2 && search.k == 1 && block.x;
  int patience = 0;
  for (int64_t first = first_code; first < last_code; first += kChunk) {
    chunk.first = first;
    chunk.count = last_code - first < kChunk ? last_code - first : kChunk;
    int64_t pairs = chunk.count * block.count;
    const bool bounded =
        block.x && --patience < 0 &&
        (l2 ? bound_chunk<true> : bound_chunk<false>)(search, block, least, chunk) &&
        find_thresholds(least, search.k, block.count, thresholds);
    if (bounded) {
      pairs = find_chances(thresholds, chunk);
      if (pairs > 2 * block.count && search.k == 1) pairs = drop_equal(search, chunk);
      if (8 * pairs > chunk.count * block.count) patience = kPatience;
    } else {
      chunk.left = chunk.count;
      for (int64_t j = 0; j < chunk.count; ++j) {
        chunk.chances[j] = {static_cast<int32_t>(j), (1u << block.count) - 1};
      }
    }
    for (int64_t i = 0, all = 2 * pairs; refines && i < kCentres; ++i) {
      if (pairs <= 2 * block.count || 4 * pairs > 3 * all)
        break;  // few are left, or it does not help
      all = pairs;
      pairs = refine(search, block, code, pairs, chunk);
    }
    // About what a pair costs alone, and a code with all rows.
    if (pairs * (dim / 4 + 20) <= chunk.left * octets * (2 * dim + 16)) {
      compare_chances(search, block, chunk);
    } else {
      for (int64_t i = 0; i < chunk.left; ++i) {
        compare_code(search, block, chunk.first + chunk.chances[i].code, code);
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace tilewise
