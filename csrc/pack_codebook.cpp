// Packs a codebook for the filters of nearest_code: centre, order by size, quantise.
#include "pack_codebook.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace tilewise {
namespace {

using at::Tensor;

constexpr int64_t kAlign = 64;
constexpr double kSmallestScale = 0x1p-40;  // beside a largest element of 1

struct Header {
  int64_t codes_in, dim, metric, limit;  // what it was made of, and for
  int64_t codes, infinite;
  double size, least_bias, largest;
};

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where the arrays lie behind the header. `base` may be null, to find the size.
template <typename Pointer>
struct Layout {
  int64_t panels, depth, bytes = round_up(sizeof(Header), kAlign);
  Pointer base;

  Layout(Pointer base, int64_t codes, int64_t dim)
      : panels((codes + kPanel - 1) / kPanel), depth(round_up(dim, 4)), base(base) {}

  template <typename T>
  T* take(int64_t count) {
    T* const array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + bytes);
    bytes = round_up(bytes + count * static_cast<int64_t>(sizeof(T)), kAlign);
    return array;
  }
};

struct Arrays {
  double* centre;
  int64_t* order;
  int8_t* quads;
  int32_t* sums;
  float *scales, *bias, *length, *residual;
  int64_t bytes;

  Arrays(void* base, int64_t codes, int64_t dim) {
    Layout<void*> layout(base, codes, dim);
    const int64_t slots = layout.panels * kPanel;
    centre = layout.take<double>(dim);
    order = layout.take<int64_t>(slots);
    quads = layout.take<int8_t>(slots * layout.depth);
    sums = layout.take<int32_t>(slots);
    scales = layout.take<float>(layout.panels);
    bias = layout.take<float>(slots);
    length = layout.take<float>(slots);
    residual = layout.take<float>(slots);
    bytes = layout.bytes;
  }
};

template <typename Function>
void for_codes(int64_t codes, int64_t dim, const Function& function) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(dim, 1));
  at::parallel_for(0, codes, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> row(round_up(dim, 8));
    for (int64_t j = begin; j < end; ++j) function(j, row.data());
  });
}

enum class Kind : char { Finite, NotANumber, Infinite };

// The middle of nine means, in each element: any centre is right, and one code far away from all
// others should not move it.
void find_centre(const Search& search, const std::vector<int64_t>& finite, double* centre) {
  const int64_t parts = std::min<int64_t>(9, finite.size()), dim = search.dim;
  std::vector<double> means(parts * dim);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> row(dim);
    for (int64_t part = begin; part < end; ++part) {
      double* mean = means.data() + part * dim;
      int64_t count = 0;
      for (size_t i = part; i < finite.size(); i += parts, ++count) {
        TILEWISE_DISPATCH(load_code)(search, finite[i], row.data());
        for (int64_t d = 0; d < dim; ++d) mean[d] += row[d];
      }
      for (int64_t d = 0; d < dim; ++d) mean[d] /= count;
    }
  });
  std::vector<double> column(parts);
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t part = 0; part < parts; ++part) column[part] = means[part * dim + d];
    std::nth_element(column.begin(), column.begin() + parts / 2, column.end());
    const double middle = parts ? column[parts / 2] : 0.0;
    centre[d] = std::isfinite(middle) ? middle : 0.0;
  }
}

// b_j without its size: the code as the metric wants it, centred. Returns its largest element.
double centred(const Search& search, const double* centre, int64_t code, double* row) {
  TILEWISE_DISPATCH(load_code)(search, code, row);
  double largest = 0.0;
  for (int64_t d = 0; d < search.dim; ++d) {
    row[d] -= centre[d];
    largest = std::max(largest, std::abs(row[d]));
  }
  return largest;
}

// Where the codes go: by their largest elements (at most 1), in eight steps an octave.
std::vector<int64_t> sorted(const std::vector<int64_t>& finite, const std::vector<double>& largest) {
  constexpr int kSteps = 1024;
  const auto bucket = [&](int64_t j) {
    const auto x = static_cast<float>(largest[j]);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return std::min<int>(bits >> 20, kSteps - 1);  // exponent and three bits
  };
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

// One panel: its scale, and its codes relative to it.
void pack_panel(const Search& search, const Header& header, const Arrays& out, int64_t panel,
                const std::vector<double>& largest, double* row) {
  const int64_t* order = out.order + panel * kPanel;
  const int64_t depth = round_up(search.dim, 4);
  double sizes[kPanel];
  int64_t count = 0;
  for (; count < kPanel && order[count] >= 0; ++count) sizes[count] = largest[order[count]];
  std::sort(sizes, sizes + count);
  // A few codes far larger than the others are clamped rather than served.
  const double typical = 2.0 * sizes[count * 3 / 4], top = sizes[count - 1];
  const double range = (top > 2.0 * typical ? typical : top) * header.size;
  const double scale = std::max(range / std::max<int64_t>(header.limit, 1), kSmallestScale);
  out.scales[panel] = static_cast<float>(scale);
  int8_t* quads = out.quads + panel * kPanel * depth;
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t slot = panel * kPanel + i;
    if (i >= count) {  // never a candidate
      out.sums[slot] = 0;
      out.bias[slot] = 0x1p100f;
      out.length[slot] = out.residual[slot] = 0.0f;
      continue;
    }
    centred(search, out.centre, order[i], row);
    double square = 0.0;
    for (int64_t d = 0; d < search.dim; ++d) {
      row[d] *= header.size;
      square += row[d] * row[d];
    }
    const double rounding = (search.dim + 32) * 0x1p-51;
    const Parts parts = TILEWISE_DISPATCH(quantize)(row, search.dim, out.scales[panel],
                                                    static_cast<int>(header.limit), -1, 0,
                                                    quads + 4 * i, 4 * kPanel);
    out.sums[slot] = static_cast<int32_t>(parts.sum);
    out.residual[slot] = round_up_to_float(parts.residual);
    out.length[slot] = round_up_to_float(std::sqrt(square) * (1.0 + rounding));
    const double bias = search.metric == Metric::L2 ? 0.5 * square : 0.0;
    out.bias[slot] = round_down(bias * (1.0 - rounding) - header.least_bias * (1.0 + rounding));
  }
}

}  // namespace

