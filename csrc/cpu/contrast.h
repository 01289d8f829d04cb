// The driver of losses over all pairs of two batches of features: a block of logits at a time
// becomes a block of their gradients, and two products carry these back to the features.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "features.h"
#include "matmul.h"
#include "positives.h"
#include "simd/logit_block.h"

namespace tilewise {

// Gradients of the features; the products of `for_tiles` add up in them.
struct FeatureGradients {
  at::Tensor rows, cols;    // (B, D), (N, D), or empty where not needed
  bool added_rows = false;  // whether `rows` holds something that they are added to

  FeatureGradients(const Features& features, bool need_rows, bool need_cols);
  // Those of the rows are added to `total`.
  FeatureGradients(const Features& features, const at::Tensor& total, bool need_cols);
};

// A block of numbers, of some rows of the same stride.
struct Numbers {
  void* data;
  int64_t stride;
  at::ScalarType type;
};

// Turns a block of dot products into d(loss)/d(dot): on the thread that computed it. `place`: its
// rows and columns of all, and its number in the tile. The dots may be overwritten; `gradients` is
// where they are, or somewhere else, and may be of the product type.
using Epilogue =
    std::function<void(const Block& place, const Numbers& dots, const Numbers& gradients)>;

// A part of the logits, cut into blocks.
struct Tile {
  int64_t row, rows, col, cols;
  Grid blocks() const { return Grid(rows, cols, kBlockRows, kBlockCols); }

  static constexpr int64_t kBlockRows = 64, kBlockCols = 128;
  static_assert(kBlockCols <= kMaxBlockCols && kBlockCols % kBlockMultiple == 0);
};

// The tiles of logits (rows, cols): of about equal size, and none larger than `largest`.
class Tiles {
 public:
  Tiles(int64_t rows, int64_t cols);
  explicit Tiles(const Features& features) : Tiles(features.rows.size(0), features.cols.size(0)) {}

  Tile largest() const;
  // Those of the same rows come side by side.
  void for_each(const std::function<void(const Tile&)>& visit) const;

 private:
  int64_t rows_, cols_, down_, across_;
};

// The blocks that a tile with so many rows has in the rows' gradient (B, dim).
Grid gradient_blocks(int64_t rows, int64_t dim);

// Runs over all tiles of the logits; `end` follows the blocks of each. Workspace is fixed, whatever
// B and N.
void for_tiles(const Features& features, const FeatureGradients* gradients,
               const Epilogue& epilogue, const std::function<void(const Tile&)>& end);

// What the blocks of a tile find out about their rows and columns: a T for each.
template <typename T>
class BlockParts {
 public:
  explicit BlockParts(const Features& features) {
    const int64_t count = Tiles(features).largest().blocks().count();
    rows_.resize(count * Tile::kBlockRows);
    cols_.resize(count * Tile::kBlockCols);
  }

  T* rows(const Block& block) { return rows_.data() + block.index * Tile::kBlockRows; }
  T* cols(const Block& block) { return cols_.data() + block.index * Tile::kBlockCols; }

  // Calls add(all, part, n) for n neighbouring rows or columns of all and what a block knows of
  // them: in the order of the blocks, for the same bits with every number of threads. Without
  // all_cols only for rows.
  template <typename Add>
  void merge(const Tile& tile, T* all_rows, T* all_cols, const Add& add) {
    const Grid blocks = tile.blocks();
    const int64_t down = blocks.down(), across = blocks.across();
    const int64_t pieces = down + (all_cols ? across : 0);
    deal(pieces, (tile.rows * across + tile.cols * down) * kWork, [&](int64_t i) {
      for (int64_t c = 0; i < down && c < across; ++c) {
        const Block block = blocks.block(blocks.index(i, c));
        add(all_rows + tile.row + block.row, rows(block), block.rows);
      }
      for (int64_t r = 0; i >= down && r < down; ++r) {
        const Block block = blocks.block(blocks.index(r, i - down));
        add(all_cols + tile.col + block.col, cols(block), block.cols);
      }
    });
  }

 private:
  static constexpr int64_t kWork = 16;  // of one of them, in multiplications

  std::vector<T> rows_, cols_;
};

// As vector kernels read it; `matches` must live as long.
MatchedBlock matched_block(const Block& place, const Numbers& dots,
                           const Positives::InBlock& matches, double scale);

}  // namespace tilewise
