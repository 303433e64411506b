// The nearest of sixteen levels, for vectors of values: how many of the thresholds between levels
// (blockwise.h) lie below each value, and which code the level in that place has.

#pragma once

#include "blockwise.h"
#include "nibbles.h"

namespace qlora {

// Sixteen codes, looked up by position.
class Codes {
 public:
  explicit Codes(const uint8_t* codes) : table_(Entries(codes).values) {}
  Ints operator[](Ints positions) const { return bits_of(table_[positions]); }

 private:
  struct Entries {
    float values[16];
    explicit Entries(const uint8_t* codes) {
      for (int i = 0; i < 16; ++i) values[i] = float_of(uint32_t{codes[i]});
    }
  };
  Table16 table_;
};

// The number of thresholds below each value.
#if defined(__AVX2__)

class Thresholds {
 public:
  explicit Thresholds(const float* thresholds)
      : first_(broadcast(thresholds[7])),
        second_(step_table(thresholds, 8)),
        third_(step_table(thresholds, 4)),
        fourth_(step_table(thresholds, 2)) {}

  // A binary search in 4 steps, each in a table of what comes next after the steps before it.
  Ints count_below(Floats x) const {
    Ints half = add_where_above(broadcast(0), 4, x, first_);  // of the count so far
    half = add_where_above(half, 2, x, pick_lanes(second_, half));
    half = add_where_above(half, 1, x, pick_lanes(third_, half));
    return add_where_above(half + half, 1, x, pick_lanes(fourth_, half));
  }

 private:
  // Where the count so far is 2 i, a step finds out whether `stride / 2` more are below. There are
  // 8 entries: an index has 3 bits (AVX2), or 4, of which the highest is 0.
  static Floats step_table(const float* thresholds, int stride) {
    float table[kLanes] = {};
    for (int i = 0; i < 8; ++i) table[i] = thresholds[2 * i / stride * stride + stride / 2 - 1];
    return load(table);
  }

  Floats first_, second_, third_, fourth_;
};

#else

class Thresholds {
 public:
  explicit Thresholds(const float* thresholds) {
    for (int i = 0; i < 15; ++i) thresholds_[i] = broadcast(thresholds[i]);
  }

  // Without look-ups, comparing with all thresholds beats a search.
  Ints count_below(Floats x) const {
    Ints count = broadcast(0);
#pragma GCC unroll 15
    for (int i = 0; i < 15; ++i) count -= x > thresholds_[i];  // minus 1 where it is
    return count;
  }

 private:
  Floats thresholds_[15];
};

#endif

#if defined(__AVX512BW__)

// The same for values from -1 to 1, where the thresholds allow it: of 32 cells of equal width each
// holds at most one of them, so that one comparison is left.
class Cells {
 public:
  explicit Cells(const float* thresholds) {
    float next[32];
    int32_t below[32] = {};
    std::fill(next, next + 32, std::numeric_limits<float>::infinity());
    for (int i = 0; i < 15; ++i) {
      const double own = std::floor(double{kCellsPerUnit} * thresholds[i]);  // exact
      for (int cell = -16; cell < 16; ++cell) {
        if (cell > own) ++below[cell & 31];
        if (cell != own) continue;
        fits_ = fits_ && std::isinf(next[cell & 31]);
        next[cell & 31] = thresholds[i];
      }
    }
    for (int half = 0; half < 2; ++half) {
      next_[half] = load(next + half * kLanes);
      std::memcpy(&below_[half], below + half * kLanes, sizeof below_[half]);
    }
  }

  bool fits() const { return fits_; }

  Ints count_below(Floats x) const {
    // The sum's last bit stands for 1: rounded down, its lowest 5 bits are the number of the cell,
    // which is all that the look-ups read.
    const Ints cell = bits_of(multiply_add_down(x, broadcast(kCellsPerUnit), broadcast(0x1.8p23f)));
    return add_where_above(pick_of_32(below_, cell), 1, x, pick_of_32(next_, cell));
  }

 private:
  // A little less than 16, so that a value that rounding takes above 1 lies in the last cell.
  static constexpr float kCellsPerUnit = 15.5f;

  bool fits_ = true;
  Floats next_[2];  // the threshold in each cell, or infinity
  Ints below_[2];   // how many lie in the cells before
};

#endif

// The code of the level that is nearest to each value.
template <typename Counter, bool kIsSorted>
class NearestLevel {
 public:
  NearestLevel(const Counter& counter, const uint8_t* codes) : counter_(counter), codes_(codes) {}

  Ints code(Floats normalised) const {
    const Ints position = counter_.count_below(normalised);
    return kIsSorted ? position : codes_[position];
  }

 private:
  Counter counter_;
  Codes codes_;  // of the levels by position; in a sorted codebook these are the positions
};

inline bool is_sorted(const uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    if (codes[i] != i) return false;
  }
  return true;
}

using AnyLevel = NearestLevel<Thresholds, false>;  // for any value and codebook

// Calls function with the fastest NearestLevel for values from -1 to 1.
template <typename Counter, typename Function>
void with_codes(const Counter& counter, const uint8_t* codes, Function function) {
  if (is_sorted(codes)) {
    function(NearestLevel<Counter, true>(counter, codes));
  } else {
    function(NearestLevel<Counter, false>(counter, codes));
  }
}

template <typename Function>
void with_nearest_level(const Decisions<16>& decisions, Function function) {
#if defined(__AVX512BW__)
  const Cells cells(decisions.thresholds);
  if (cells.fits()) return with_codes(cells, decisions.codes, function);
#endif
  with_codes(Thresholds(decisions.thresholds), decisions.codes, function);
}

}  // namespace qlora
