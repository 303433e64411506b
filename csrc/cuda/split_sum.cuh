// Adding up the parts of a sum that several thread blocks worked on.

#pragma once

#include "matmul.cuh"
#include "memory.cuh"

namespace qlora {

// y = the sum over the splits, of which there may be none, in their order, of what lies in the
// workspace, plus the bias.
int add_splits(const Matmul& matmul);

// Of the parts of a sum over inputs, all but the last ones; a multiple of step.
__host__ __device__ inline int64_t part_length(int64_t inputs, int splits, int step) {
  const int64_t steps = (inputs - 1) / step + 1;
  return ((steps - 1) / splits + 1) * step;
}

// The inputs that a part of the sum is over: [first, last).
struct Part {
  int64_t first, last;

  __device__ Part(int64_t inputs, int splits, int split, int step) {
    const int64_t length = part_length(inputs, splits, step);
    first = min(length * split, inputs);
    last = min(first + length, inputs);
  }
};

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
