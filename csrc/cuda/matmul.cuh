// What the kernels behind matmul_4bit are given, and where each of them is.

#pragma once

#include "launch.cuh"
#include "scales.cuh"

namespace qlora {

// A 4-bit weight (N, K) as it is stored.
struct Weight {
  const uint8_t* packed;  // (ceil(rows * columns / 2))
  Scales scales;
  const float* codebook;  // (16)
  int64_t block_size;
  int64_t rows;     // N
  int64_t columns;  // K
};

// y (tokens, outputs) = x (tokens, inputs) times the weight: inputs is columns and outputs is rows,
// or the other way round when transposed.
struct Matmul {
  const void* x;
  int dtype;
  int64_t tokens;
  Weight weight;
  const void* bias;  // (outputs) of dtype, or null
  bool transposed;
  void* y;
  int splits;        // parts of the sum over inputs
  float* workspace;  // (splits, tokens, outputs) when splits > 1: a kernel then writes plain sums
                     // there, and add_splits (split_sum.cuh) makes y of them
  cudaStream_t stream;

  int64_t inputs() const { return transposed ? weight.rows : weight.columns; }
  int64_t outputs() const { return transposed ? weight.columns : weight.rows; }
};

// Each launches its kernel (enum MatmulKernel) and returns a Status.
int matmul_general(const Matmul& matmul);
int matmul_few_tokens(const Matmul& matmul, bool by_table);
int matmul_many_tokens(const Matmul& matmul, bool by_table);

}  // namespace qlora
