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

// The code of the level that is nearest to each value, for any value and codebook.
template <bool kIsSorted>
class NearestLevel {
 public:
  explicit NearestLevel(const Decisions<16>& decisions)
      : thresholds_(decisions.thresholds), codes_(decisions.codes) {}

  Ints code(Floats normalised) const {
    const Ints position = thresholds_.count_below(normalised);
    return kIsSorted ? position : codes_[position];
  }

 private:
  Thresholds thresholds_;
  Codes codes_;  // of the levels by position; in a sorted codebook these are the positions
};

inline bool is_sorted(const uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    if (codes[i] != i) return false;
  }
  return true;
}

// Calls function with the NearestLevel that asks least.
template <typename Function>
void with_nearest_level(const Decisions<16>& decisions, Function function) {
  if (is_sorted(decisions.codes)) {
    function(NearestLevel<true>(decisions));
  } else {
    function(NearestLevel<false>(decisions));
  }
}

}  // namespace qlora
