// The product for any shape, block size and dtype, in float arithmetic: the obvious kernel.
//
// A thread block works on a tile of y (64 tokens, 64 outputs). It goes along the inputs in steps of
// 32: it puts x and the restored weight of the step into shared memory, then each thread adds up
// 4 x 4 outputs. Eight products are summed by themselves, then four such sums, before they go to
// the total: in one long sum in float each product would be rounded as coarsely as the total.

#include "matmul.cuh"
#include "memory.cuh"
#include "split_sum.cuh"

namespace qlora {
namespace {

constexpr int kTile = 64;  // tokens, and outputs
constexpr int kStep = 32;  // inputs
constexpr int kShort = 8;  // inputs whose products are summed by themselves
constexpr int kEach = 4;   // tokens, and outputs, of a thread
constexpr int kSide = kTile / kEach;
constexpr int kThreads = kSide * kSide;
constexpr int kRow = kStep + 1;  // of a tile in shared memory: no two rows begin in one bank

// The weight's value at (row, column), as the reference restores it: rounded to the dtype of x.
template <bool kNested, typename Value>
__device__ float restore(const Weight& weight, int64_t row, int64_t column) {
  const int64_t i = row * weight.columns + column;
  const uint32_t byte = weight.packed[i / 2];
  const uint32_t code = i % 2 == 0 ? byte >> 4 : byte & 15;
  const float scale = weight.scales.at<kNested>(i / weight.block_size);
  Value value;
  round_to(__fmul_rn(weight.codebook[code], scale), &value);
  return to_float(value);
}

using Sums = float[kEach][kEach];

// sums[i][j] += x[i] . weight[j] over kShort inputs; rows are kSide rows of a tile apart.
__device__ void add_products(const float* x, const float* weight, Sums& sums) {
#pragma unroll
  for (int input = 0; input < kShort; ++input) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        sums[i][j] =
            __fmaf_rn(x[i * kSide * kRow + input], weight[j * kSide * kRow + input], sums[i][j]);
      }
    }
  }
}

__device__ void add(const Sums& sums, Sums& total) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) total[i][j] += sums[i][j];
  }
}

// Threads: kThreads. Thread blocks: tiles of outputs, of tokens, splits; all in x, outputs fastest.
template <bool kNested, bool kTransposed, typename Value>
__global__ void __launch_bounds__(kThreads)
    multiply_tile(Matmul matmul, int64_t inputs, int64_t outputs) {
  __shared__ float x_tile[kTile * kRow];
  __shared__ float weight_tile[kTile * kRow];
  const int64_t output_tiles = (outputs - 1) / kTile + 1;
  const int64_t token_tiles = (matmul.tokens - 1) / kTile + 1;
  const int64_t first_output = blockIdx.x % output_tiles * kTile;
  const int64_t first_token = blockIdx.x / output_tiles % token_tiles * kTile;
  const int split = blockIdx.x / output_tiles / token_tiles;
  const Part part(inputs, matmul.splits, split, kStep);
  const Value* x = static_cast<const Value*>(matmul.x);
  const int side = threadIdx.x / kSide;   // this thread's tokens are side, side + kSide, ...
  const int along = threadIdx.x % kSide;  // its outputs along, along + kSide, ...

  float total[kEach][kEach] = {};
  for (int64_t first = part.first; first < part.last; first += kStep) {
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * kStep; i += kThreads) {
      const int64_t token = first_token + i / kStep, input = first + i % kStep;
      const bool inside = token < matmul.tokens && input < part.last;
      x_tile[i / kStep * kRow + i % kStep] = inside ? to_float(x[token * inputs + input]) : 0.0f;
    }
    for (int i = threadIdx.x; i < kTile * kStep; i += kThreads) {
      // Threads next to each other read codes next to each other.
      const int to = kTransposed ? i % kTile : i / kStep;
      const int from = kTransposed ? i / kTile : i % kStep;
      const int64_t output = first_output + to, input = first + from;
      float value = 0.0f;
      if (output < outputs && input < part.last) {
        value = restore<kNested, Value>(matmul.weight, kTransposed ? input : output,
                                        kTransposed ? output : input);
      }
      weight_tile[to * kRow + from] = value;
    }
    __syncthreads();
    float sum[kEach][kEach] = {};
#pragma unroll 1
    for (int input = 0; input < kStep; input += kShort) {
      float short_sum[kEach][kEach] = {};
      add_products(x_tile + side * kRow + input, weight_tile + along * kRow + input, short_sum);
      add(short_sum, sum);
    }
    add(sum, total);
  }

#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t token = first_token + side + i * kSide;
      const int64_t output = first_output + along + j * kSide;
      if (token < matmul.tokens && output < outputs) {
        store_sum<Value>(matmul, split, token, output, outputs, total[i][j]);
      }
    }
  }
}

template <bool kNested, bool kTransposed>
int launch(const Matmul& matmul) {
  const int64_t outputs = matmul.outputs();
  const int64_t tiles =
      ((outputs - 1) / kTile + 1) * ((matmul.tokens - 1) / kTile + 1) * matmul.splits;
  return with_dtype(matmul.dtype, [&](auto type) {
    const auto kernel = multiply_tile<kNested, kTransposed, decltype(type)>;
    return launch_with_shared(kernel, tiles, kThreads, 0, matmul.stream, matmul, matmul.inputs(),
                              outputs);
  });
}

}  // namespace

int matmul_general(const Matmul& matmul) {
  const bool nested = matmul.weight.scales.codes != nullptr;
  if (matmul.transposed) return nested ? launch<true, true>(matmul) : launch<false, true>(matmul);
  return nested ? launch<true, false>(matmul) : launch<false, false>(matmul);
}

}  // namespace qlora