Tensor pack_codes(const Search& search) {
  const int64_t codes = search.codes, dim = search.dim;
  std::vector<Kind> kinds(codes);
  std::vector<double> norms(codes), largest(codes);
  for_codes(codes, dim, [&](int64_t j, double* row) {
    norms[j] = TILEWISE_DISPATCH(load_code)(search, j, row);
    bool nan = false, infinite = false;
    if (!std::isfinite(norms[j])) {
      for (int64_t d = 0; d < dim; ++d) {
        nan |= std::isnan(row[d]);
        infinite = true;
      }
    }
    kinds[j] = nan ? Kind::NotANumber : infinite ? Kind::Infinite : Kind::Finite;
  });
  Header header{codes, dim, static_cast<int64_t>(search.metric), TILEWISE_DISPATCH(filter_limit)()};
  std::vector<int64_t> finite;
  for (int64_t j = 0; j < codes; ++j) {
    if (kinds[j] == Kind::Finite) finite.push_back(j);
    header.infinite |= kinds[j] == Kind::Infinite;
  }
  header.codes = finite.size();

  const int64_t bytes = Arrays(nullptr, header.codes, dim).bytes;
  const Tensor result = at::empty({bytes}, at::kByte);
  const Arrays out(result.mutable_data_ptr(), header.codes, dim);
  find_centre(search, finite, out.centre);
  std::vector<double> squares(codes);
  for_codes(finite.size(), dim, [&](int64_t i, double* row) {
    const int64_t j = finite[i];
    largest[j] = centred(search, out.centre, j, row);
    for (int64_t d = 0; d < dim; ++d) squares[j] += row[d] * row[d];
  });
  double top = 0.0, least = std::numeric_limits<double>::infinity();
  for (const int64_t j : finite) {
    top = std::max(top, largest[j]);
    least = std::min(least, squares[j]);
    header.largest = std::max(header.largest, norms[j]);
  }
  // Cosine's vectors are no longer than 2 as they are.
  const bool scaled = search.metric != Metric::Cosine && top > 0.0 && std::isfinite(top);
  header.size = scaled ? std::exp2(-std::ceil(std::log2(top))) : 1.0;
  if (search.metric == Metric::L2 && !finite.empty()) {
    header.least_bias = 0.5 * least * header.size * header.size;
  }
  std::vector<double> relative(codes);
  for (const int64_t j : finite) relative[j] = largest[j] * header.size;
  const std::vector<int64_t> order = sorted(finite, relative);
  const int64_t panels = (header.codes + kPanel - 1) / kPanel;
  std::fill(out.order, out.order + panels * kPanel, -1);
  std::copy(order.begin(), order.end(), out.order);
  std::memset(out.quads, 0, panels * kPanel * round_up(dim, 4));
  at::parallel_for(0, panels, std::max<int64_t>(1, 256 / std::max<int64_t>(dim, 1)),
                   [&](int64_t begin, int64_t end) {
                     std::vector<double> row(round_up(dim, 8));
                     for (int64_t p = begin; p < end; ++p) {
                       pack_panel(search, header, out, p, largest, row.data());
                     }
                   });
  std::memcpy(result.mutable_data_ptr(), &header, sizeof header);
  return result;
}

Packed packed_view(const Tensor& packed, const Search& search) {
  Header header;
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.is_contiguous() &&
                        packed.numel() >= static_cast<int64_t>(sizeof header),
                    "packed: not a packed codebook");
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  const Arrays arrays(const_cast<void*>(packed.const_data_ptr()), header.codes, header.dim);
  TORCH_CHECK_VALUE(header.codes_in == search.codes && header.dim == search.dim &&
                        header.metric == static_cast<int64_t>(search.metric) &&
                        header.limit == TILEWISE_DISPATCH(filter_limit)() &&
                        packed.numel() >= arrays.bytes,
                    "packed: made of another codebook, for another metric or on another machine");
  const Layout<void*> layout(nullptr, header.codes, header.dim);
  return {header.codes,      layout.panels, layout.depth, header.size,   header.least_bias,
          header.largest,    arrays.centre, arrays.order, arrays.quads,  arrays.sums,
          arrays.scales,     arrays.bias,   arrays.length, arrays.residual};
}

bool has_infinite_codes(const Tensor& packed) {
  Header header;
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  return header.infinite;
}

}  // namespace tilewise
