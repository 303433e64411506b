// Blocks of 8-bit codes: the nearest of 256 levels, and back.

#pragma once

#include "blockwise.h"
#include "table_256.h"

namespace qlora {

// Finds the code of the nearest level with one look-up, where the thresholds lie far enough apart.
//
// The rank of a float (its bits, as a signed number) grows by 2^23 from one power of two to the
// next. Ranks are cut into cells of 2^kCellBits, that is into 128 cells for each power of two, so
// narrow that a cell holds one threshold at most. The table has, for each cell, in one integer,
//
//     the number of thresholds below the cell       in the upper bits,
//     2^kCellBits - 1 - where its threshold lies    in the lower kCellBits (0 if it has none).
//
// Adding where in the cell a value lies carries into the upper bits exactly when the value is above
// the threshold. The ranks around zero, up to a cell before the threshold nearest to it, count as
// one: almost all floats are there.
class NearestOf256 {
 public:
  explicit NearestOf256(const float* codebook) : decisions_(codebook) {
    std::copy(decisions_.codes, decisions_.codes + 256, codes_);
    is_ascending_ = true;
    for (int i = 0; i < 256; ++i) is_ascending_ &= codes_[i] == i;
    has_cells_ = fill_cells();
  }

  // What a loop keeps in registers: bytes that are stored may alias the table's members, which
  // compilers would otherwise load again for each vector.
  class Search;

 private:
  static constexpr int kCellBits = 16;
  static constexpr int kInCell = (1 << kCellBits) - 1;
  static constexpr int kMaxCells = 6144;  // 24 KiB: half of a first-level cache

  Decisions<256> decisions_;
  int32_t codes_[256];
  bool is_ascending_;  // a position is the code
  bool has_cells_;
  float lowest_ = 0, above_ = 0;  // the lowest threshold; the float after the highest
  int32_t near_zero_ = 0;         // ranks from -near_zero_ to near_zero_ count as one
  int32_t origin_ = 0;            // where the cells begin: at the lowest threshold
  int32_t cells_[kMaxCells];

  // How far above the lowest threshold a number lies, in ranks that count.
  int64_t steps_to(float x) const {
    const int64_t rank = rank_of(x);
    return rank - std::clamp<int64_t>(rank, -near_zero_, near_zero_) - origin_;
  }

  static int32_t rank_of(float x) {
    const uint32_t bits = bits_of(x);
    return static_cast<int32_t>(bits & kSignBit ? bits ^ ~kSignBit : bits);
  }

  // False if two thresholds fall into one cell, one is (nearly) zero, which has two ranks, or the
  // cells are too many.
  bool fill_cells() {
    const float* begin = decisions_.thresholds;
    const float* end =
        std::find_if_not(begin, begin + 255, [](float x) { return std::isfinite(x); });
    if (begin == end) return false;
    lowest_ = begin[0];
    above_ = std::nextafter(end[-1], std::numeric_limits<float>::infinity());
    near_zero_ = std::numeric_limits<int32_t>::max();
    for (const float* x = begin; x < end; ++x) {
      near_zero_ = std::min(near_zero_, std::abs(rank_of(*x)) - kInCell - 1);
    }
    if (near_zero_ <= 0) return false;
    origin_ = static_cast<int32_t>(steps_to(lowest_));

    int64_t unfilled = 0;
    for (int below = 0; below < end - begin; ++below) {
      const int64_t steps = steps_to(begin[below]), cell = steps >> kCellBits;
      if (cell < unfilled || cell >= kMaxCells) return false;
      std::fill(cells_ + unfilled, cells_ + cell + 1, below << kCellBits);
      cells_[cell] += kInCell - static_cast<int32_t>(steps & kInCell);
      unfilled = cell + 1;
    }
    const int64_t last = steps_to(above_) >> kCellBits;
    if (last >= kMaxCells) return false;
    if (last == unfilled) cells_[last] = static_cast<int32_t>(end - begin) << kCellBits;
    return true;
  }
};

class NearestOf256::Search {
 public:
  explicit Search(const NearestOf256& table)
      : thresholds_(table.decisions_.thresholds),
        cells_(table.has_cells_ ? table.cells_ : nullptr),
        codes_(table.is_ascending_ ? nullptr : table.codes_),
        lowest_(broadcast(table.lowest_)),
        above_(broadcast(table.above_)),
        near_zero_(broadcast(table.near_zero_)),
        below_zero_(broadcast(-table.near_zero_)),
        origin_(broadcast(table.origin_)) {}

  // The codes nearest to normalised values.
  Ints operator()(Floats x) const {
    const Ints position = cells_ != nullptr ? position_by_cell(x) : position_by_halving(x);
    return codes_ == nullptr ? position : look_up(codes_, position);
  }

 private:
  const float* thresholds_;
  const int32_t* cells_;  // null: by halving
  const int32_t* codes_;  // null: a position is the code
  Floats lowest_, above_;
  Ints near_zero_, below_zero_, origin_;

  Ints position_by_cell(Floats x) const {
    // Nothing changes beyond the outer thresholds; NaN becomes the lowest, which is above none.
    const Ints rank = ranks_of(smaller(larger(x, lowest_), above_));
    const Ints squeezed_out = smaller(larger(rank, below_zero_), near_zero_);
    const Ints steps = subtract(subtract(rank, squeezed_out), origin_);
    const Ints cell = look_up(cells_, shift_right(steps, kCellBits));
    return shift_right(add(cell, bit_and(steps, broadcast(kInCell))), kCellBits);
  }

  // A binary search in 8 halvings.
  Ints position_by_halving(Floats x) const {
    Ints position = broadcast(0);
    for (int half = 128; half > 0; half /= 2) {
      const Floats threshold = look_up(thresholds_, add(position, broadcast(half - 1)));
      position = add(position, bit_and(is_greater(x, threshold), broadcast(half)));
    }
    return position;
  }
};

// The codes of the values of one block, a vector at a time.
class BlockQuantizer {
 public:
  BlockQuantizer(const NearestOf256& table, float absmax) : nearest_(table), normalise_(absmax) {}

  Ints operator()(Floats x) const { return nearest_(normalise_(x)); }

 private:
  NearestOf256::Search nearest_;
  Normaliser normalise_;
};

// Quantises a block to 8-bit codes and returns its absmax.
template <typename Value>
float quantize_block_8bit(const Value* x, int64_t count, const NearestOf256& table,
                          uint8_t* codes) {
  const float absmax = largest_magnitude(x, count);
  const BlockQuantizer code(table, absmax);
  for_each_vector(count, [=](int64_t i, auto part) {
    read_ahead(x + i);
    store(codes + i, code(load(x + i, part)), part);
  });
  return absmax;
}

// y[i] = levels[codes[i]] * absmax, rounded once.
template <typename Value>
void dequantize_block_8bit(const uint8_t* codes, int64_t count, float absmax,
                           const Table256& levels, Value* y) {
  const Floats scale = broadcast(absmax);
  levels.for_each(codes, count, [=](int64_t i, Floats level, auto part) {
    read_ahead(y + i);
    store(y + i, level * scale, part);
  });
}

}  // namespace qlora
