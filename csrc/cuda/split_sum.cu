#include "grid.cuh"
#include "memory.cuh"
#include "split_sum.cuh"

namespace qlora {
namespace {

// Threads: kThreads; each has outputs of its own, one at a time.
template <typename Value>
__global__ void __launch_bounds__(kThreads)
    add_parts(const float* parts,  // (splits, tokens * outputs)
              int splits,
              int64_t n,  // tokens * outputs, > 0
              int64_t outputs,
              const Value* bias,  // (outputs) or null
              Value* y) {         // (tokens, outputs)
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split) sum += parts[split * n + i];
    if (bias != nullptr) sum += to_float(bias[i % outputs]);
    round_to(sum, y + i);
  }
}

}  // namespace

int add_splits(const Matmul& matmul) {
  const int64_t n = matmul.tokens * matmul.outputs();
  return with_dtype(matmul.dtype, [&](auto type) {
    using Value = decltype(type);
    add_parts<<<thread_blocks(n), kThreads, 0, matmul.stream>>>(
        matmul.workspace, matmul.splits, n, matmul.outputs(),
        static_cast<const Value*>(matmul.bias), static_cast<Value*>(matmul.y));
    return launched();
  });
}

}  // namespace qlora
