// Restoring values from codes of 4 or 8 bits: look up, scale, round once.
//
// Blocks of a power of two go through dequantize_chunks, eight values at a time; any others, and
// what is left at the end, through dequantize_each.

#pragma once

#include "grid.cuh"
#include "launch.cuh"
#include "memory.cuh"
#include "scales.cuh"

namespace qlora {

// Chunks that a thread restores between looks at where the end is.
constexpr int kTurns = 4;

// Eight codes as they lie in memory. offset(i): four times code i, where its level is in a table of
// floats, in bytes.
template <int kLevels>
struct Chunk;

template <>
struct Chunk<16> {
  static constexpr int kValues = 8;
  uint32_t word;

  // The even code is the upper one of its byte. All even ones, or all odd ones, are shifted to bits
  // 2 to 5 of their bytes at once.
  __device__ uint32_t offset(int i) const {
    return byte_of((i % 2 == 0 ? word >> 2 : word << 2) & 0x3c3c3c3c, i / 2);
  }
  __device__ static uint32_t code_at(const uint8_t* packed, int64_t i) {
    return packed[i / 2] >> (i % 2 == 0 ? 4 : 0) & 15;
  }
};

template <>
struct alignas(8) Chunk<256> {
  static constexpr int kValues = 8;
  uint32_t words[2];

  __device__ uint32_t offset(int i) const { return byte_of(words[i / 4], i % 4) * 4; }
  __device__ static uint32_t code_at(const uint8_t* codes, int64_t i) { return codes[i]; }
};

__device__ inline float level_at(const float* levels, uint32_t offset) {
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(levels) + offset);
}

// Blocks of 8 values times a power of two. A thread restores a chunk of 8 at a time. Threads:
// kThreads. Aligned: packed to the size of a chunk, y to 16 bytes.
template <int kLevels, bool kNested, typename Value>
__global__ void __launch_bounds__(kThreads)
    dequantize_chunks(const Chunk<kLevels>* packed,  // (chunks)
                      Scales scales,                 //
                      const float* codebook,         // (kLevels)
                      int block_shift,               // a block has 2^block_shift chunks
                      int64_t chunks,                //
                      Value* y) {                    // (chunks * 8)
  constexpr int kWords = 8 / Word<Value>::kValues;
  __shared__ float levels[kLevels];
  if (threadIdx.x < kLevels) levels[threadIdx.x] = codebook[threadIdx.x];
  __syncthreads();
  const auto restore = [&](int64_t i) {
    const Chunk<kLevels> chunk = packed[i];
    const float scale = scales.at<kNested>(i >> block_shift);
    uint32_t words[kWords];
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      float values[Word<Value>::kValues];
#pragma unroll
      for (int j = 0; j < Word<Value>::kValues; ++j) {
        values[j] = level_at(levels, chunk.offset(word * Word<Value>::kValues + j)) * scale;
      }
      words[word] = Word<Value>::round(values);
    }
    store_words(words, y + 8 * i);
  };
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (; i + (kTurns - 1) * stride < chunks; i += kTurns * stride) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) restore(i + turn * stride);
  }
  for (; i < chunks; i += stride) restore(i);
}

// Blocks of any size; a thread restores a value at a time. Threads: kThreads. No alignment.
template <int kLevels, bool kNested, typename Value>
__global__ void __launch_bounds__(kThreads)
    dequantize_each(const uint8_t* packed,  // (ceil(n / codes in a byte))
                    Scales scales,          //
                    const float* codebook,  // (kLevels)
                    int64_t block_size,     //
                    int64_t first,          // values before it are left alone
                    int64_t n,              //
                    Value* y) {             // (n)
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += stride) {
    const float level = codebook[Chunk<kLevels>::code_at(packed, i)];
    round_to(level * scales.at<kNested>(i / block_size), y + i);
  }
}

template <int kLevels, bool kNested, typename Value>
int dequantize_values(const uint8_t* packed, const Scales& scales, const float* codebook,
                      int64_t block_size, int64_t n, Value* y, cudaStream_t stream) {
  if (n == 0) return kOk;
  using Codes = Chunk<kLevels>;
  const bool has_chunks = block_size >= Codes::kValues && (block_size & (block_size - 1)) == 0 &&
                          is_aligned(packed, sizeof(Codes)) && is_aligned(y, kVectorBytes);
  const int64_t chunks = has_chunks ? n / Codes::kValues : 0;
  if (chunks > 0) {
    int block_shift = 0;
    while ((block_size >> block_shift) > Codes::kValues) ++block_shift;
    dequantize_chunks<kLevels, kNested>
        <<<thread_blocks((chunks - 1) / kTurns + 1), kThreads, 0, stream>>>(
            reinterpret_cast<const Codes*>(packed), scales, codebook, block_shift, chunks, y);
    if (const int status = launched(); status != kOk) return status;
  }
  const int64_t first = chunks * Codes::kValues;
  if (first == n) return kOk;
  dequantize_each<kLevels, kNested><<<thread_blocks(n - first), kThreads, 0, stream>>>(
      packed, scales, codebook, block_size, first, n, y);
  return launched();
}

template <int kLevels, bool kNested>
int dequantize(const uint8_t* packed, const Scales& scales, const float* codebook,
               int64_t block_size, int64_t n, void* y, int dtype, Execution how) {
  if (n < 0 || block_size < 2 || block_size % 2 != 0) return kBadSize;
  return with_dtype(dtype, [&](auto type) {
    return dequantize_values<kLevels, kNested>(packed, scales, codebook, block_size, n,
                                               static_cast<decltype(type)*>(y),
                                               static_cast<cudaStream_t>(how));
  });
}

}  // namespace qlora
