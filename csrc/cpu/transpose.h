// A square of values is transposed in registers, in log2(kLanes) rounds of interleaving.

#pragma once

#include <utility>

#include "simd.h"

namespace qlora {

template <size_t... kLane>
Floats interleave_low(Floats a, Floats b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kLane % 2 * kLanes + kLane / 2)...);
}

template <size_t... kLane>
Floats interleave_high(Floats a, Floats b, std::index_sequence<kLane...>) {
  return __builtin_shufflevector(a, b, (kLane % 2 * kLanes + (kLanes + kLane) / 2)...);
}

// rows[i][j] becomes rows[j][i]. The lanes may hold any 32 bits: they are only moved.
inline void transpose(Floats (&rows)[kLanes]) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    // A shuffle of two halves, as of a pack of cards: row and lane numbers rotate by one bit.
    Floats next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2], lanes);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace qlora
