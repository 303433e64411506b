// Products with a 4-bit weight: which kernel makes them is chosen in qlora_ref/matmul_plan.py.

#include "grid.cuh"
#include "matmul.cuh"
#include "memory.cuh"
#include "split_sum.cuh"

namespace qlora {
namespace {

// Sums over no inputs: the bias, or zeros. Threads: kThreads.
template <typename Value>
__global__ void __launch_bounds__(kThreads) fill_with_bias(int64_t n,  // tokens * outputs, > 0
                                                           int64_t outputs,
                                                           const Value* bias,  // (outputs) or null
                                                           Value* y) {         // (tokens, outputs)
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    round_to(bias == nullptr ? 0.0f : to_float(bias[i % outputs]), y + i);
  }
}

int multiply_nothing(const Matmul& matmul) {
  const int64_t n = matmul.tokens * matmul.outputs();
  return with_dtype(matmul.dtype, [&](auto type) {
    using Value = decltype(type);
    fill_with_bias<<<thread_blocks(n), kThreads, 0, matmul.stream>>>(
        n, matmul.outputs(), static_cast<const Value*>(matmul.bias), static_cast<Value*>(matmul.y));
    return launched();
  });
}

int multiply(const Matmul& matmul, int kernel) {
  switch (kernel) {
    case kGeneral:
      return matmul_general(matmul);
    case kFewTokensTable:
    case kFewTokensPermute:
      return matmul_few_tokens(matmul, kernel == kFewTokensTable);
    case kManyTokensTable:
    case kManyTokensPermute:
      return matmul_many_tokens(matmul, kernel == kManyTokensTable);
  }
  return kBadSize;
}

bool is_known(int dtype) { return dtype == kFloat32 || dtype == kBfloat16 || dtype == kFloat16; }

}  // namespace

int matmul_4bit(const void* x, int dtype, int64_t tokens, const uint8_t* packed, const void* absmax,
                const float* nested_absmax, const float* nested_codebook, const float* offset,
                const float* codebook, int64_t block_size, int64_t rows, int64_t columns,
                const void* bias, int transposed, void* y, int kernel, int splits, float* workspace,
                Execution how) {
  if (tokens < 0 || rows < 0 || columns < 0 || block_size < 2 || block_size % 2 != 0 ||
      splits < 1 || (splits > 1 && workspace == nullptr)) {
    return kBadSize;
  }
  if (!is_known(dtype)) return kUnknownDtype;
  const Scales scales{absmax, nested_absmax, nested_codebook, offset};
  const Weight weight{packed, scales, codebook, block_size, rows, columns};
  const Matmul matmul{x,         dtype,
                      tokens,    weight,
                      bias,      transposed != 0,
                      y,         splits,
                      workspace, static_cast<cudaStream_t>(how)};
  if (tokens == 0 || matmul.outputs() == 0) return kOk;
  if (matmul.inputs() == 0) return multiply_nothing(matmul);
  const int status = multiply(matmul, kernel);
  return status != kOk || splits == 1 ? status : add_splits(matmul);
}

}  // namespace qlora
