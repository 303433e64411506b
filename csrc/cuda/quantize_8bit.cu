// Values to 8-bit codes: a block's absmax, the nearest of 256 levels.

#include "quantize.cuh"

int qlora::quantize_8bit(const void* x, int dtype, int64_t n, const float* codebook,
                         int64_t block_size, uint8_t* codes, float* absmax, Execution how) {
  return quantize<256>(x, dtype, n, codebook, block_size, codes, absmax, how);
}
