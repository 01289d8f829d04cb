#include "contrast.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>

#include "pages.h"
#include "rows.h"
#include "simd/transpose.h"

namespace tilewise {
namespace {

using at::Tensor;

// Both axes are tiled, so the workspace is fixed: the gradients of 4.25 Mi logits, 18 MiB (in
// bfloat16 with their transpose: the same). The sizes differ so that a batch that is cut into small
// tiles one way is cut into large ones the other.
constexpr int64_t kMaxTileRows = 2048, kMaxTileCols = 2176;

// Where part i ends, if `size` is cut into `count` about equal parts. The first is the largest.
int64_t end_of_part(int64_t size, int64_t count, int64_t i) {
  return count ? std::min(size, round_up(ceil_div(size * (i + 1), count), kBlockMultiple)) : 0;
}

// The gradients of a tile of logits (m, n), as the left factors of two products. They lie in strips
// of kChunk elements, as the kernels read them, with a gap that keeps rows off each other's places
// in the cache. bfloat16, whose pairs run along the depth, needs a transposed copy.
class GradientTile {
 public:
  // For tiles no larger than this one.
  GradientTile(const Tile& largest, at::ScalarType type, bool need_cols)
      : type_(type),
        numbers_(type == at::kBFloat16 ? 2 : 1),
        strip_(type == at::kDouble ? largest.cols : kChunk * numbers_),
        stride_(type == at::kDouble ? largest.cols : (kChunk + 16) * numbers_),
        copy_(need_cols && type == at::kBFloat16),
        rows_bytes_(bytes_of(largest.rows, largest.cols)),
        bytes_(rows_bytes_ + (copy_ ? bytes_of(largest.cols, largest.rows) : 0)) {}

  int64_t bytes() const { return bytes_; }
  void set_memory(void* memory) {
    rows_ = static_cast<char*>(memory);
    cols_ = rows_ + rows_bytes_;
  }

  void set(const Tile& tile) { tile_ = tile; }

  // Where the gradients of a block go.
  Numbers block(const Block& block) const {
    return {at(rows_, block.row, block.col, tile_.rows), stride_, type_};
  }

  // Follows, when they are there.
  void finish(const Block& block) const {
    if (!copy_) return;
    using Kernel = void (*)(const uint16_t*, int64_t, int64_t, int64_t, uint16_t*, int64_t);
    TILEWISE_DISPATCH_AS(Kernel, transpose)
    (static_cast<const uint16_t*>(at(rows_, block.row, block.col, tile_.rows)), stride_, block.rows,
     block.cols, static_cast<uint16_t*>(at(cols_, block.col, block.row, tile_.cols)), stride_);
  }

  Left rows() const { return left(rows_, tile_.rows); }  // (m, n)

  Left cols() const {  // (n, m)
    if (copy_) return left(cols_, tile_.cols);
    Left out = rows();
    if (type_ == at::kDouble) out.matrix = out.matrix.t();
    out.elements.transposed = true;
    return out;
  }

 private:
  int64_t bytes_of(int64_t rows, int64_t cols) const {
    return rows * ceil_div(cols, strip_) * stride_ * c10::elementSize(type_);
  }

  void* at(char* space, int64_t row, int64_t col, int64_t rows) const {
    const int64_t place = col / strip_ * rows * stride_ + row * stride_ + col % strip_;
    return space + place * c10::elementSize(type_);
  }

  Left left(char* space, int64_t rows) const {
    if (type_ == at::kDouble) {
      return {at::from_blob(space, {rows, tile_.cols}, {stride_, 1}, at::dtype(type_)), {}};
    }
    const int64_t stride = stride_ / numbers_;
    return {Tensor(), {space, stride, rows * stride}};
  }

  at::ScalarType type_;
  int64_t numbers_, strip_, stride_;  // in numbers
  bool copy_;
  int64_t rows_bytes_, bytes_;
  char *rows_ = nullptr, *cols_ = nullptr;
  Tile tile_{};
};

// The walk over the tiles, with what lasts as long as a call.
class Walk {
 public:
  Walk(const Features& features, const FeatureGradients* gradients, const Epilogue& epilogue)
      : features_(features),
        gradients_(gradients),
        epilogue_(epilogue),
        tiles_(features),
        need_rows_(gradients && gradients->rows.numel()),
        need_cols_(gradients && gradients->cols.numel()),
        sum_type_(compute_type(features.rows)) {
    const Tile largest = tiles_.largest();
    if (largest.rows == 0 || largest.cols == 0) return;
    if (need_rows_ || need_cols_) {
      tile_gradients_.emplace(largest, features.product_type, need_cols_);
    }
    allocate(largest);
  }

