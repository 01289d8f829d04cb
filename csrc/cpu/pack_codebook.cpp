// Packs a codebook for the filters of nearest_code: centre, order by size, quantise.
#include "pack_codebook.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/integer.h"

namespace tilewise {
namespace {

using at::Tensor;

constexpr int64_t kAlign = 64;
constexpr double kSmallestScale = 0x1p-40;  // beside a largest element of 1

struct Header {
  int64_t codes_in, dim, metric, limit;  // what it was made of, and for
  int64_t codes, answers, repeated, extreme;
  double size, least_bias, largest;
};

// Four times what a sum of `dim` products and what is done with it can lose.
double rounding_of(int64_t dim) { return (dim + 32) * 0x1p-51; }

// Where the arrays lie behind the header.
struct Arrays {
  int64_t panels, depth, bytes;
  double *centre, *norms;
  int64_t *order, *next;
  int8_t* quads;
  int32_t* sums;
  float *scales, *bias, *length, *residual;

  // `base` may be null, to find the size.
  Arrays(void* base, const Header& header)
      : panels(ceil_div(header.codes, kPanel)),
        depth(round_up(header.dim, 4)),
        bytes(round_up(sizeof(Header), kAlign)) {
    const int64_t slots = panels * kPanel;
    const bool cosine = header.metric == static_cast<int64_t>(Metric::Cosine);
    place(base, centre, round_up(header.dim, 8));
    place(base, norms, cosine ? header.codes_in : 0);
    place(base, order, slots);
    place(base, next, header.repeated ? header.codes_in : 0);
    place(base, quads, slots * depth);
    place(base, sums, slots);
    place(base, scales, panels);
    place(base, bias, slots);
    place(base, length, slots);
    place(base, residual, slots);
  }

 private:
  template <typename T>
  void place(void* base, T*& array, int64_t count) {
    array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + bytes);
    bytes = round_up(bytes + count * static_cast<int64_t>(sizeof(T)), kAlign);
  }
};

template <typename Function>
void for_codes(int64_t codes, int64_t dim, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(dim, 1));
  at::parallel_for(0, codes, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(round_up(dim, 16));
    for (int64_t j = begin; j < end; ++j) function(j, row.data());
  });
}

// The middle of nine means, in each element: any centre is right, and one code far away from all
// others should not move it.
void find_centre(const Search& search, const std::vector<double>& norms, double* centre) {
  constexpr int64_t kMeans = 9, kParts = 36;
  const int64_t dim = search.dim;
  std::vector<double> sums(kParts * dim);
  std::vector<int64_t> counts(kParts);
  at::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      for (int64_t j = part; j < search.codes; j += kParts) {
        if (!std::isfinite(norms[j])) continue;
        const double factor = code_transform(search, norms[j], nullptr, 1.0).pre;
        TILEWISE_DISPATCH(add_row)(search.codebook, j, dim, factor, sums.data() + part * dim);
        ++counts[part];
      }
    }
  });
  for (int64_t d = 0; d < dim; ++d) {
    double means[kMeans];
    int64_t used = 0;
    for (int64_t m = 0; m < kMeans; ++m) {
      double sum = 0.0;
      int64_t count = 0;
      for (int64_t part = m; part < kParts; part += kMeans) {
        sum += sums[part * dim + d];
        count += counts[part];
      }
      if (count > 0) means[used++] = sum / count;
    }
    std::nth_element(means, means + used / 2, means + used);
    centre[d] = used > 0 && std::isfinite(means[used / 2]) ? means[used / 2] : 0.0;
  }
}

// Where the codes go: by their largest elements, which are at most 1.
std::vector<int64_t> sorted(const std::vector<int64_t>& finite, const std::vector<double>& largest,
                            double size) {
  constexpr int kSteps = 1024;
  const auto bucket = [&](int64_t j) { return std::min(size_step(largest[j] * size), kSteps - 1); };
  std::vector<int64_t> place(kSteps + 1), result(finite.size());
  for (const int64_t j : finite) ++place[bucket(j) + 1];
  std::partial_sum(place.begin(), place.end(), place.begin());
  for (const int64_t j : finite) result[place[bucket(j)]++] = j;
  return result;
}

float round_down(double x) {
  return std::nextafter(static_cast<float>(x), -std::numeric_limits<float>::infinity());
}

float round_up_to_float(double x) {
  return std::nextafter(static_cast<float>(x), std::numeric_limits<float>::infinity());
}

// What is known of the codes before they are packed.
struct Codes {
  std::vector<double> norms, largest, squares;  // before `size` is applied
  std::vector<int64_t> finite;                  // one of each equal ones
};

