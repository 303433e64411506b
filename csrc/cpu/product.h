// What is to be computed: y = x W^T + bias, or y = x W.

#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "weight.h"

namespace qlora {

template <typename Value>
struct Product {
  const Value* x;     // (tokens, depth)
  const Value* bias;  // (outputs), or null
  Value* y;           // (tokens, outputs)
  int64_t tokens, depth, outputs;
  Weight weight;
};

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace qlora