  void run(const std::function<void(const Tile&)>& end) {
    Tensor left;  // (m, D)
    tiles_.for_each([&](const Tile& tile) {
      const bool new_left = tile.col == 0;
      if (new_left) left = rows_of(features_.rows, tile.row, tile.rows, features_.product_type);
      const Tensor right =
          rows_of(features_.cols, tile.col, tile.cols, features_.product_type);  // (n, D)
      pack(left, right, new_left);
      logits(Left(left), tile);
      end(tile);
      if (tile_gradients_) features(tile);
    });
  }

 private:
  int64_t dim() const { return features_.rows.size(1); }

  // In two pieces: malloc keeps their memory for the next call, where that of many would go back
  // to the system, and one of over 32 MiB as well, and come again page by page.
  void allocate(const Tile& largest) {
    const auto floats = [&](bool needed, int64_t depth, int64_t cols) {
      return needed ? RightFactor::floats(depth, cols, features_.product_type) : 0;
    };
    const int64_t right_t = floats(true, dim(), largest.cols);
    const int64_t right = floats(need_rows_, largest.cols, dim());
    const int64_t left = floats(need_cols_, largest.rows, dim());
    const int64_t tile = tile_gradients_ ? tile_gradients_->bytes() / sizeof(float) : 0;
    factors_space_ = at::empty({right_t + right + left}, at::dtype(at::kFloat));
    tile_space_ = at::empty({tile}, at::dtype(at::kFloat));
    right_t_space_ = factors_space_.mutable_data_ptr<float>();
    right_space_ = right_t_space_ + right_t;
    left_space_ = right_space_ + right;
    if (tile_gradients_) tile_gradients_->set_memory(tile_space_.mutable_data_ptr());
  }

  // The right factors; of `left` only where it is a new one.
  void pack(const Tensor& left, const Tensor& right, bool new_left) {
    right_t_.set(right.t(), right_t_space_);
    if (need_rows_) right_.set(right, right_space_);
    if (need_cols_ && new_left) left_.set(left, left_space_);
    const int64_t right_t = right_t_.panels(), rights = need_rows_ ? right_.panels() : 0;
    const int64_t lefts = need_cols_ && new_left ? left_.panels() : 0;
    deal(right_t + rights + lefts, kPackingWork * (right.numel() + left.numel()), [&](int64_t i) {
      if (i < right_t) return right_t_.pack(i);
      i -= right_t;
      i < rights ? right_.pack(i) : left_.pack(i - rights);
    });
  }

  // Blocks of logits, and what the epilogue makes of them.
  void logits(const Left& left, const Tile& tile) {
    if (tile_gradients_) tile_gradients_->set(tile);
    const Grid blocks = tile.blocks();
    deal(blocks.count(), tile.rows * tile.cols * (dim() + kEpilogueWork), [&](int64_t i) {
      const Block block = blocks.block(i);
      alignas(64) double space[Tile::kBlockRows * Tile::kBlockCols];  // floats: half of it
      const Numbers dots{space, Tile::kBlockCols, sum_type_};
      right_t_.multiply(left, block, dots.data, dots.stride, /*accumulate=*/false);
      Block place = block;
      place.row += tile.row;
      place.col += tile.col;
      epilogue_(place, dots, tile_gradients_ ? tile_gradients_->block(block) : dots);
      if (tile_gradients_) tile_gradients_->finish(block);
    });
  }

  // Both products with the tile of gradients, together: neither waits for the other's last blocks.
  void features(const Tile& tile) {
    const Grid of_rows = gradient_blocks(tile.rows, dim()),
               of_cols = gradient_blocks(tile.cols, dim());
    const int64_t rows = need_rows_ ? of_rows.count() : 0;
    const int64_t cols = need_cols_ ? of_cols.count() : 0;
    const Left grads = tile_gradients_->rows();
    const Left grads_t = need_cols_ ? tile_gradients_->cols() : Left();
    deal(rows + cols, tile.rows * tile.cols * dim(), [&](int64_t i) {
      if (i < rows) {
        add(gradients_->rows, tile.row, grads, right_, of_rows.block(i),
            gradients_->added_rows || tile.col > 0);
      } else {
        add(gradients_->cols, tile.col, grads_t, left_, of_cols.block(i - rows), tile.row > 0);
      }
    });
  }

