// What all kernels of adamw_step share: the formula, and the list of tensors of a launch.

#pragma once

#include "../adamw.h"
#include "grid.cuh"
#include "launch.cuh"
#include "memory.cuh"

namespace qlora {

// The formula.
struct Rule : AdamwFactors {
  __device__ float first_moment(float m, float grad) const {
    return m * keep_first + grad * add_first;
  }

  __device__ float second_moment(float v, float grad) const {
    return v * keep_second + grad * grad * add_second;
  }

  // With the moments after this step.
  __device__ float param(float param, float m, float v) const {
    const float denominator = sqrtf(v) * root_correction + eps;
    return param * decay - m / denominator * step_size;
  }
};

// A tensor, or values of it in a row.
struct Piece {
  void* params;
  const void* grads;
  void* first_moments;  // float, or uint8_t codes
  void* second_moments;
  float* first_absmaxes;  // of the codes, or null
  float* second_absmaxes;
  int64_t count;
};

// As many as fit into the 4 KiB of a kernel's parameters.
constexpr int kMostPieces = 64;

struct Pieces {
  int number;
  Piece items[kMostPieces];
};

// Units of so many values in which thread blocks take pieces; no unit has values of two.
__host__ __device__ inline int64_t units_of(const Piece& piece, int values) {
  return (piece.count - 1) / values + 1;
}

inline int unit_blocks(const Pieces& pieces, int values) {
  int64_t units = 0;
  for (int i = 0; i < pieces.number; ++i) units += units_of(pieces.items[i], values);
  return static_cast<int>(units < kMostThreadBlocks ? units : kMostThreadBlocks);
}

// Calls function(piece, first) for every unit of this thread block; first is its first value.
template <typename Function>
__device__ void for_each_unit(const Pieces& pieces, int values, Function function) {
  int64_t unit = blockIdx.x;
  for (int i = 0; i < pieces.number; ++i) {
    const Piece& piece = pieces.items[i];
    const int64_t units = units_of(piece, values);
    for (; unit < units; unit += gridDim.x) function(piece, unit * values);
    unit -= units;
  }
}

// Values in a row, from and to addresses that are multiples of 16.
template <typename Value, int kNumber>
__device__ void load_values(const Value* address, float (&values)[kNumber]) {
  constexpr int kPerWord = Word<Value>::kValues;
  uint32_t words[kNumber / kPerWord];
  load_words(address, words);
#pragma unroll
  for (int i = 0; i < kNumber; ++i)
    values[i] = Word<Value>::value(words[i / kPerWord], i % kPerWord);
}

template <typename Value, int kNumber>
__device__ void store_values(const float (&values)[kNumber], Value* address) {
  constexpr int kPerWord = Word<Value>::kValues;
  uint32_t words[kNumber / kPerWord];
#pragma unroll
  for (int i = 0; i < kNumber / kPerWord; ++i) words[i] = Word<Value>::round(values + i * kPerWord);
  store_words(words, address);
}

}  // namespace qlora
