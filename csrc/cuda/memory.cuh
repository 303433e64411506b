// How values lie in memory: 16 bytes to a load or a store, the most that one instruction moves.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace qlora {

constexpr int kVectorBytes = 16;

// The larger one; NaN if either is. (fmaxf would drop a NaN.)
__device__ inline float larger(float a, float b) {
  float most;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
  return most;
}

// Byte i of a word, counted from the lowest: one instruction, where a shift and a mask are two.
__device__ inline uint32_t byte_of(uint32_t word, int i) {
  return __byte_perm(word, 0, 0x4440 + i);
}

// The float that byte i of a word is the index of, in a table in shared memory. Where it lies is
// one instruction, a sum of products of bytes.
__device__ inline float at_byte_of(const float* table, uint32_t word, int i) {
  const uint32_t start = static_cast<uint32_t>(__cvta_generic_to_shared(table));
  const uint32_t address = __dp4a(word, uint32_t{sizeof(float)} << 8 * i, start);
  return *static_cast<const float*>(__cvta_shared_to_generic(address));
}

template <typename To, typename From>
__device__ To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are neither added nor lost");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The values in 32 bits: one float, or two of 16 bits, the first one in the lower half.
// larger_magnitude: of each value of a word of magnitudes, and the magnitude of that of another.
template <typename Value>
struct Word;

template <>
struct Word<float> {
  static constexpr int kValues = 1;
  __device__ static float value(uint32_t word, int) { return __uint_as_float(word); }
  __device__ static uint32_t larger_magnitude(uint32_t most, uint32_t word) {
    return __float_as_uint(larger(__uint_as_float(most), fabsf(__uint_as_float(word))));
  }
  __device__ static uint32_t round(const float* values) { return __float_as_uint(values[0]); }
};

template <>
struct Word<__nv_bfloat16> {
  static constexpr int kValues = 2;
  // A bfloat16 is the upper half of a float.
  __device__ static float value(uint32_t word, int i) {
    return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
  }
  __device__ static uint32_t larger_magnitude(uint32_t most, uint32_t word) {
    const auto magnitudes = same_bits<__nv_bfloat162>(word & 0x7fff7fffu);  // without the signs
    return same_bits<uint32_t>(__hmax2_nan(same_bits<__nv_bfloat162>(most), magnitudes));
  }
  __device__ static uint32_t round(const float* values) {
    return same_bits<uint32_t>(__floats2bfloat162_rn(values[0], values[1]));
  }
};

template <>
struct Word<__half> {
  static constexpr int kValues = 2;
  __device__ static float value(uint32_t word, int i) {
    const __half2 pair = same_bits<__half2>(word);
    return i == 0 ? __low2float(pair) : __high2float(pair);
  }
  __device__ static uint32_t larger_magnitude(uint32_t most, uint32_t word) {
    const __half2 magnitudes = __habs2(same_bits<__half2>(word));
    return same_bits<uint32_t>(__hmax2_nan(same_bits<__half2>(most), magnitudes));
  }
  __device__ static uint32_t round(const float* values) {
    return same_bits<uint32_t>(__floats2half2_rn(values[0], values[1]));
  }
};

// A single value: to float, exactly, and from it, rounded to the nearest.
__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

__device__ inline void round_to(float value, float* y) { *y = value; }
__device__ inline void round_to(float value, __nv_bfloat16* y) { *y = __float2bfloat16_rn(value); }
__device__ inline void round_to(float value, __half* y) { *y = __float2half_rn(value); }

// kWords words from an address that is a multiple of 16 bytes.
template <int kWords>
__device__ void load_words(const void* address, uint32_t (&words)[kWords]) {
  static_assert(kWords % 4 == 0, "four words are 16 bytes");
  const uint4* vectors = static_cast<const uint4*>(address);
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) {
    const uint4 vector = vectors[i];
    words[4 * i] = vector.x;
    words[4 * i + 1] = vector.y;
    words[4 * i + 2] = vector.z;
    words[4 * i + 3] = vector.w;
  }
}

template <int kWords>
__device__ void store_words(const uint32_t (&words)[kWords], void* address) {
  static_assert(kWords % 4 == 0, "four words are 16 bytes");
  uint4* vectors = static_cast<uint4*>(address);
#pragma unroll
  for (int i = 0; i < kWords / 4; ++i) {
    // Assigned, it would now and then become four stores.
    __stwb(vectors + i,
           make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]));
  }
}

}  // namespace qlora