  // To the rows of `gradient` (B, D) from `row` on.
  static void add(const Tensor& gradient, int64_t row, const Left& left, const RightFactor& right,
                  const Block& block, bool accumulate) {
    const int64_t stride = gradient.size(1), place = (row + block.row) * stride + block.col;
    auto* out = static_cast<char*>(gradient.mutable_data_ptr()) + place * gradient.element_size();
    right.multiply(left, block, out, stride, accumulate);
  }

  // In multiplications that take as long: of packing a number, and of an epilogue a logit.
  static constexpr int64_t kPackingWork = 8, kEpilogueWork = 64;

  const Features& features_;
  const FeatureGradients* gradients_;
  const Epilogue& epilogue_;
  const Tiles tiles_;
  const bool need_rows_, need_cols_;
  const at::ScalarType sum_type_;
  std::optional<GradientTile> tile_gradients_;
  Tensor factors_space_, tile_space_;
  float *right_t_space_ = nullptr, *right_space_ = nullptr, *left_space_ = nullptr;
  RightFactor right_t_, right_, left_;  // (D, n), (n, D), (m, D)
};

}  // namespace

Tiles::Tiles(int64_t rows, int64_t cols)
    : rows_(rows),
      cols_(cols),
      down_(ceil_div(rows, kMaxTileRows)),
      across_(ceil_div(cols, kMaxTileCols)) {}

Tile Tiles::largest() const {
  return {0, std::min(rows_, end_of_part(rows_, down_, 0)), 0,
          std::min(cols_, end_of_part(cols_, across_, 0))};
}

void Tiles::for_each(const std::function<void(const Tile&)>& visit) const {
  Tile tile{};
  for (int64_t i = 0; i < down_; ++i, tile.row += tile.rows) {
    tile.rows = end_of_part(rows_, down_, i) - tile.row;
    tile.col = 0;
    for (int64_t j = 0; j < across_; ++j, tile.col += tile.cols) {
      tile.cols = end_of_part(cols_, across_, j) - tile.col;
      visit(tile);
    }
  }
}

Grid gradient_blocks(int64_t rows, int64_t dim) {
  return Grid(rows, dim, Tile::kBlockRows, std::max(round_up(ceil_div(dim, 8), kPanel), kPanel));
}

FeatureGradients::FeatureGradients(const Features& features, bool need_rows, bool need_cols) {
  // The first tile writes every element, if there is one.
  const bool any = features.rows.size(0) && features.cols.size(0);
  const auto gradient = [&](bool needed, const Tensor& x) {
    if (!needed) return at::empty({0}, features.options());
    if (!any) return at::zeros(x.sizes(), features.options());
    const Tensor out = at::empty(x.sizes(), features.options());
    fetch_pages(out.mutable_data_ptr(), static_cast<int64_t>(out.nbytes()));
    return out;
  };
  rows = gradient(need_rows, features.rows);
  cols = gradient(need_cols, features.cols);
}

FeatureGradients::FeatureGradients(const Features& features, const Tensor& total, bool need_cols)
    : FeatureGradients(features, false, need_cols) {
  TORCH_CHECK_VALUE(total.sizes() == features.rows.sizes() && total.is_contiguous(),
                    "total: expected ", features.rows.sizes(), ", contiguous, got ", total.sizes(),
                    total.is_contiguous() ? "" : ", not contiguous");
  TORCH_CHECK_TYPE(total.scalar_type() == compute_type(features.rows), "total: expected ",
                   compute_type(features.rows), ", got ", total.scalar_type());
  rows = total;
  added_rows = true;
}

void for_tiles(const Features& features, const FeatureGradients* gradients,
               const Epilogue& epilogue, const std::function<void(const Tile&)>& end) {
  Walk(features, gradients, epilogue).run(end);
}

MatchedBlock matched_block(const Block& place, const Numbers& dots,
                           const Positives::InBlock& matches, double scale) {
  return {{dots.type == at::kDouble, dots.data, place.rows, place.cols, dots.stride, scale},
          matches.begin.data(),
          matches.cols.data()};
}

}  // namespace tilewise
