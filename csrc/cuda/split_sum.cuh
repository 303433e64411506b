// Adding up the parts of a sum that several thread blocks worked on.

#pragma once

#include "matmul.cuh"
#include "memory.cuh"

namespace qlora {

// y = the sum over the splits, in their order, of what lies in the workspace, plus the bias.
int add_splits(const Matmul& matmul);

// The inputs that a part of the sum is over: [first, last). Parts begin at multiples of step.
struct Part {
  int64_t first, last;

  __device__ Part(int64_t inputs, int splits, int split, int step) {
    const int64_t steps = (inputs - 1) / step + 1;
    const int64_t length = ((steps - 1) / splits + 1) * step;
    first = min(length * split, inputs);
    last = min(first + length, inputs);
  }
};

// Thread blocks that a launch can have.
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

// A finished sum: to y, with the bias, or as one of several parts to the workspace.
template <typename Value>
__device__ void store_sum(const Matmul& matmul, int split, int64_t token, int64_t output,
                          int64_t outputs, float sum) {
  const int64_t i = token * outputs + output;
  if (matmul.splits > 1) {
    matmul.workspace[split * matmul.tokens * outputs + i] = sum;
    return;
  }
  const Value* bias = static_cast<const Value*>(matmul.bias);
  if (bias != nullptr) sum += to_float(bias[output]);
  round_to(sum, static_cast<Value*>(matmul.y) + i);
}

}  // namespace qlora
