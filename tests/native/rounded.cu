// The functions of csrc/cuda/rounded.cuh on arrays, and the compiler's own square root.

#include "../../csrc/cuda/rounded.cuh"

extern "C" __global__ void quotients(const float* a, const float* b, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = qlora::quotient_in_range(a[i], b[i]);
}

extern "C" __global__ void roots(const float* x, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = qlora::root_in_range(x[i]);
}

extern "C" __global__ void compiled_roots(const float* x, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = sqrtf(x[i]);
}