// One panel: its scale, and its codes relative to it.
void pack_panel(const Search& search, const Header& header, const Codes& codes, const Arrays& out,
                int64_t panel, float* row) {
  const int64_t* order = out.order + panel * kPanel;
  double sizes[kPanel];
  const int64_t count = std::min(kPanel, header.codes - panel * kPanel);
  for (int64_t i = 0; i < count; ++i) sizes[i] = codes.largest[order[i]];
  std::sort(sizes, sizes + count);
  // A few codes far larger than the others are clamped rather than served.
  const double typical = 2.0 * sizes[count * 3 / 4], top = sizes[count - 1];
  const double range = (top > 2.0 * typical ? typical : top) * header.size;
  const double scale = std::max(range / std::max<int64_t>(header.limit, 1), kSmallestScale);
  out.scales[panel] = static_cast<float>(scale);
  const double rounding = rounding_of(search.dim);
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t slot = panel * kPanel + i, j = order[i];
    if (slot >= header.codes) {  // never a candidate
      out.sums[slot] = 0;
      out.bias[slot] = 0x1p100f;
      out.length[slot] = out.residual[slot] = 0.0f;
      continue;
    }
    TILEWISE_DISPATCH(transform)(search.codebook, j, search.dim,
                                 code_transform(search, codes.norms[j], out.centre, header.size),
                                 row);
    const double square = codes.squares[j] * header.size * header.size;
    const double norm = std::sqrt(square) * (1.0 + rounding);
    const double residual = TILEWISE_DISPATCH(quantize_code)(
        row, norm, out.depth, out.scales[panel], static_cast<int>(header.limit),
        out.quads + panel * kPanel * out.depth + 4 * i, out.sums[slot]);
    const double bias = search.metric == Metric::L2 ? 0.5 * square : 0.0;
    out.residual[slot] = round_up_to_float(residual);
    out.length[slot] = round_up_to_float(norm);
    out.bias[slot] = round_down(bias * (1.0 - rounding) - header.least_bias * (1.0 + rounding));
  }
}

// Which codes equal one another: the first of each stays in `codes` (ascending), and names the next
// one in the result, and so on; -1 ends a chain. The result is empty if all codes differ.
std::vector<int64_t> chain_equal(const Search& search, std::vector<int64_t>& codes) {
  constexpr int64_t kParts = 8;  // tables, a thread each
  constexpr int kMaxMisses = 8;  // of codes that differ in spite of one fingerprint
  const int64_t count = codes.size();
  std::vector<double> prints(count);
  std::vector<uint64_t> hashes(count);
  for_codes(count, search.dim, [&](int64_t i, float*) {
    prints[i] = TILEWISE_DISPATCH(fingerprint)(search.codebook, codes[i], search.dim);
    uint64_t bits;
    std::memcpy(&bits, &prints[i], sizeof bits);
    bits = (bits ^ bits >> 29) * 0x9E3779B97F4A7C15u;
    hashes[i] = bits ^ bits >> 32;
  });
  std::vector<int64_t> next(search.codes, -1), last(count);  // last of a chain, at its first place
  std::vector<char> repeated(count, 0);
  std::array<bool, kParts> found{};
  at::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const auto mine = [&](uint64_t hash) { return hash % kParts == static_cast<uint64_t>(part); };
      const size_t entries = std::count_if(hashes.begin(), hashes.end(), mine);
      size_t size = 2;  // a power of two, and half of it stays empty
      while (size < 2 * entries) size *= 2;
      std::vector<int64_t> table(size, -1);  // the first code of each chain
      for (int64_t i = 0; i < count; ++i) {
        if (!mine(hashes[i])) continue;
        size_t at = hashes[i] / kParts & (size - 1);
        for (int misses = 0; table[at] >= 0; at = (at + 1) & (size - 1)) {
          const int64_t first = table[at];
          if (prints[first] != prints[i]) continue;
          if (TILEWISE_DISPATCH(equal_rows)(search.codebook, codes[first], codes[i], search.dim)) {
            next[codes[last[first]]] = codes[i];
            last[first] = i;
            repeated[i] = found[part] = true;
            break;
          }
          if (++misses == kMaxMisses) break;
        }
        if (table[at] < 0) {
          table[at] = last[i] = i;
        }
      }
    }
  });
  if (std::none_of(found.begin(), found.end(), [](bool some) { return some; })) return {};
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!repeated[i]) codes[kept++] = codes[i];
  }
  codes.resize(kept);
  return next;
}

bool has_nan(const Search& search, int64_t code) {
  const auto any = [&](const auto* v) {
    return std::any_of(v, v + search.dim, [](auto x) { return std::isnan(x); });
  };
  const int64_t at = code * search.codebook.stride;
  return search.codebook.is_double ? any(static_cast<const double*>(search.codebook.data) + at)
                                   : any(static_cast<const float*>(search.codebook.data) + at);
}

}  // namespace

