// 4-bit codes to values: scale the 16 levels once a block, then look up two values a byte.

#include "blockwise.h"

namespace qlora {
namespace {

template <typename Value>
void dequantize_block(const uint8_t* packed, int64_t count, float absmax, const float* codebook,
                      Value* y) {
  // Sixteen products and roundings a block instead of one a value, with the same results.
  Value scaled[16];
  for (int code = 0; code < 16; ++code) scaled[code] = from_float<Value>(codebook[code] * absmax);
  for (int64_t i = 0; i < count / 2; ++i) {
    y[2 * i] = scaled[packed[i] >> 4];
    y[2 * i + 1] = scaled[packed[i] & 15];
  }
  if (count % 2) y[count - 1] = scaled[packed[count / 2] >> 4];
}

}  // namespace

int dequantize_4bit(const uint8_t* packed, const float* absmax, const float* codebook,
                    int64_t block_size, int64_t n, void* y, int dtype, int threads) {
  if (is_bad_size(n, block_size, threads)) return kBadSize;
  return with_dtype(dtype, [&](auto type) {
    auto* values = static_cast<decltype(type)*>(y);
    for_each_block(n, block_size, threads, [&](int64_t block, int64_t start, int64_t count) {
      // Blocks are even, so each starts with a byte of its own.
      dequantize_block(packed + start / 2, count, absmax[block], codebook, values + start);
    });
    return kOk;
  });
}

}  // namespace qlora
