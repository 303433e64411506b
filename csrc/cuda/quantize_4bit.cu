// Values to 4-bit codes: a block's absmax, the nearest of 16 levels, two codes a byte.

#include "quantize.cuh"

int qlora::quantize_4bit(const void* x, int dtype, int64_t n, const float* codebook,
                         int64_t block_size, uint8_t* packed, float* absmax, Execution how) {
  return quantize<16>(x, dtype, n, codebook, block_size, packed, absmax, how);
}
