// What all kernels of adamw_step share: the formula, and the list of tensors of a launch.

#pragma once

#include "../adamw.h"
#include "grid.cuh"
#include "launch.cuh"
#include "rounded.cuh"

namespace qlora {

// Whether values lie where root_in_range and quotient_in_range are right. Of a float's bits, 30 is
// the upper one of the exponent and 29 the next: 2^-63 to 2 have only the latter.
class Range {
 public:
  // Of nothing, where steps in range serve at all.
  __device__ explicit Range(bool serves) : in_all_(serves ? 0xffffffff : 0) {}

  // Of a second moment, 2^65 and above are right as well; infinity and NaN show in the quotient.
  __device__ void add(float second_moment, float quotient) {
    in_all_ &= __float_as_uint(second_moment) & __float_as_uint(quotient);
    in_any_ |= __float_as_uint(quotient);
  }

  __device__ bool has_all() const { return (in_all_ & ~in_any_ >> 1 & 1u << 29) != 0; }

 private:
  uint32_t in_all_;
  uint32_t in_any_ = 0;
};

// The formula, in the order of float operations of qlora_ref/reference/adamw_step.py.
struct Rule : AdamwFactors {
  __device__ float first_moment(float m, float grad) const {
    return m * keep_first + grad * add_first;
  }

  __device__ float second_moment(float v, float grad) const {
    return v * keep_second + grad * grad * add_second;
  }

  // With the moments after this step.
  __device__ float param(float param, float m, float v) const {
    return moved(param, m / denominator(sqrtf(v)));
  }

  // The same, if the range has all values that were added to it.
  __device__ float param_in_range(float param, float m, float v, Range& range) const {
    const float quotient = quotient_in_range(m, denominator(root_in_range(v)));
    range.add(v, quotient);
    return moved(param, quotient);
  }

  // The denominator is at least 2^-32 then.
  __device__ bool has_range() const {
    return root_correction >= 1.0f && eps >= 0.0f && divides_exactly();
  }

 private:
  __device__ float denominator(float root) const { return root * root_correction + eps; }

  __device__ float moved(float param, float quotient) const {
    return param * decay - quotient * step_size;
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
  const int64_t stride = int64_t{gridDim.x} * values;
  int64_t first = int64_t{blockIdx.x} * values;
  for (int i = 0; i < pieces.number; ++i) {
    const Piece& piece = pieces.items[i];
    for (; first < piece.count; first += stride) function(piece, first);
    first -= units_of(piece, values) * values;
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