std::vector<double> exact_norms(const Search& search) {
  std::vector<double> norms(search.codes);
  for_codes(search.codes, search.dim, [&](int64_t j, float*) {
    norms[j] = TILEWISE_DISPATCH(exact_norm)(search.codebook, j, search.dim);
  });
  return norms;
}

Tensor pack_codes(const Search& search) {
  const int64_t count = search.codes, dim = search.dim;
  Codes codes{exact_norms(search), std::vector<double>(count), std::vector<double>(count)};
  Header header{count, dim, static_cast<int64_t>(search.metric), TILEWISE_DISPATCH(filter_limit)()};
  codes.finite.reserve(count);
  for (int64_t j = 0; j < count; ++j) {
    if (std::isfinite(codes.norms[j])) {
      codes.finite.push_back(j);
    } else if (!has_nan(search, j)) {
      header.extreme = true;
    }
    if (search.metric == Metric::Cosine && codes.norms[j] > 0.0) {
      header.extreme |= !in_range(codes.norms[j]) && std::isfinite(codes.norms[j]);
    }
  }
  header.answers = codes.finite.size();
  const std::vector<int64_t> next = chain_equal(search, codes.finite);
  header.repeated = !next.empty();
  header.codes = codes.finite.size();

  const Tensor result = at::empty({Arrays(nullptr, header).bytes}, at::kByte);
  const Arrays out(result.mutable_data_ptr(), header);
  if (search.metric == Metric::Cosine) {
    std::copy(codes.norms.begin(), codes.norms.end(), out.norms);
  }
  std::fill(out.centre, out.centre + round_up(dim, 8), 0.0);
  find_centre(search, codes.norms, out.centre);
  for_codes(header.codes, dim, [&](int64_t i, float* row) {
    const int64_t j = codes.finite[i];
    const Moments moments = TILEWISE_DISPATCH(transform)(
        search.codebook, j, dim, code_transform(search, codes.norms[j], out.centre, 1.0), row);
    codes.largest[j] = moments.largest;
    codes.squares[j] = moments.square;
  });
  double top = 0.0, least = std::numeric_limits<double>::infinity();
  for (const int64_t j : codes.finite) {
    top = std::max(top, codes.largest[j]);
    least = std::min(least, codes.squares[j]);
    header.largest = std::max(header.largest, codes.norms[j]);
  }
  // Cosine's vectors are no longer than 2 as they are.
  const bool scaled = search.metric != Metric::Cosine && top > 0.0;
  header.size = scaled ? std::exp2(-std::ceil(std::log2(top))) : 1.0;
  header.extreme |= !in_range(header.size);
  if (search.metric == Metric::L2 && header.codes > 0) {
    header.least_bias = 0.5 * least * header.size * header.size;
  }
  const std::vector<int64_t> order = sorted(codes.finite, codes.largest, header.size);
  const int64_t slots = out.panels * kPanel;
  std::fill(out.order, out.order + slots, order.empty() ? 0 : order[0]);
  std::copy(order.begin(), order.end(), out.order);
  std::copy(next.begin(), next.end(), out.next);
  std::memset(out.quads, 0, slots * out.depth);
  const int64_t grain = std::max<int64_t>(1, 256 / std::max<int64_t>(dim, 1));
  at::parallel_for(0, out.panels, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> row(round_up(dim, 16));
    for (int64_t p = begin; p < end; ++p) pack_panel(search, header, codes, out, p, row.data());
  });
  std::memcpy(result.mutable_data_ptr(), &header, sizeof header);
  return result;
}

Packed packed_view(const Tensor& packed, const Search& search) {
  Header header;
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.is_contiguous() &&
                        packed.numel() >= static_cast<int64_t>(sizeof header),
                    "packed: expected what pack_codebook returns, got ", packed.scalar_type(), " ",
                    packed.sizes());
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  const Arrays arrays(const_cast<void*>(packed.const_data_ptr()), header);
  TORCH_CHECK_VALUE(
      header.codes_in == search.codes && header.dim == search.dim &&
          header.metric == static_cast<int64_t>(search.metric) &&
          header.limit == TILEWISE_DISPATCH(filter_limit)() && packed.numel() >= arrays.bytes,
      "packed: expected one of this codebook, for this metric and made on this machine, "
      "got another");
  const double factor = search.metric == Metric::L2 ? 0.5 : 1.0;
  return {header.codes,
          header.answers,
          arrays.panels,
          arrays.depth,
          header.size,
          header.least_bias,
          header.largest,
          factor * header.size * header.size,
          rounding_of(search.dim),
          arrays.centre,
          arrays.order,
          arrays.quads,
          arrays.sums,
          arrays.scales,
          arrays.bias,
          arrays.length,
          arrays.residual,
          search.metric == Metric::Cosine ? arrays.norms : nullptr,
          header.repeated ? arrays.next : nullptr};
}

bool needs_exact_search(const Tensor& packed) {
  Header header;
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  return header.extreme;
}

}  // namespace tilewise
