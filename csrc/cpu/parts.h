// A loop that leaves each thread one long stretch of blocks.

#pragma once

#include "blockwise.h"

namespace qlora {

// Calls function(part, first, last) for as many stretches of whole blocks as there are threads.
template <typename Function>
void for_each_part(int64_t n, int64_t block_size, int threads, Function function) {
  const int64_t blocks = n / block_size + (n % block_size != 0);
  const int parts = n >= kParallelMinimum ? threads : 1;
#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)
  for (int part = 0; part < parts; ++part) {
    function(part, blocks * part / parts, blocks * (part + 1) / parts);
  }
}

}  // namespace qlora
