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

// Of 32 weights: what 32 bits can count.
constexpr int64_t kMostVectors = int64_t{1} << 32;

// Or outputs: vectors of 128 tokens can be counted in 32 bits.
constexpr int64_t kMostInputs = int64_t{1} << 28;

// log2 of the block size, if the kernels on tensor cores can read the weight; otherwise -1. They
// ask for x of 16 bits, blocks of a power of two, whole steps of 32 in each row, and vectors of 16
// bytes.
inline int tensor_core_block_shift(const Matmul& matmul) {
  const Weight& weight = matmul.weight;
  const bool fits = matmul.dtype != kFloat32 && weight.block_size >= 32 &&
                    (weight.block_size & (weight.block_size - 1)) == 0 &&
                    weight.columns % 32 == 0 && weight.rows <= kMostInputs &&
                    weight.columns <= kMostInputs &&
                    weight.rows * (weight.columns / 32) < kMostVectors &&
                    is_aligned(matmul.x, 16) && is_aligned(weight.packed, 16);
  if (!fits) return -1;
  int shift = 5;
  while (int64_t{1} << shift < weight.block_size) ++shift;
  return shift;
}

// Each launches its kernel (enum MatmulKernel) and returns a Status.
int matmul_general(const Matmul& matmul);
int matmul_few_tokens(const Matmul& matmul, bool by_table);
int matmul_many_tokens(const Matmul& matmul, bool by_table);

}  // namespace qlora
