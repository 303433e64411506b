// A 4-bit weight (N, K) and how parts of its rows are restored for a product.

#pragma once

#include <algorithm>

#include "scales.h"
#include "simd.h"

namespace qlora {

struct Weight {
  const uint8_t* packed;
  Scales scales;
  const float* codebook;
  int64_t block_size;
  int64_t rows, columns;  // N, K

  // Block sizes are powers of two but for odd ones out, and a shift is much faster than a division.
  int64_t block_of(int64_t position) const {
    const int bits = __builtin_ctzll(static_cast<uint64_t>(block_size));
    return block_size >> bits == 1 ? position >> bits : position / block_size;
  }
};

// How a product wants weights and activations is said by a Format (format_float.h):
//
//   Element        what is multiplied; kPlanes of them make one value, each in an array of its own
//   kPair          elements along the depth that multiply together and lie side by side
//   kDepth         of a chunk: what the inner loop reads of it stays in the L1 cache
//   kStep          the inner loop's depth is a multiple of this, its rows of kRowStep
//   kGroup         weight rows that are restored at a time, and stay in the L1 cache
//   run_length     how many products are summed up before they are added to the sums so far
//   kHasStretches  whether rows may be restored by a Stretch, in an order of their own (stretch.h)
//   kRowStride     from a row of a chunk to the next
//   kPanelStride   from kLanes lanes to the next: (kDepth / kPair, kLanes, kPair) elements
//
// Strides are a cache line longer than what they step over: powers of two would put all rows into
// the same few places of a cache.
template <typename Element>
constexpr int kLineOf = 64 / sizeof(Element);

// The sixteen values that the codes of one block stand for: one float product each, rounded to
// `Value`, the dtype of the product. `Format` says how a product wants them (tiles.h).
template <typename Value>
Floats rounded(Floats x) {
  Value lanes[kLanes];
  store(lanes, x);
  return load(lanes);
}

template <>
inline Floats rounded<float>(Floats x) {
  return x;
}

#if defined(__AVX2__) && !defined(__AVX512BW__)
// Without the way through memory.
template <>
inline Floats rounded<Bfloat16>(Floats x) {
  return float_of(_mm256_and_si256(round_in_place_to_bfloat16(x), broadcast(int32_t{-65536})));
}
#endif

// Asks for the codes and scales of a part of a row ahead of their use: parts of rows lie too far
// from one another for a processor to see what comes next. Outside the weight nothing happens.
inline void prefetch_row(const Weight& weight, int64_t row, int64_t begin, int64_t count) {
  if (row >= weight.rows || begin >= weight.columns) return;
  const int64_t position = row * weight.columns + begin;
  const int64_t first = weight.block_of(position), last = weight.block_of(position + count - 1);
  weight.scales.prefetch_blocks(first, last + 1 - first);
  prefetch_bytes(weight.packed + position / 2, count / 2);
}

// Restores `count` values of a row, from `begin` on, in order, with what the codes of each block
// stand for in a Table:
//
//   Table(codebook, scale)               for one block
//   expand(packed, out, plane)           kVector values from whole bytes
//   expand_some(packed, count, out, plane)   fewer, an even number of them
//   expand_one(code, out, plane)
template <typename Table, typename Element>
__attribute__((noinline)) void decode_row(const Weight& weight, int64_t row, int64_t begin,
                                          int64_t count, Element* out, int64_t plane) {
  int64_t position = row * weight.columns + begin;
  const int64_t end = position + count;
  int64_t block = weight.block_of(position);
  int64_t left = (block + 1) * weight.block_size - position;  // in this block
  if (position % 2 != 0 && count > 0) {  // an odd row length puts a row's start into a low nibble
    const Table table(weight.codebook, weight.scales[block]);
    table.expand_one(weight.packed[position / 2] & 15, out++, plane);
    ++position;
    --left;
  }
  const uint8_t* packed = weight.packed + position / 2;
  for (; position < end; ++block, left = weight.block_size) {
    const int64_t values = std::min(left, end - position);
    const Table table(weight.codebook, weight.scales[block]);
    position += values;
    int64_t i = 0;
#pragma GCC unroll 2
    for (; i + Table::kVector <= values; i += Table::kVector) {
      table.expand(packed, out, plane);
      packed += Table::kVector / 2;
      out += Table::kVector;
    }
    if (i == values) continue;
    const int64_t even = (values - i) / 2 * 2;
    table.expand_some(packed, even, out, plane);
    packed += even / 2;
    out += even;
    if (i + even < values) table.expand_one(*packed >> 4, out++, plane);
  }
}

}  // namespace qlora
