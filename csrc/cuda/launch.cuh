// What every entry point shares: dtypes as types, launches and what became of them, warps.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../kernels.h"

namespace qlora {

constexpr uint32_t kAllLanes = 0xffffffff;

// The number of this warp in its thread block: the same for all lanes, which the compiler can see
// only of what a shuffle returns.
__device__ inline int warp_of_block() { return __shfl_sync(kAllLanes, threadIdx.x / 32, 0); }

// As threadIdx.x and blockIdx.x, but read anew: no register keeps what is worked out from them, be
// it before, through a loop.
__device__ inline int thread_read_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

__device__ inline uint32_t block_read_anew() {
  uint32_t block;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
  return block;
}

inline int status_of(cudaError_t error) {
  return error == cudaSuccess ? kOk : kCudaError + static_cast<int>(error);
}

// The status of the launch just made.
inline int launched() { return status_of(cudaGetLastError()); }

// Launches a kernel with dynamic shared memory, also more than the 48 KiB that need no asking; or
// kBadSize, if it were more thread blocks than a launch can have.
template <typename... Parameters, typename... Arguments>
int launch_with_shared(void (*kernel)(Parameters...), int64_t blocks, int threads, int bytes,
                       cudaStream_t stream, const Arguments&... arguments) {
  if (blocks >= int64_t{1} << 31) return kBadSize;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (allowed != cudaSuccess) return status_of(allowed);
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(arguments...);
  return launched();
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

inline bool is_known(int dtype) {
  return with_dtype(dtype, [](auto) { return kOk; }) == kOk;
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace qlora
