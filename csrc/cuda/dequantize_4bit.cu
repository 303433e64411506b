// 4-bit codes to values: look up, scale, round once; scales may be codes of 8 bits themselves.

#include "dequantize.cuh"

int qlora::dequantize_4bit(const uint8_t* packed, const void* absmax, const float* nested_absmax,
                           const float* nested_codebook, const float* offset, const float* codebook,
                           int64_t block_size, int64_t n, void* y, int dtype, Execution how) {
  const Scales scales(absmax, nested_absmax, nested_codebook, offset);
  const auto run = nested_absmax == nullptr ? dequantize<16, false> : dequantize<16, true>;
  return run(packed, scales, codebook, block_size, n, y, dtype, how);
}
