// Values to 4-bit codes: a block's absmax, the nearest of 16 levels, two codes a byte.

#include "blockwise.h"

namespace qlora {
namespace {

// positions[i] = the number of thresholds below values[i]. With 15 of them, comparing with all
// beats a search: vectors of values go through without look-ups.
void count_thresholds_below(const Decisions<16>& decisions, const float* values,
                            int32_t* positions) {
  for (int i = 0; i < kChunk; ++i) {
    int32_t position = 0;
    for (int k = 0; k < 15; ++k) position += values[i] > decisions.thresholds[k];
    positions[i] = position;
  }
}

template <typename Value>
void quantize_chunk(const Value* x, int count, float absmax, const Decisions<16>& decisions,
                    uint8_t zero, uint8_t* packed) {
  float normalised[kChunk] = {};  // a short chunk is filled up with zeros
  int32_t positions[kChunk];
  normalise(x, count, absmax, normalised);
  count_thresholds_below(decisions, normalised, positions);
  for (int i = 0; i < count / 2; ++i) {
    const int high = decisions.codes[positions[2 * i]];
    const int low = decisions.codes[positions[2 * i + 1]];
    packed[i] = static_cast<uint8_t>(high << 4 | low);
  }
  if (count % 2) packed[count / 2] = decisions.codes[positions[count - 1]] << 4 | zero;
}

// The lowest code of the level 0 fills up the last byte after an odd number of values.
uint8_t code_of_zero(const float* codebook) {
  const float* zero = std::find(codebook, codebook + 16, 0.0f);
  return zero == codebook + 16 ? 0 : static_cast<uint8_t>(zero - codebook);
}

}  // namespace

int quantize_4bit(const void* x, int dtype, int64_t n, const float* codebook, int64_t block_size,
                  uint8_t* packed, float* absmax, int threads) {
  if (is_bad_size(n, block_size, threads)) return kBadSize;
  const Decisions<16> decisions(codebook);
  const uint8_t zero = code_of_zero(codebook);
  return with_dtype(dtype, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(x);
    for_each_block(n, block_size, threads, [&](int64_t block, int64_t start, int64_t count) {
      const float largest = largest_magnitude(values + start, count);
      absmax[block] = largest;
      for (int64_t i = start; i < start + count; i += kChunk) {
        const int size = static_cast<int>(std::min<int64_t>(kChunk, start + count - i));
        quantize_chunk(values + i, size, largest, decisions, zero, packed + i / 2);
      }
    });
    return kOk;
  });
}

}  // namespace qlora
