// Interface of nearest_code's vector kernels. docs/ops/nearest_code_proof.md derives the bounds.
#pragma once

#include <cstdint>
#include <cstring>

#include "capability.h"
#include "matrix.h"

namespace tilewise {

constexpr int64_t kPanel = 64;      // codes that share a scale and lie together when packed
constexpr int64_t kGroups = 16;     // group l of a panel: its codes l, l + 16, l + 32, l + 48
constexpr int64_t kBlockRows = 96;  // rows that share a scale, a multiple of the filter's tile
constexpr int64_t kMaxK = 16;
constexpr int64_t kLaneRows = 16;  // rows that the search without packing takes at a time

enum class Metric { L2, Cosine, Dot };

struct Search {
  Metric metric;
  int64_t k, codes, dim;
  Matrix x, codebook;
  const double* norms;  // (codes) ||c_j||, in the order of exact distances; cosine only
};

// A codebook as the filters read it. The vectors b_j are its codes, for cosine divided by their
// norms, minus `centre`, times `size`, a power of two that makes the largest element about 1.
// A score s_ij = ||b_j||^2 / 2 - <a_i, b_j> (without the square where the metric has none) orders
// the codes as their distances do; a_i is row i, transformed likewise. Codes are sorted by their
// largest element, so that the codes of a panel have similar sizes.
struct Packed {
  int64_t codes;          // that are packed: those without NaN and infinity, one of each equal ones
  int64_t answers;        // with those that equal a packed one
  int64_t panels, depth;  // depth: dim, rounded up to a multiple of 4
  double size;
  double least_bias;       // min_j ||b_j||^2 / 2, which scores leave out, or 0
  double largest;          // max_j ||c_j||
  double distance_factor;  // of a distance in a score: see Row::shift
  double rounding;         // bounds the relative error of sums over dim elements in float64
  const double* centre;    // (dim)
  const int64_t* order;    // (panels, 64) which code it is; beyond the last one, the first
  const int8_t* quads;     // (panels, depth / 4, 64, 4): -q_j, where b_j = scale * q_j + r_j
  const int32_t* sums;     // (panels, 64) the sum of q_j's elements
  const float* scales;     // (panels)
  const float* bias;       // (panels, 64) ||b_j||^2 / 2 - least_bias, or 0; rounded down
  const float* length;     // (panels, 64) ||b_j||, rounded up
  const float* residual;   // (panels, 64) ||r_j||, rounded up
  const double* norms;     // see Search
  const int64_t* next;  // (codes of the codebook) the next one that equals it, or -1; may be null
};

// How the integer filter of this machine quantises: |q| <= limit. Rows are stored as q + limit + 1.
// 0 where there is no such filter.
constexpr int kNoFilter = 0;

// What is known of a row while its codes are searched for.
struct Row {
  int64_t index;   // in x
  double largest;  // element of a
  double length;   // ||a||
  double shift;    // score <= factor * distance + shift + slack
  double slack;
  double norm;      // ||x||; cosine only
  float threshold;  // a code with a larger lower bound is not among the k nearest
  int32_t found;    // entries of `best`
  int32_t groups;   // groups that were compared exactly
  bool hard;        // this filter leaves too much of the codebook: a finer one must take the row
  double* best_distance;  // (k), nearest first
  int64_t* best_index;    // (k)
};

// A block of rows against a range of panels.
struct RowBlock {
  Row* const* rows;
  int64_t count;
  float* minima;  // (count, stride): a lower bound of the scores of each group
  int64_t stride;
};

// Where a panel of the float32 rung goes: its codes relative to the one in its middle.
struct FloatPanel {
  float* codes;         // (dim, 64) b_j - b_middle, rounded to float
  float* half_squares;  // (64) half of their squared norms for l2, else 0
  float* lengths;       // (64) their norms, rounded up
};

// All of them. They have an order of their own, in which similar codes are neighbours.
struct FloatPanels {
  int64_t count, max_groups;  // max_groups: of exact comparisons, until a row is hard
  const int64_t* order;       // (panels, 64); beyond the last one, the first
  const int64_t* middles;     // (panels, up to a multiple of 4)
  const float *codes, *half_squares, *lengths;
};

// Rows before the float32 rung.
struct FloatBlock {
  Row* rows;
  int64_t count, stride;
  const float* a;         // (count, stride) as prepare_row makes them
  float* shifted;         // (count, stride) scratch
  const double* middles;  // (count, panels up to a multiple of 4) distances
};

// Up to 16 rows, an element of all side by side: the search without packing. Beyond `count` is the
// last row once more.
struct LaneBlock {
  Row* rows;  // (16), whose lists follow one another
  int64_t count;
  const float* x;           // (dim, 16); null where float32 has nothing to say
  const double* wide;       // (dim, up to a multiple of 8, 16)
  const float* lengths;     // (16) ||x||, rounded up; but for l2
  const double* row_norms;  // (16) ||x||; cosine only
  const double* norms;      // (codes) ||c_j||; but for l2
  float* scratch;           // (dim, 32)
};

// A group that a row must be compared with.
struct Candidate {
  int32_t row, group;
};

// A row or code as the filters see it: (v * pre - centre) * post.
struct Transform {
  double pre;
  const double* centre;  // (dim), zeros up to a multiple of 8
  bool subtract;         // the centre
  double post;
};

// What makes b_j of a code with that norm; see Packed.
TILEWISE_INLINE Transform code_transform(const Search& search, double norm, const double* centre,
                                         double size) {
  const bool divide = search.metric == Metric::Cosine && norm > 0.0;  // 0 stays 0
  return {divide ? 1.0 / norm : 1.0, centre, true, size};
}

// Squares of numbers in this range do not overflow, and what vanishes of products beside them is
// less than the 2^-120 that thresholds allow for.
TILEWISE_INLINE bool in_range(double x) { return x >= 0x1p-400 && x <= 0x1p400; }

// Steps that sizes are sorted in, eight an octave: the exponent of a float and three more bits.
TILEWISE_INLINE int32_t size_step(double size) {
  const auto x = static_cast<float>(size);
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 20;
}

// One code more for a row that wants a single one. No branch depends on the distances.
TILEWISE_INLINE void keep_nearer(double distance, int64_t index, Row& row) {
  const double best = row.best_distance[0];
  const bool nearer = (distance < best) | ((distance == best) & (index < row.best_index[0]));
  row.best_distance[0] = nearer ? distance : best;
  row.best_index[0] = nearer ? index : row.best_index[0];
}

struct Moments {
  // Of the transformed vector: <v, v>; <v, centre>, if that is not subtracted; max |v_d|.
  double square, dot, largest;
};

// Norms of the two parts of a quantised vector v = scale * q + r, rounded up.
struct Parts {
  double length, residual;
};

#define TILEWISE_DECLARE(CAPABILITY)                                                              \
  namespace CAPABILITY {                                                                          \
  /* The largest |q| that the integer filter takes here. */                                       \
  int filter_limit();                                                                             \
  /* ||row||, in the order of exact distances. */                                                 \
  double exact_norm(const Matrix& matrix, int64_t row, int64_t dim);                              \
  /* A weighted sum of the row: equal for equal rows, and nearly always different for others. */  \
  double fingerprint(const Matrix& matrix, int64_t row, int64_t dim);                             \
  bool equal_rows(const Matrix& matrix, int64_t row, int64_t other, int64_t dim);                 \
  /* sums (dim) += the row times `factor`. */                                                     \
  void add_row(const Matrix& matrix, int64_t row, int64_t dim, double factor, double* sums);      \
  /* out (dim, up to a multiple of 16): rounded to float. */                                      \
  Moments transform(const Matrix& matrix, int64_t row, int64_t dim, const Transform& how,         \
                    float* out);                                                                  \
  /* Fills `row` (but for its index and lists) and a. */                                          \
  void prepare_row(const Search& search, const Packed& packed, Row& row, float* a);               \
  /* v / scale, rounded and clamped to +-limit. A row: q + limit + 1, at q (depth + 12 bytes are  \
     written). A code: -q, in quads that are 256 bytes apart, and the sum of q. norm: of v.       \
     Returns the norm of v - scale * q, rounded up. */                                            \
  double quantize_row(const float* v, double norm, int64_t depth, double scale, int limit,        \
                      uint8_t* q);                                                                \
  double quantize_code(const float* v, double norm, int64_t depth, double scale, int limit,       \
                       int8_t* quads, int32_t& sum);                                              \
  /* Lower bounds in integers, in units of row_scale * scales[panel], less the terms of           \
     `parts`, the largest of the block. False: out of range. */                                   \
  bool integer_bias(const Packed& packed, int64_t first_panel, int64_t panels, double row_scale,  \
                    const Parts& parts, int limit, int32_t* bias);                                \
  void filter_integer(const Packed& packed, int64_t first_panel, int64_t panels,                  \
                      const uint8_t* rows, double row_scale, const int32_t* bias,                 \
                      const RowBlock& block);                                                     \
  /* centre (dim, up to a multiple of 8), row (dim, up to a multiple of 16): scratch. */          \
  void pack_float_panel(const Search& search, const Packed& packed, const int64_t* order,         \
                        int64_t count, double* centre, float* row, const FloatPanel& out);        \
  /* distances (panels, up to a multiple of 4), exactly. */                                       \
  void compare_middles(const Search& search, const FloatPanels& panels, Row& row,                 \
                       double* distances);                                                        \
  void search_float_panel(const Search& search, const Packed& packed, const FloatPanels& panels,  \
                          int64_t panel, const FloatBlock& block);                                \
  /* Compares exactly what the bounds leave; a row is hard if that is more than group_limit.      \
     candidates: scratch for as many as there are rows, and twice the groups of `panels`. */      \
  void resolve(const Search& search, const Packed& packed, int64_t first_panel, int64_t panels,   \
               int64_t group_limit, const RowBlock& block, Candidate* candidates);                \
  /* The distances of a row to order[0], order[step], order[2 * step], order[3 * step]. */        \
  void exact_four(const Search& search, const Row& row, const int64_t* order, int64_t step,       \
                  double (&out)[4]);                                                              \
  /* As many as there are of order[0], order[16], order[32], order[48]; next: see Packed. */      \
  void compare_codes(const Search& search, const int64_t* order, int64_t count,                   \
                     const int64_t* next, Row& row);                                              \
  /* Rows whose lists stay short found nothing at less than infinity. code: scratch (dim + 8). */ \
  void search_lanes(const Search& search, const LaneBlock& block, int64_t first_code,             \
                    int64_t last_code, double* code);                                             \
  void compare_all(const Search& search, int64_t first_code, int64_t last_code, Row& row);        \
  /* False where it is not among the k nearest. */                                                \
  bool insert(int64_t k, double distance, int64_t index, Row& row);                               \
  }
TILEWISE_FOR_EACH_CAPABILITY(TILEWISE_DECLARE)
#undef TILEWISE_DECLARE

}  // namespace tilewise
