// What every entry point shares on the host: dtypes as types, and what became of a launch.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../kernels.h"

namespace qlora {

inline int status_of(cudaError_t error) {
  return error == cudaSuccess ? kOk : kCudaError + static_cast<int>(error);
}

// The status of the launch just made.
inline int launched() { return status_of(cudaGetLastError()); }

// Lets a kernel have more dynamic shared memory than the 48 KiB that need no asking.
template <typename Kernel>
int allow_shared(Kernel kernel, int bytes) {
  return status_of(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Calls function with a value of the type that dtype names; what it returns, or kUnknownDtype.
template <typename Function>
int with_dtype(int dtype, Function function) {
  switch (dtype) {
    case kFloat32:
      return function(float{});
    case kBfloat16:
      return function(__nv_bfloat16{});
    case kFloat16:
      return function(__half{});
  }
  return kUnknownDtype;
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace qlora
